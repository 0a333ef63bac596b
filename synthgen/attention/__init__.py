"""Recording of cross-attention and self-attention inside diffusion models. Shared by the backbones."""
