"""Will it fit, and how fast: bytes, caches, operators and time of a model, from headers or from a config alone."""
