"""Run folders in, one self-contained HTML page out. Reads files only."""
