"""Hostile inputs for every reader; ``python -m tests.fuzz`` (``make fuzz``) runs ten thousand of them."""
