"""Training: the loop, its optimizer and its checkpoints; uses methods and batches, but not runs."""
