"""Objectives: pure functions from named log-probs to one value per unit. torch only."""
