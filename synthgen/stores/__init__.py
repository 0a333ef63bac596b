"""Where artifacts lie: tars on a local file system."""
