"""A run folder in, one self-contained HTML page out. Reads files only."""

from __future__ import annotations

from preftune.report.page import write_report

__all__ = ["write_report"]
