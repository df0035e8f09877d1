"""Rows in, Examples and Trees out. No torch here."""
