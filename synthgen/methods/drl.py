"""Denoise images, given a code of the clean one."""

from __future__ import annotations

import itertools
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from synthgen.augment import Augment
from synthgen.config import check_range
from synthgen.loader import Batch
from synthgen.methods import Method, StepOutput
from synthgen.methods._pixels import to_pixels
from synthgen.models.draws import normal, uniform
from synthgen.models.layers import Modulation, initialize
from synthgen.models.linear import Linear
from synthgen.models.score import LevelEmbedding, ScoreNetwork
from synthgen.models.vit import VisionTransformer

__all__ = ["DRL"]

#: Random streams of a sample.
LEVEL, NOISE, CODE, SAMPLING = range(4)


class DRL(Method):
    """Diffusion-based representation learning: a code of the clean image helps to denoise it (Mittal et al., 2023).

    z       = mu + s * N(0, 1)                (mu, ln s^2) = W h + b,  h = mean of the patch tokens of encoder(x)
    x_sigma = y + sigma noise                 y: the clean image x in ``denoised_size``
    sigma   = sigma_min (sigma_max / sigma_min)^t,  t ~ U[0, 1)
    loss    = mean over pixels and channels of (sigma score(x_sigma, sigma, z) + noise)^2 + 2 penalty / P * R
    R       = KL(N(mu, s^2) | N(0, 1)) = 1/2 sum of (mu^2 + s^2 - ln s^2 - 1)

    P is the number of pixels times channels of y, so ``penalty`` weighs R against half the sum over them, as in the
    paper. Without ``variational``, z = W h + b and R = sum of |z|. The uncertainty of x given x_sigma bounds the loss
    from below; the information in the code lowers that bound, and this alone trains the encoder.

    With ``time_dependent``, h becomes h (1 + scale(sigma)) + shift(sigma) before W: the code of an image is a function
    of the noise level, computed from one h. The encoder is a plain ViT on the clean image either way.

    With ``foreground_weight`` f above 0, pixels under word masks weigh more:

    w_p     = (1 + f c_p) / mean over the image's pixels of (1 + f c)          c_p: share of pixel p of y under any mask

    So every image weighs the same, and one without masks is in the plain form. That is our own; the paper has no masks
    of words.
    """

    guided: ClassVar = {"foreground_weight": 1.0}

    def __init__(
        self,
        encoder: VisionTransformer,
        *,
        code_dim: int = 128,  # dimension of a code
        variational: bool = True,  # a random code with a KL penalty; false: a deterministic one with an L1 penalty
        time_dependent: bool = False,  # the code depends on the noise level too
        penalty: float = 1e-5,  # weight of R against half the sum of squared errors
        sigma_min: float = 0.01,  # least standard deviation of the noise; that of the pixels is about 1
        sigma_max: float = 50.0,  # greatest; equal to sigma_min: one level, and nearly an autoencoder if high
        sigma_law: Literal["log-uniform", "uniform"] = "log-uniform",  # distribution of noise levels
        denoised_size: int = 0,  # side of the noised copy in pixels; 0: the image's own, at most 32
        score_width: int = 16,  # channels of the score network's first level, a multiple of 4
        foreground_weight: float = 0.0,  # f: a pixel under masks has the weight 1 + f
    ) -> None:
        super().__init__()
        config = encoder.config
        check_range(ge=1, code_dim=code_dim)
        check_range(ge=0, penalty=penalty, foreground_weight=foreground_weight)
        if not 1e-6 <= sigma_min <= sigma_max <= 1e6:
            raise ValueError(
                f"sigma_min {sigma_min} must be 1e-6 or more and at most sigma_max {sigma_max}, and that 1e6 or less"
            )
        if denoised_size and not 8 <= denoised_size <= config.image_size:
            raise ValueError(
                f"denoised_size must be 0 or between 8 and the image's {config.image_size} pixels, not {denoised_size}"
            )
        if score_width < 4 or score_width % 4:
            raise ValueError(f"score_width must be a multiple of 4, not {score_width}")
        self.variational, self.penalty, self.foreground_weight = variational, penalty, foreground_weight
        self.sigma_min, self.sigma_max, self.sigma_law = sigma_min, sigma_max, sigma_law
        self.denoised_size = denoised_size or min(32, config.image_size)
        self.encoder = encoder
        self.level = LevelEmbedding(config.dim) if time_dependent else None
        self.change = Modulation(config.dim, parts=2) if time_dependent else None
        self.head = Linear(config.dim, (1 + variational) * code_dim).apply(initialize)
        self.score = ScoreNetwork(self.denoised_size, code_dim=code_dim, width=score_width)

    @property
    def uses_masks(self) -> bool:
        """Whether masks weight the loss."""
        return self.foreground_weight > 0

    def views(self) -> Augment:
        """The paper's code: the whole image (here the largest square in its middle), and a flip."""
        return Augment(size=self.encoder.config.image_size, scale=(1.0, 1.0), ratio=(1.0, 1.0))

    def forward(self, batch: Batch, progress: float) -> StepOutput:
        """The error of the predicted noise, plus the penalty of the codes."""
        sigma = self.sigmas(batch.seeds)
        code, penalty = self.code(self.encoder.features(batch.images), sigma, batch.seeds)
        clean = F.adaptive_avg_pool2d(batch.images, self.denoised_size)
        noise = normal(batch.seeds, *clean.shape[1:], stream=NOISE)
        noised = clean + sigma[:, None, None, None] * noise
        error = self.error(noised, sigma, code, noise)  # b s s
        metrics = {"noise_error": error.detach().mean(), "kl" if self.variational else "l1": penalty.detach().mean()}
        with torch.no_grad():  # how much worse a few images get with each other's codes; 0 if codes are ignored
            few = slice(0, max(2, len(batch) // 8))
            others = self.error(noised[few], sigma[few], code[few].roll(1, 0), noise[few])
            metrics["code_gain"] = others.mean() - error[few].mean()
        if self.uses_masks:
            foreground = F.adaptive_avg_pool2d(batch.masks.any(1).float(), self.denoised_size)
            metrics["foreground_error"] = (error.detach() * foreground).sum() / foreground.sum().clamp(min=1e-6)
            weights = 1 + self.foreground_weight * foreground
            error = error * weights / weights.mean((1, 2), keepdim=True)
        return StepOutput(error.mean() + 2 * self.penalty / clean[0].numel() * penalty.mean(), metrics)

    def sigmas(self, seeds: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        """The noise level of each sample."""
        t = uniform(seeds, stream=LEVEL)
        if self.sigma_law == "uniform":
            return self.sigma_min + (self.sigma_max - self.sigma_min) * t
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** t

    def code(
        self, features: Float[Tensor, "b d"], sigma: Float[Tensor, " b"], seeds: Int[Tensor, " b"] | None = None
    ) -> tuple[Float[Tensor, "b z"], Float[Tensor, " b"]]:
        """The code for a noise level, and its penalty R; a variational code is drawn by ``seeds``, or else the mean."""
        if self.level is not None and self.change is not None:
            shift, scale = self.change(self.level(sigma)).unbind(1)
            features = features * (1 + scale) + shift
        outputs = self.head(features).float()
        if not self.variational:
            return outputs, outputs.abs().sum(1)
        mean, log_variance = outputs.chunk(2, dim=1)
        penalty = (mean**2 + log_variance.exp() - log_variance - 1).sum(1) / 2
        if seeds is not None:
            mean = mean + (log_variance / 2).exp() * normal(seeds, mean.shape[1], stream=CODE)
        return mean, penalty

    def error(
        self,
        noised: Float[Tensor, "b 3 s s"],
        sigma: Float[Tensor, " b"],
        code: Float[Tensor, "b z"],
        noise: Float[Tensor, "b 3 s s"],
    ) -> Float[Tensor, "b s s"]:
        """The squared error of the predicted noise at each pixel, the mean over channels."""
        error: Tensor = ((self.score(noised, sigma, code).float() + noise) ** 2).mean(1)
        return error

    @torch.no_grad()
    def redraw(
        self, images: Float[Tensor, "b 3 H W"], seeds: Int[Tensor, " b"], num_steps: int = 50
    ) -> Float[Tensor, "b 3 s s"]:
        """Images in [0, 1] sampled from noise with the codes of normalised ``images``, to show a code's content.

        Euler steps of the probability flow, dx / dsigma = -sigma score(x, sigma, z), with the codes' means z, over
        noise levels of constant ratio.

        Raises:
            ValueError: num_steps is below 1.
        """
        check_range(ge=1, num_steps=num_steps)
        device = self.encoder.cls_token.device
        features = self.encoder.features(images.to(device))
        t = torch.arange(num_steps, 0, -1, device=device) / num_steps
        levels = self.sigma_min * (self.sigma_max / self.sigma_min) ** t
        x = self.sigma_max * normal(seeds.to(device), 3, self.denoised_size, self.denoised_size, stream=SAMPLING)
        for now, after in itertools.pairwise([*levels, torch.zeros((), device=device)]):
            sigma = now.expand(len(images))
            code, _ = self.code(features, sigma)
            x = x + (now - after) * self.score(x, sigma, code)
        return to_pixels(x, self.encoder.config)
