"""Several runs: what they showed together."""
