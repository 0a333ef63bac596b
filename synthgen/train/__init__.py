"""Training: the loop, its optimizer and its checkpoints. Knows methods and batches, and nothing of runs."""
