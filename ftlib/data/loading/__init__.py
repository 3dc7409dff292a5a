"""Records from any source: rows found, their format chosen, converted, counted."""

from __future__ import annotations
