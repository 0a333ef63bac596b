"""Networks: ``torch.nn`` and nothing of shards, runs or methods."""
