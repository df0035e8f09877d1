"""Everything that turns responses into judgments."""
