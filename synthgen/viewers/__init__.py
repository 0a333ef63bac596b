"""Viewers: pages that show a run."""
