"""Predict the tokens of hidden patches one after another, in an order drawn by lot."""

from __future__ import annotations

import math
from typing import ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from synthgen.loader import Batch
from synthgen.methods import Method, StepOutput
from synthgen.methods._hiding import Hiding, coverage, num_visible_patches
from synthgen.methods._processes import gather, world_size
from synthgen.models.codebook import Codebook
from synthgen.models.draws import uniform
from synthgen.models.layers import Block, attend, initialize, patchify, take
from synthgen.models.tower import encoder_folder, is_tower, load_tower, open_encoder
from synthgen.models.vit import Encoder, EncoderConfig, VisionTransformer

__all__ = ["MaPeT"]

#: Streams of a sample's draws.
LOT, ORDER, SAMPLE, START = range(4)

POINTS = 64  # patches for each token, at most, that the codebook is found from

Form = Literal["mapet", "pim", "mim"]


class MaPeT(Method):
    """Masked and permuted vision transformer: say the visual tokens of hidden patches (Baraldi et al., 2025; its code).

    z    = an order of the patches by lot, anew for each image and step; the first c are given, the others targets
    loss = mean over images and over k > c of -log p(v_zk | x_z1, ..., x_z(k-1), M_zk, ..., M_zn)

    x_j is a patch with its position, M_j a learned vector with the position of j, v_j the token of patch j. So each
    target is said from the given patches, the targets before it and the places of those to come: all n places are seen,
    as after pretraining. Two streams with the same weights: content holds x and M, a query for each target knows what
    came before it and not the target itself. Keys and values are the content's alone; p is read from the queries.

    v_j is the nearest code to the patch (pixels, whitened) or, with ``tokenizer``, to what that encoder says of it. The
    codes are found by k-means from the first batch, of all processes, and never change afterwards.

    form "pim" has no M among the keys (permuted, unaware of places to come), form "mim" all targets at once from given
    patches and all M (masked, as BEiT): the two ideas of the paper, each by itself.

    With ``foreground_share`` above 0, patches under word masks are targets first, as ``mae`` hides them; the targets'
    order stays even. That is our own combination; the paper has no masks of words.
    """

    guided: ClassVar = {"foreground_share": 0.5}

    seen: Tensor
    kept: Tensor

    def __init__(
        self,
        encoder: VisionTransformer,
        *,
        mask_ratio: float = 0.75,  # share of the patches that are targets
        form: Form = "mapet",  # masked and permuted; pim: permuted only; mim: masked only
        num_tokens: int = 512,  # visual tokens there are
        tokenizer: str = "",  # folder or hub id of a pretrained encoder whose features are told apart; empty: pixels
        foreground_share: float = 0.0,  # of the targets, those from under masks; 0: chance alone
        foreground_share_start: float = 0.0,  # the same at the training's beginning
    ) -> None:
        super().__init__()
        if num_tokens < 2:
            raise ValueError(f"num_tokens must be 2 or more, or there is nothing to tell apart, not {num_tokens}")
        config = encoder.config
        self.num_given = num_visible_patches("mask_ratio", mask_ratio, config.grid**2)
        self.hiding = Hiding(foreground_share, foreground_share_start)
        self.encoder = encoder
        self.tokenizer = load_tokenizer(tokenizer, encoder) if tokenizer else None
        dim = self.tokenizer.config.dim if self.tokenizer else 3 * config.patch_size**2
        self.codebook = Codebook(dim, num_tokens, whiten=self.tokenizer is None)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        nn.init.normal_(self.mask_token, std=0.02)
        self.head = nn.Linear(config.dim, num_tokens)
        initialize(self.head)
        seen = who_sees_whom(form, 1 + self.num_given, 1 + config.grid**2)
        kept = seen.any(0)  # nobody looks at M in pim, nor at the targets' content in mim: they are left out
        rows = torch.cat([kept, kept.new_ones(len(seen) - len(kept))])
        self.register_buffer("kept", kept.nonzero()[:, 0], persistent=False)
        self.register_buffer("seen", seen[rows][:, kept], persistent=False)

    @property
    def uses_masks(self) -> bool:
        """Masks matter where they guide which patches are targets."""
        return self.hiding.guided

    def train(self, mode: bool = True) -> MaPeT:
        """As of any module, but for the tokenizer: dropout or drop path in it would make what it says a draw."""
        super().train(mode)
        if self.tokenizer is not None:
            self.tokenizer.eval()
        return self

    def forward(self, batch: Batch, progress: float) -> StepOutput:
        """How surprising the targets' tokens are, in nats."""
        patches = patchify(batch.images, self.encoder.config.patch_size)  # b n p
        foreground = coverage(batch.masks, self.encoder.config.patch_size)  # b n
        given, targets = self.split(batch.seeds, foreground, progress)
        ids = self.tokens(batch, patches).gather(1, targets)  # b t
        scores = self.head(self.read(patches, given, targets)).float()  # b t k
        loss = F.cross_entropy(scores.flatten(0, 1), ids.flatten())
        used = (
            scores.new_zeros(scores.shape[2]).index_add_(0, ids.flatten(), scores.new_ones(ids.numel())) / ids.numel()
        )
        metrics = {
            "accuracy": (scores.argmax(2) == ids).float().mean(),
            "perplexity": torch.special.entr(used).sum().exp(),  # tokens in even use would have the same entropy
        }
        if self.uses_masks:
            metrics["foreground_hidden"] = foreground.gather(1, targets).sum() / foreground.sum().clamp(min=1e-6)
        return StepOutput(loss, metrics)

    def split(
        self, seeds: Int[Tensor, " b"], foreground: Float[Tensor, "b n"], progress: float
    ) -> tuple[Int[Tensor, "b v"], Int[Tensor, "b t"]]:
        """Which patches are given, and the targets in the order in which they are said."""
        lot = uniform(seeds, foreground.shape[1], stream=LOT)
        given, targets = self.hiding.split(lot, foreground, self.num_given, progress)
        return given, targets.gather(1, uniform(seeds, targets.shape[1], stream=ORDER).argsort(dim=1))

    @torch.no_grad()
    def tokens(self, batch: Batch, patches: Float[Tensor, "b n p"]) -> Int[Tensor, "b n"]:
        """The visual token of each patch, row by row. The first batch ever decides what they are."""
        vectors = patches
        if self.tokenizer is not None:
            vectors = self.tokenizer(as_seen_by(self.tokenizer.config, self.encoder.config, batch.images))[:, 1:]
        if not self.codebook.fitted():
            b, n = vectors.shape[:2]
            each = min(n, math.ceil(POINTS * len(self.codebook.codes) / (b * world_size())))
            places = uniform(batch.seeds, n, stream=SAMPLE).argsort(dim=1)[:, :each]
            lot = uniform(batch.seeds, each, stream=START)
            self.codebook.fit(gather(take(vectors, places)).flatten(0, 1), gather(lot).flatten())
        ids: Tensor = self.codebook(vectors)
        return ids

    def read(
        self, patches: Float[Tensor, "b n p"], given: Int[Tensor, "b v"], targets: Int[Tensor, "b t"]
    ) -> Float[Tensor, "b t d"]:
        """What the queries say of the targets. Tokens lie in the order drawn, so that who sees whom never changes."""
        order = torch.cat([given, targets], dim=1)
        query = self.mask_token + self.encoder.pos_embed[0, 1:][targets]
        content = torch.cat([self.encoder.embed(take(patches, order), order), query], dim=1)[:, self.kept]
        count = content.shape[1]
        *blocks, last = (cast(Block, block) for block in self.encoder.blocks)
        for block in blocks:
            both = look(block, torch.cat([content, query], dim=1), content, self.seen)
            content, query = both[:, :count], both[:, count:]
        said: Tensor = self.encoder.norm(look(last, query, content, self.seen[count:]))
        return said


def who_sees_whom(form: Form, num_given: int, num_tokens: int) -> Bool[Tensor, "rows columns"]:
    """The paper's masks, by rank in the order drawn: the class token has 0, given are those below ``num_given``.

    Columns are the content x_0, x_1, ... and M of each target; rows are those and a query for each target. A row knows
    the content up to a rank, and M from there on: of each target one or the other, so as many as there are tokens.
    """
    rank = torch.arange(num_tokens)
    targets = rank[num_given:]
    known = torch.cat(
        [
            (rank + 1).clamp(min=num_given),  # content: what is given, and up to itself
            torch.full_like(targets, num_given),  # M: what is given
            targets,  # queries: what came before
        ]
    )[:, None]
    if form == "mim":
        known = torch.full_like(known, num_given)
    of_content, of_masks = rank < known, targets >= known
    if form == "pim":
        of_masks = torch.zeros_like(of_masks)
    return torch.cat([of_content, of_masks], dim=1)


def look(
    block: Block, x: Float[Tensor, "b m d"], content: Float[Tensor, "b n d"], seen: Bool[Tensor, "m n"]
) -> Float[Tensor, "b m d"]:
    """A plain block in which tokens ``x`` look at those of ``content`` that they may see."""
    d, heads = x.shape[2], block.attn.num_heads
    weight, bias = block.attn.qkv.weight, block.attn.qkv.bias
    q = F.linear(block.norm1(x), weight[:d], bias[:d])
    k, v = F.linear(block.norm1(content), weight[d:], bias[d:]).chunk(2, dim=2)
    q, k, v = (part.view(*part.shape[:2], heads, -1).transpose(1, 2) for part in (q, k, v))
    x = x + block.attn.proj(attend(q, k, v, seen[None, None]).transpose(1, 2).flatten(2))
    y: Tensor = x + block.mlp(block.norm2(x))
    return y


def load_tokenizer(name: str, encoder: VisionTransformer) -> Encoder:
    """A pretrained encoder, which learns no more. One of ``transformers`` is set to as many patches as ``encoder`` has.

    Raises:
        MissingArtifact, MissingWeights: as for :func:`encoder_folder`.
        CorruptFile, ConfigError: as for :func:`open_encoder`.
        ValueError: it does not see as many patches as ``encoder``.
    """
    folder, ours = encoder_folder(name), encoder.config
    tokenizer = load_tower(folder, ours.grid) if is_tower(folder) else open_encoder(folder)
    theirs = tokenizer.config
    if theirs.grid != ours.grid:
        raise ValueError(
            f"tokenizer {name} sees {theirs.image_size} pixels in patches of {theirs.patch_size}, and the encoder "
            f"{ours.image_size} in patches of {ours.patch_size}; both must have as many patches"
        )
    return tokenizer.requires_grad_(False)


def as_seen_by(
    theirs: EncoderConfig, ours: EncoderConfig, images: Float[Tensor, "b 3 H W"]
) -> Float[Tensor, "b 3 _ _"]:
    """Images that are normalised for one encoder, resized and normalised for another."""
    if (theirs.image_size, theirs.mean, theirs.std) == (ours.image_size, ours.mean, ours.std):
        return images
    mean, std, other_mean, other_std = (
        images.new_tensor(values)[:, None, None] for values in (ours.mean, ours.std, theirs.mean, theirs.std)
    )
    pixels, size = images * std + mean, theirs.image_size
    if size != images.shape[2]:
        pixels = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    return (pixels - other_mean) / other_std
