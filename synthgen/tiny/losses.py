"""The losses of the tiny model: that of the autoencoder, and that of U-Net and text tower."""

import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel

from synthgen.tiny import networks
from synthgen.tiny.loop import Losses

__all__ = ["Autoencoding", "Denoising", "WrittenOutAttention", "halved", "noise_like"]

LAYOUT = 1.0  # added to every noise level's weight: near pure noise, where min(SNR, 5) is 0, objects get their places

OBJECTS = 2.0  # what objects count more than scenes, which fill most of an image of two and are easier


def halved(device: torch.device) -> torch.autocast:
    """Matrix products and convolutions in bfloat16: nearly twice as fast, on CPUs that know it too."""
    return torch.autocast(device.type, torch.bfloat16)


def noise_like(x: Tensor, generator: torch.Generator) -> Tensor:
    """Normal numbers of the shape of ``x`` and on its device, the same on every device."""
    return torch.randn(x.shape, generator=generator).to(x.device)


class Autoencoding(nn.Module):
    """The loss of the autoencoder; latents are kept near unit variance, smooth, and robust to a little noise."""

    noise = 0.05

    def __init__(self, vae: AutoencoderTiny, square: float = 2.0, edge: float = 0.5) -> None:
        """``square`` and ``edge`` are the weights of the squared error and of what is wrong between neighbours."""
        super().__init__()
        self.vae, self.square, self.edge = vae, square, edge

    def forward(self, x: Tensor, generator: torch.Generator) -> Losses:
        """The batch's loss and its parts; ``x`` (b, 3, H, W) in [-1, 1]."""
        with halved(x.device):
            z = self.vae.encode(x).latents.float()
            y = self.vae.decode(z + self.noise * noise_like(z, generator)).sample.float()
        pixel = F.l1_loss(y, x) + self.square * F.mse_loss(y, x)
        edges = sum(F.l1_loss(y.diff(dim=d), x.diff(dim=d)) for d in (2, 3))
        coarse = F.l1_loss(F.avg_pool2d(y, 4), F.avg_pool2d(x, 4))
        deviation, mean = torch.std_mean(z, dim=(0, 2, 3))
        unit = (deviation - 1).square().mean() + mean.square().mean()
        rough = z.diff(dim=2).square().mean() + z.diff(dim=3).square().mean()
        loss = pixel + self.edge * edges + 0.5 * coarse + 0.02 * unit + 0.002 * rough
        return {"loss": loss, "pixel": pixel, "unit": unit, "rough": rough}


class Denoising(nn.Module):
    """The loss of the U-Net and the text tower: v-prediction, weighted by (min(SNR, 5) + LAYOUT) / (SNR + 1).

    Where the objects are it counts 1 + OBJECTS times as much as elsewhere.
    """

    signal: Tensor
    noise: Tensor
    snr: Tensor

    def __init__(self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.text_encoder, self.unet = text_encoder, unet
        self.end: int = text_encoder.config.eos_token_id
        alpha = networks.scheduler().alphas_cumprod
        self.register_buffer("signal", alpha.sqrt(), persistent=False)
        self.register_buffer("noise", (1 - alpha).sqrt(), persistent=False)
        self.register_buffer("snr", alpha / (1 - alpha), persistent=False)

    def forward(
        self, latents: Tensor, tokens: Tensor, objects: Tensor, t: Tensor, noise: Tensor, hidden: Tensor
    ) -> Losses:
        """The batch's loss.

        ``latents`` and ``noise`` (b, 4, 16, 16), the former of unit variance; ``tokens`` (b, 32); ``objects``
        (b, 1, 16, 16), the share of each cell that objects cover; ``t`` (b,) timesteps; ``hidden`` bool (b,), where the
        U-Net sees nothing from the end token on.
        """
        signal_rate, noise_rate = (rate[t][:, None, None, None] for rate in (self.signal, self.noise))
        context = self.text_encoder(tokens).last_hidden_state
        word = (tokens == self.end).cumsum(dim=1) == 0
        with halved(latents.device):
            noised = signal_rate * latents + noise_rate * noise
            v = self.unet(noised, t, context, encoder_attention_mask=word | ~hidden[:, None]).sample.float()
        error = (v - (signal_rate * noise - noise_rate * latents)).square()
        places = 1 + OBJECTS * objects
        weighted = (error * places).mean(dim=(1, 2, 3)) / places.mean(dim=(1, 2, 3))
        snr = self.snr[t]
        weight = (snr.clamp(max=5) + LAYOUT) / (snr + 1)
        return {"loss": (weighted * weight).mean(), "error": error.mean()}


class WrittenOutAttention:
    """Attention in matrix products. On CPUs the fused kernel is slow backward in bfloat16."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """As diffusers calls a processor: (b, m, d) over a context of (b, n, d); the mask is added, (b, 1, n)."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        b, heads = len(hidden_states), attn.heads
        q, k, v = (
            x.reshape(b, -1, heads, x.shape[2] // heads).transpose(1, 2).flatten(0, 1)
            for x in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        scores = torch.bmm(q * attn.scale, k.transpose(1, 2)).float()
        if attention_mask is not None:  # b 1 n
            scores = scores + attention_mask.float().repeat_interleave(heads, dim=0)
        out = torch.bmm(scores.softmax(dim=-1).to(v.dtype), v)
        y: Tensor = attn.to_out[0](out.reshape(b, heads, *out.shape[1:]).transpose(1, 2).flatten(2))
        return y
