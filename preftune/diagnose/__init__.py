"""Findings: what is wrong with data or with a run, how sure that is, and what to do. Each is one function."""
