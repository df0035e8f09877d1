"""Trees in, log-probabilities out: exact, packed, with the prompt read once."""
