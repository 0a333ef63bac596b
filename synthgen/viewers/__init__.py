"""Viewers: something to look at, made from a run."""
