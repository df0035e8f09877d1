"""Asking a language model, local or behind an OpenAI-compatible server: each reply kept, counted and paid for once."""
