"""Predict the visual tokens of hidden patches one after another, in a random order."""

from __future__ import annotations

import math
from typing import ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from synthgen.config import check_range
from synthgen.loader import Batch
from synthgen.methods import Method, StepOutput
from synthgen.methods._hiding import Hiding, coverage, hidden_share, num_visible_patches
from synthgen.methods._processes import gather, world_size
from synthgen.models.codebook import Codebook
from synthgen.models.draws import uniform
from synthgen.models.layers import Block, attend, initialize, patchify, split_heads, take
from synthgen.models.linear import Linear, linear
from synthgen.models.transformers_encoder import encoder_folder, is_tower, load_tower, open_encoder
from synthgen.models.vit import Encoder, EncoderConfig, VisionTransformer

__all__ = ["MaPeT"]

#: Random streams of a sample.
HIDING, ORDER, SAMPLE, START = range(4)

POINTS = 64  # patches per token in k-means, at most

Form = Literal["mapet", "pim", "mim"]


class MaPeT(Method):
    """Masked and permuted vision transformer: predict visual tokens of hidden patches (Baraldi et al., 2025; its code).

    z    = a random order of the patches, for each image and step; the first c are given, the others are targets
    loss = mean over images and over k > c of -log p(v_zk | x_z1, ..., x_z(k-1), M_zk, ..., M_zn)

    x_j is a patch with its position, M_j a learned vector with the position of j, v_j the token of patch j. So each
    target is predicted from the given patches, the targets before it and the positions of those after it: all n
    positions are attended to, as after pretraining. Two streams share their weights: the content stream holds x and M,
    and a query for each target attends to what precedes it and not to the target itself. Keys and values are the
    content's alone; p is computed from the queries.

    v_j is the code nearest to the patch (whitened pixels) or, with ``tokenizer``, to that encoder's feature of it. The
    codes come from k-means on the first batch of all processes, and never change afterwards.

    form "pim" has no M among the keys (permuted, without the positions of later targets), form "mim" predicts all
    targets at once from given patches and all M (masked, as BEiT): each is one of the paper's two ideas alone.

    With ``foreground_share`` above 0, patches under word masks are targets first, as ``mae`` hides them; the targets'
    order stays uniform. That is our own combination; the paper has no masks of words.
    """

    guided: ClassVar = {"foreground_share": 0.5}

    attn_mask: Tensor
    used: Tensor

    def __init__(
        self,
        encoder: VisionTransformer,
        *,
        mask_ratio: float = 0.75,  # share of patches that are targets
        form: Form = "mapet",  # mapet: masked and permuted; pim: permuted only; mim: masked only
        num_tokens: int = 512,  # number of visual tokens
        tokenizer: str = "",  # folder or hub id of a pretrained encoder whose features are clustered; empty: pixels
        foreground_share: float = 0.0,  # share of targets taken from under masks; 0: random targets
        foreground_share_start: float = 0.0,  # the same at the start of the training
    ) -> None:
        super().__init__()
        check_range(ge=2, num_tokens=num_tokens)
        config = encoder.config
        self.num_given = num_visible_patches("mask_ratio", mask_ratio, config.grid**2)
        self.hiding = Hiding(foreground_share, foreground_share_start)
        self.encoder = encoder
        self.tokenizer = load_tokenizer(tokenizer, encoder) if tokenizer else None
        dim = self.tokenizer.config.dim if self.tokenizer else 3 * config.patch_size**2
        self.codebook = Codebook(dim, num_tokens, whiten=self.tokenizer is None)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        nn.init.normal_(self.mask_token, std=0.02)
        self.head = Linear(config.dim, num_tokens)
        initialize(self.head)
        attn_mask = attention_mask(form, 1 + self.num_given, 1 + config.grid**2)
        used = attn_mask.any(0)  # M in pim, and the targets' content in mim, are keys of no token and left out
        rows = torch.cat([used, used.new_ones(len(attn_mask) - len(used))])
        self.register_buffer("used", used.nonzero()[:, 0], persistent=False)
        self.register_buffer("attn_mask", attn_mask[rows][:, used], persistent=False)

    @property
    def uses_masks(self) -> bool:
        """Whether masks guide the choice of targets."""
        return self.hiding.guided

    def train(self, mode: bool = True) -> MaPeT:
        """Set the mode of all but the tokenizer, whose features dropout or drop path would make random."""
        super().train(mode)
        if self.tokenizer is not None:
            self.tokenizer.eval()
        return self

    def forward(self, batch: Batch, progress: float) -> StepOutput:
        """The mean cross-entropy of the targets' tokens, in nats."""
        patches = patchify(batch.images, self.encoder.config.patch_size)  # b n p
        foreground = coverage(batch.masks, self.encoder.config.patch_size)  # b n
        given, targets = self.split(batch.seeds, foreground, progress)
        ids = self.tokens(batch, patches).gather(1, targets)  # b t
        scores = self.head(self.read(patches, given, targets)).float()  # b t k
        loss = F.cross_entropy(scores.flatten(0, 1), ids.flatten())
        counts = scores.new_zeros(scores.shape[2]).index_add_(0, ids.flatten(), scores.new_ones(ids.numel()))
        metrics = {
            "accuracy": (scores.argmax(2) == ids).float().mean(),
            "perplexity": torch.special.entr(counts / ids.numel()).sum().exp(),  # of the tokens of this step
        }
        if self.uses_masks:
            metrics["foreground_hidden"] = hidden_share(foreground, targets)
        return StepOutput(loss, metrics)

    def split(
        self, seeds: Int[Tensor, " b"], foreground: Float[Tensor, "b n"], progress: float
    ) -> tuple[Int[Tensor, "b v"], Int[Tensor, "b t"]]:
        """Indices of the given patches, and of the targets in the order of their prediction."""
        noise = uniform(seeds, foreground.shape[1], stream=HIDING)
        given, targets = self.hiding.split(noise, foreground, self.num_given, progress)
        return given, targets.gather(1, uniform(seeds, targets.shape[1], stream=ORDER).argsort(dim=1))

    @torch.no_grad()
    def tokens(self, batch: Batch, patches: Float[Tensor, "b n p"]) -> Int[Tensor, "b n"]:
        """The visual token of each patch, row by row; the first batch of a training sets the codes."""
        vectors = patches
        if self.tokenizer is not None:
            vectors = self.tokenizer(normalised_for(self.tokenizer.config, self.encoder.config, batch.images))[:, 1:]
        if not self.codebook.fitted():
            b, n = vectors.shape[:2]
            per_image = min(n, math.ceil(POINTS * len(self.codebook.codes) / (b * world_size())))
            indices = uniform(batch.seeds, n, stream=SAMPLE).argsort(dim=1)[:, :per_image]
            noise = uniform(batch.seeds, per_image, stream=START)
            self.codebook.fit(gather(take(vectors, indices)).flatten(0, 1), gather(noise).flatten())
        ids: Tensor = self.codebook(vectors)
        return ids

    def read(
        self, patches: Float[Tensor, "b n p"], given: Int[Tensor, "b v"], targets: Int[Tensor, "b t"]
    ) -> Float[Tensor, "b t d"]:
        """The features of the target queries. Tokens are in the random order, so one mask serves all images."""
        order = torch.cat([given, targets], dim=1)
        query = self.mask_token + self.encoder.pos_embed[0, 1:][targets]
        content = torch.cat([self.encoder.embed(take(patches, order), order), query], dim=1)[:, self.used]
        count = content.shape[1]
        *blocks, last = (cast(Block, block) for block in self.encoder.blocks)
        for block in blocks:
            both = cross_attend(block, torch.cat([content, query], dim=1), content, self.attn_mask)
            content, query = both[:, :count], both[:, count:]
        features: Tensor = self.encoder.norm(cross_attend(last, query, content, self.attn_mask[count:]))
        return features


def attention_mask(form: Form, num_given: int, num_tokens: int) -> Bool[Tensor, "rows columns"]:
    """The paper's attention masks, by rank in the random order: 0 is the class token, below ``num_given`` are given.

    Columns are the content x_0, x_1, ... and M of each target; rows are those and a query for each target. A row
    attends to the content below some rank and to M from that rank on, so to exactly one of the two for each target.
    """
    rank = torch.arange(num_tokens)
    targets = rank[num_given:]
    limit = torch.cat(
        [
            (rank + 1).clamp(min=num_given),  # content: the given patches, and all up to itself
            torch.full_like(targets, num_given),  # M: the given patches
            targets,  # queries: all before themselves
        ]
    )[:, None]
    if form == "mim":
        limit = torch.full_like(limit, num_given)
    of_content, of_masks = rank < limit, targets >= limit
    if form == "pim":
        of_masks = torch.zeros_like(of_masks)
    return torch.cat([of_content, of_masks], dim=1)


def cross_attend(
    block: Block, x: Float[Tensor, "b m d"], content: Float[Tensor, "b n d"], attn_mask: Bool[Tensor, "m n"]
) -> Float[Tensor, "b m d"]:
    """A plain block in which the tokens ``x`` attend to those of ``content`` where ``attn_mask`` is true."""
    d, heads = x.shape[2], block.attn.num_heads
    weight, bias = block.attn.qkv.weight, block.attn.qkv.bias
    q = linear(block.norm1(x), weight[:d], bias[:d])
    k, v = linear(block.norm1(content), weight[d:], bias[d:]).chunk(2, dim=2)
    q, k, v = (split_heads(part, heads) for part in (q, k, v))
    x = x + block.attn.proj(attend(q, k, v, attn_mask[None, None]).transpose(1, 2).flatten(2))
    y: Tensor = x + block.mlp(block.norm2(x))
    return y


def load_tokenizer(name: str, encoder: VisionTransformer) -> Encoder:
    """A frozen pretrained encoder; a model of ``transformers`` is resized to the patch grid of ``encoder``.

    Raises:
        MissingArtifact, MissingWeights: see :func:`encoder_folder`.
        CorruptFile, ConfigError: see :func:`open_encoder`.
        ValueError: its patch grid differs from that of ``encoder``.
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


def normalised_for(
    theirs: EncoderConfig, ours: EncoderConfig, images: Float[Tensor, "b 3 H W"]
) -> Float[Tensor, "b 3 _ _"]:
    """Images normalised for ``ours``, resized and normalised for ``theirs``."""
    if (theirs.image_size, theirs.mean, theirs.std) == (ours.image_size, ours.mean, ours.std):
        return images
    mean, std, other_mean, other_std = (
        images.new_tensor(values)[:, None, None] for values in (ours.mean, ours.std, theirs.mean, theirs.std)
    )
    pixels, size = images * std + mean, theirs.image_size
    if size != images.shape[2]:
        pixels = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    return (pixels - other_mean) / other_std
