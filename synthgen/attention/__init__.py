"""Where each token looked while an image was made. Shared by the backbones."""
