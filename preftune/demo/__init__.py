"""The embedded demo: a small world that writes its own data and whose true reward is known exactly."""
