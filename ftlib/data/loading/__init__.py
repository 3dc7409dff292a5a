"""Records from any source: rows found, their format chosen, converted, counted."""

from __future__ import annotations

from ftlib.data.loading.report import LoadReport, load_report

__all__ = ["LoadReport", "load_report"]
