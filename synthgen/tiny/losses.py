"""The training losses of the tiny model: of the autoencoder, and of the U-Net with the text encoder."""

import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel

from synthgen.tiny import networks
from synthgen.tiny.loop import Losses

__all__ = ["AutoencoderLoss", "DenoisingLoss", "EagerAttention", "autocast", "randn_like"]

MAX_SNR = 5.0  # min-SNR weighting (arXiv 2303.09556)
BASE_WEIGHT = 1.0  # added to min(SNR, MAX_SNR), which is 0 for pure noise, where the layout is decided
OBJECT_WEIGHT = 2.0  # extra weight of objects: scenes fill most of an image and are easier


def autocast(device: torch.device) -> torch.autocast:
    """Matrix products and convolutions in bfloat16."""
    return torch.autocast(device.type, torch.bfloat16)


def randn_like(x: Tensor, generator: torch.Generator) -> Tensor:
    """Normal noise of the shape of ``x``, drawn on the CPU, so that it is the same on every device."""
    return torch.randn(x.shape, generator=generator).to(x.device)


class AutoencoderLoss(nn.Module):
    """Reconstruction error, with latents kept near unit variance, smooth, and robust to a little noise."""

    latent_noise = 0.05

    def __init__(self, vae: AutoencoderTiny, mse_weight: float = 2.0, edge_weight: float = 0.5) -> None:
        super().__init__()
        self.vae, self.mse_weight, self.edge_weight = vae, mse_weight, edge_weight

    def forward(self, x: Tensor, generator: torch.Generator) -> Losses:
        """The loss of images (b, 3, H, W) in [-1, 1]."""
        with autocast(x.device):
            z = self.vae.encode(x).latents.float()
            y = self.vae.decode(z + self.latent_noise * randn_like(z, generator)).sample.float()
        pixel = F.l1_loss(y, x) + self.mse_weight * F.mse_loss(y, x)
        edges = sum(F.l1_loss(y.diff(dim=d), x.diff(dim=d)) for d in (2, 3))
        coarse = F.l1_loss(F.avg_pool2d(y, 4), F.avg_pool2d(x, 4))
        std, mean = torch.std_mean(z, dim=(0, 2, 3))
        unit = (std - 1).square().mean() + mean.square().mean()
        rough = z.diff(dim=2).square().mean() + z.diff(dim=3).square().mean()
        loss = pixel + self.edge_weight * edges + 0.5 * coarse + 0.02 * unit + 0.002 * rough
        return {"loss": loss, "pixel": pixel, "unit": unit, "rough": rough}


class DenoisingLoss(nn.Module):
    """The v-prediction error, weighted by (min(SNR, 5) + 1) / (SNR + 1), and more where there are objects."""

    signal: Tensor
    noise: Tensor
    snr: Tensor

    def __init__(self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.text_encoder, self.unet = text_encoder, unet
        self.eos: int = text_encoder.config.eos_token_id
        alpha = networks.scheduler().alphas_cumprod
        self.register_buffer("signal", alpha.sqrt(), persistent=False)
        self.register_buffer("noise", (1 - alpha).sqrt(), persistent=False)
        self.register_buffer("snr", alpha / (1 - alpha), persistent=False)

    def forward(
        self, latents: Tensor, tokens: Tensor, objects: Tensor, t: Tensor, noise: Tensor, mask_padding: Tensor
    ) -> Losses:
        """The loss of a batch.

        Args:
            latents: (b, 4, 16, 16), of unit variance.
            tokens: (b, 32).
            objects: (b, 1, 16, 16), the share of each cell that objects cover.
            t: (b,), timesteps.
            noise: (b, 4, 16, 16).
            mask_padding: bool (b,), whether the end token and the padding are masked out of cross-attention.
        """
        signal_rate, noise_rate = (rate[t][:, None, None, None] for rate in (self.signal, self.noise))
        context = self.text_encoder(tokens).last_hidden_state
        before_eos = (tokens == self.eos).cumsum(dim=1) == 0
        with autocast(latents.device):
            noisy = signal_rate * latents + noise_rate * noise
            attended = before_eos | ~mask_padding[:, None]
            v = self.unet(noisy, t, context, encoder_attention_mask=attended).sample.float()
        error = (v - (signal_rate * noise - noise_rate * latents)).square()
        weight = 1 + OBJECT_WEIGHT * objects
        weighted = (error * weight).mean(dim=(1, 2, 3)) / weight.mean(dim=(1, 2, 3))
        snr = self.snr[t]
        snr_weight = (snr.clamp(max=MAX_SNR) + BASE_WEIGHT) / (snr + 1)
        return {"loss": (weighted * snr_weight).mean(), "error": error.mean()}


class EagerAttention:
    """An attention processor of plain matrix products: on CPUs the fused kernel's backward is slow in bfloat16."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend from (b, m, d) to a context of (b, n, d); the mask, (b, 1, n), is added to the logits."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        b, heads = len(hidden_states), attn.heads
        q, k, v = (
            x.reshape(b, -1, heads, x.shape[2] // heads).transpose(1, 2).flatten(0, 1)
            for x in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        logits = torch.bmm(q * attn.scale, k.transpose(1, 2)).float()
        if attention_mask is not None:
            logits = logits + attention_mask.float().repeat_interleave(heads, dim=0)
        out = torch.bmm(logits.softmax(dim=-1).to(v.dtype), v)
        y: Tensor = attn.to_out[0](out.reshape(b, heads, *out.shape[1:]).transpose(1, 2).flatten(2))
        return y
