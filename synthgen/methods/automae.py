"""Learn which patches to hide, and reconstruct them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.func import functional_call

from synthgen.config import check_range
from synthgen.loader import Batch
from synthgen.methods import Method, StepOutput
from synthgen.methods._ema import update_teacher
from synthgen.methods._hiding import coverage, hidden_share, num_visible_patches
from synthgen.methods._pixels import pixel_decoder, pixel_target
from synthgen.models.draws import uniform
from synthgen.models.layers import Block, patchify, split_heads, take
from synthgen.models.masker import MaskDiscriminator, MaskGenerator
from synthgen.models.vit import VisionTransformer, load_encoder

__all__ = ["AutoMAE"]

#: Random streams of a sample; that of the hiding is the same as in ``mae``.
HIDING, GUMBEL, RECTANGLE, NOISE = range(4)


class AutoMAE(Method):
    """A masked autoencoder with learned masks (AutoMAE: Chen et al., 2023; its code).

    A      = attention of the class token to the patches, each head's, in the scorer's last block, on the whole image
    p      = softmax((log G(A) + gumbel) / temperature)                 G: two convolutions; p: a share for each patch
    s      = u + alpha [p among its k highest]                          u ~ U[0, 1); k: number of visible patches
    visible are the k patches of lowest s; their tokens become x (1 + alpha (p - sg(p)))            sg: no gradient

    pixels = mean over hidden patches of the mean over pixels of (predicted - target)^2             as in ``mae``
    L_G    = mean over images of (D(p) - 1)^2                                                       D's weights held
    L_D    = mean over images of (D(r) - 1)^2 + D(sg(p))^2
    loss   = pixels + adversary_weight L_G + L_D

    The factor of the tokens is 1 and passes the gradient of the pixels' error to G. It is the paper's
    s x + sg(1 - s) x with a straight-through s, of exact value. D learns to separate p from r = softmax(inside / 2 +
    uniform noise), where ``inside`` is 1 in a random rectangle, so G learns to select regions of an object's shape.

    The ``scorer`` is the frozen encoder of the training in that folder. By default it is an EMA of the encoder,
    s <- m s + (1 - m) e after each step, with m from ``momentum`` to 1 by half a cosine.

    With ``prior: masks``, ``inside`` is the share of each patch under the image's own word masks, where they cover half
    a patch or more. That is our own, after Free-ATM; the paper has no masks of words.
    """

    guided: ClassVar = {"prior": "masks"}

    def __init__(
        self,
        encoder: VisionTransformer,
        *,
        scorer: str = "",  # folder of a pretrained encoder, which stays frozen; empty: an EMA of this one
        momentum: float = 0.99,  # initial momentum of the EMA
        mask_ratio: float = 0.75,  # share of hidden patches
        alpha: float = 0.5,  # added to the random score of selected patches; 0: random hiding
        temperature: float = 1.0,  # of the Gumbel softmax; lower is closer to one-hot
        adversary_weight: float = 0.2,  # weight of L_G
        prior: Literal["rectangles", "masks"] = "rectangles",  # the shapes that D takes for real
        norm_pixels: bool = True,  # targets are standardised patches
        decoder_dim: int = 0,  # 0: by the encoder's size
        decoder_depth: int = 0,  # 0: by the encoder's size
    ) -> None:
        super().__init__()
        check_range(ge=0, le=1, momentum=momentum)
        check_range(ge=0, alpha=alpha, adversary_weight=adversary_weight)
        check_range(ge=0.001, temperature=temperature)
        config = encoder.config
        self.num_visible = num_visible_patches("mask_ratio", mask_ratio, config.grid**2)
        self.encoder = encoder
        self.decoder = pixel_decoder(encoder, decoder_dim, decoder_depth)
        self.scorer = (_loaded(scorer, encoder) if scorer else copy.deepcopy(encoder)).requires_grad_(False)
        self.generator = MaskGenerator(self.scorer.config.num_heads)
        self.discriminator = MaskDiscriminator(config.grid)
        self.follows, self.momentum = not scorer, momentum
        self.alpha, self.temperature, self.adversary_weight = alpha, temperature, adversary_weight
        self.prior, self.norm_pixels = prior, norm_pixels

    @property
    def uses_masks(self) -> bool:
        """Whether masks are D's real examples."""
        return self.prior == "masks"

    @property
    def copies(self) -> Mapping[str, str]:
        """A scorer without a folder is an EMA of the encoder."""
        return {"scorer.": "encoder."} if self.follows else {}

    def forward(self, batch: Batch, progress: float) -> StepOutput:
        """The losses of the hidden patches, the generator and the discriminator."""
        patches = patchify(batch.images, self.encoder.config.patch_size)  # b n p
        foreground = coverage(batch.masks, self.encoder.config.patch_size)  # b n
        p = self.sampled_shares(patches, batch.seeds)  # b n
        visible, hidden = self.split(p, batch.seeds)
        predicted = self.decoder(self.encode(patches, visible, p), visible, hidden)  # b h p
        pixels = F.mse_loss(predicted.float(), pixel_target(take(patches, hidden), norm=self.norm_pixels))

        frozen = {name: weight.detach() for name, weight in self.discriminator.named_parameters()}
        of_p: Tensor = functional_call(self.discriminator, frozen, (p,))
        generator = ((of_p - 1) ** 2).mean()
        real, generated = self.discriminator(torch.cat([self.real(batch.seeds, foreground), p.detach()])).chunk(2)
        discriminator = ((real - 1) ** 2 + generated**2).mean()

        metrics = {"pixel_error": pixels, "generator_error": generator, "discriminator_error": discriminator}
        if self.uses_masks:
            metrics["foreground_hidden"] = hidden_share(foreground, hidden)
        loss = pixels + self.adversary_weight * generator + discriminator
        return StepOutput(loss, {name: value.detach() for name, value in metrics.items()})

    @torch.no_grad()
    def attention(self, patches: Float[Tensor, "b n p"]) -> Float[Tensor, "b h n"]:
        """Attention of the class token to the patches of the whole image, per head of the scorer's last block."""
        *blocks, last = cast(list[Block], list(self.scorer.blocks))
        x = self.scorer.embed(patches)
        for block in blocks:
            x = block(x)
        q, k, _ = (split_heads(part, last.attn.num_heads) for part in last.project_qkv(x).chunk(3, dim=2))  # b h t w
        scores = (q[:, :, :1] @ k.transpose(2, 3)).float() * q.shape[3] ** -0.5
        attention: Tensor = scores.softmax(dim=3)
        return attention[:, :, 0, 1:]

    def sampled_shares(self, patches: Float[Tensor, "b n p"], seeds: Int[Tensor, " b"]) -> Float[Tensor, "b n"]:
        """p: a share for each patch, by a Gumbel softmax over the generator's log-probabilities; the sum is 1."""
        log_probabilities: Tensor = self.generator(self.attention(patches))
        gumbel = -(-uniform(seeds, log_probabilities.shape[1], stream=GUMBEL).clamp(min=2.0**-25).log()).log()
        return ((log_probabilities + gumbel) / self.temperature).softmax(dim=1)

    def split(self, p: Float[Tensor, "b n"], seeds: Int[Tensor, " b"]) -> tuple[Int[Tensor, "b v"], Int[Tensor, "b h"]]:
        """Indices of the visible and of the hidden patches."""
        selected = torch.zeros_like(p).scatter(1, p.topk(self.num_visible, dim=1).indices, 1.0)
        order = (uniform(seeds, p.shape[1], stream=HIDING) + self.alpha * selected).argsort(dim=1)
        return order[:, : self.num_visible], order[:, self.num_visible :]

    def encode(
        self, patches: Float[Tensor, "b n p"], visible: Int[Tensor, "b v"], p: Float[Tensor, "b n"]
    ) -> Float[Tensor, "b t d"]:
        """The encoder's tokens of the visible patches, with a gradient to p."""
        x = self.encoder.embed(take(patches, visible), visible)
        of_visible = p.gather(1, visible)
        factor = 1 + self.alpha * (of_visible - of_visible.detach())
        x = torch.cat([x[:, :1], x[:, 1:] * factor[:, :, None]], dim=1)
        for block in self.encoder.blocks:
            x = block(x)
        y: Tensor = self.encoder.norm(x)
        return y

    def real(self, seeds: Int[Tensor, " b"], foreground: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        """r, D's real example: of a rectangle, or with ``prior: masks`` of a foreground of half a patch or more."""
        inside = rectangles(uniform(seeds, 4, stream=RECTANGLE), self.encoder.config.grid).float()
        if self.uses_masks:
            inside = torch.where(foreground.sum(1, keepdim=True) >= 0.5, foreground, inside)
        return (0.5 * inside + uniform(seeds, inside.shape[1], stream=NOISE)).softmax(dim=1)

    def after_step(self, progress: float) -> None:
        """Update the EMA, if the scorer is one."""
        if self.follows:
            update_teacher(self.scorer, self.encoder, self.momentum, progress)


def rectangles(draws: Float[Tensor, "b 4"], grid: int) -> Bool[Tensor, "b n"]:
    """The patches in a random rectangle on the grid; ``draws`` are uniform in [0, 1).

    Its area is 40 to 160 patches of 196 and its width 4 to 10 of 14, as in the paper, scaled to this grid.
    """

    def drawn(column: int, low: int, high: int | Tensor) -> Tensor:  # an integer, both ends included
        return (low + draws[:, column] * (high - low + 1)).floor()

    area = drawn(0, max(1, round(grid**2 * 40 / 196)), round(grid**2 * 160 / 196))
    width = drawn(1, max(1, round(grid * 4 / 14)), round(grid * 10 / 14))
    height = (area / width).ceil().clamp(max=grid)
    top, left = drawn(2, 0, grid - height), drawn(3, 0, grid - width)
    line = torch.arange(grid, device=draws.device)
    rows, columns = (
        (line >= first[:, None]) & (line < (first + size)[:, None]) for first, size in ((top, height), (left, width))
    )
    return (rows[:, :, None] & columns[:, None]).flatten(1)


def _loaded(folder: str, encoder: VisionTransformer) -> VisionTransformer:
    """The scorer in ``folder``.

    Raises:
        ValueError: its image size, patch size or normalisation differs from that of the encoder.
    """
    scorer = load_encoder(folder)
    names = ("image_size", "patch_size", "mean", "std")
    own, wanted = ({name: getattr(one.config, name) for name in names} for one in (scorer, encoder))
    if own != wanted:
        wrong = ", ".join(
            f"{name} {own[name]} instead of {wanted[name]}" for name in names if own[name] != wanted[name]
        )
        raise ValueError(f"the scorer in {folder} has {wrong}; give one with the values of this encoder")
    return scorer
