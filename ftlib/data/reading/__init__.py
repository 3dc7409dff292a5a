"""Files to located rows: what prepares data and what loads records both read through this."""

from __future__ import annotations

from ftlib.data.reading.located import Facts, Located, Place, place_of
from ftlib.data.reading.table import Table, read_table

__all__ = ["Facts", "Located", "Place", "Table", "place_of", "read_table"]
