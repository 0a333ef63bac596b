"""Record attention while a diffusion model runs, without changing what it computes.

Every attention layer keeps its own processor, which is called as before: the image is bit-identical with and without
recording. The queries and keys that the layer passes to PyTorch's attention are intercepted. For the conditional half
of the batch the softmax is evaluated at the wanted words' keys only, exactly, with the rows' log-sum-exp that the fused
kernel computes anyway; it is averaged over heads and added immediately, in place, to a few small accumulators on the
device. Memory does not grow with the number of steps, and nothing is copied to the host before the image is finished.

Two kinds of layers: in a U-Net, image queries attend to text keys (cross-attention) or image keys (self-attention); in
a diffusion transformer, text and image form one sequence, in which image rows and text columns are the cross-attention,
and image rows and columns the self-attention, each as a part of the whole row's softmax.

The mean over heads, layers and timesteps follows DAAM (Tang et al., 2023) and Free-ATM, which reportedly compiles
maps "across layers and timesteps"; which layers, and that grids weigh equally, is our choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from synthgen.attention.kernel import attention_with_lse, logsumexp_of
from synthgen.records import AFFINITY_OFFSETS

__all__ = ["AttentionCall", "Recorder", "record"]

Size = tuple[int, int]


@dataclass(frozen=True)
class AttentionCall:
    """The inputs of one call of an attention layer: both halves of a guided batch, all heads."""

    query: Float[Tensor, "b h n d"]
    key: Float[Tensor, "b h k d"]
    lse: Float[Tensor, "b h n"] | None  # of each row's softmax; None: not computed yet
    scale: float
    mask: Tensor | None = None  # added to the logits, or bool: keys that take part; broadcasts over b h n k

    def conditional(self) -> AttentionCall:
        """The second half of the batch, which is the conditional one."""
        mask = self.mask
        if mask is not None and mask.dim() == 4 and len(mask) > 1:
            mask = mask.chunk(2)[1]
        lse = None if self.lse is None else self.lse.chunk(2)[1]
        return AttentionCall(self.query.chunk(2)[1], self.key.chunk(2)[1], lse, self.scale, mask)

    def normalised(self) -> AttentionCall:
        """With the log-sum-exp, in float32."""
        if self.lse is not None:
            return self
        lse = logsumexp_of(self.query, self.key, scale=self.scale, mask=self.mask)
        return AttentionCall(self.query, self.key, lse, self.scale, self.mask)


@dataclass
class Recorder:
    """Sums of attention over layers and steps, one accumulator per grid.

    Args:
        latent_size: rows and columns of the finest token grid: the latent of a U-Net, the patches of a transformer.
        tokens: for each image of the batch, for each word, the positions of its tokens in the text.
        uses_cfg: whether the batch starts with an unconditional half. Called while recording, so that the pipeline's
            own flag decides, not the batch size.
        cross_levels: the factors, against the latent, of the grids whose cross-attention counts.
        self_level: the factor of the grid whose self-attention is kept.
        text: position of the text in the sequence of a transformer, before or after the image.
        paused: called at every layer of every step; while it returns True nothing is added.
    """

    latent_size: Size
    tokens: Sequence[Sequence[Sequence[int]]]
    uses_cfg: Callable[[], bool]
    cross_levels: tuple[int, ...]
    self_level: int = 1
    text: Literal["first", "last"] = "first"
    paused: Callable[[], bool] = lambda: False
    _cross: dict[Size, Tensor] = field(default_factory=dict, init=False)
    _self: Tensor | None = field(default=None, init=False)
    _counts: dict[Size | str, int] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._cross_sizes = {rows * columns: (rows, columns) for rows, columns in map(self.grid, self.cross_levels)}
        self._num_words = max((len(words) for words in self.tokens), default=0)
        self._columns: tuple[Tensor, Tensor] | None = None  # the result of ``_wanted``, on the device

    def grid(self, level: int) -> Size:
        """Rows and columns of the latent after ``log2(level)`` halvings; each rounds up, as a strided convolution."""
        rows, columns = self.latent_size
        while level > 1:
            rows, columns, level = -(-rows // 2), -(-columns // 2), level // 2
        return rows, columns

    # -- while the model runs

    def cross_attention(self, call: AttentionCall) -> None:
        """Add one cross-attention layer at one step: image rows, text columns."""
        size = self._cross_sizes.get(call.query.shape[2])
        if size is not None and self._num_words:
            call = self._conditional(call).normalised()
            self._add_words(size, call, slice(None), first_key=0)

    def self_attention(self, call: AttentionCall) -> None:
        """Add one self-attention layer at one step: only the edges of ``AFFINITY_OFFSETS`` are kept."""
        rows, columns = self.grid(self.self_level)
        if call.query.shape[2] == rows * columns:
            call = self._conditional(call).normalised()
            self._add_edges(call, slice(None))

    def joint_attention(self, call: AttentionCall) -> None:
        """Add one layer over text and image together (or over the image alone) at one step."""
        rows, columns = self.latent_size
        num_pixels, num_all = rows * columns, call.query.shape[2]
        if num_all < num_pixels:
            return
        call = self._conditional(call).normalised()
        start = num_all - num_pixels if self.text == "first" else 0
        image = slice(start, start + num_pixels)
        self._add_edges(call, image)
        if num_all > num_pixels and self._num_words:
            self._add_words((rows, columns), call, image, first_key=0 if self.text == "first" else num_pixels)

    def _conditional(self, call: AttentionCall) -> AttentionCall:
        return call.conditional() if self.uses_cfg() else call

    def _add_words(self, size: Size, call: AttentionCall, image: slice, *, first_key: int) -> None:
        """exp(scale q · k - L) in the rows ``image`` at the words' keys, mean over heads, mean over a word's tokens."""
        assert call.lse is not None
        query, lse = call.query[:, :, image], call.lse[:, :, image]
        if self._columns is None:
            self._columns = self._wanted(query.device)
        places, weights = self._columns  # b t and b words t
        wanted = (places + first_key)[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
        keys = torch.gather(call.key, 2, wanted).float()
        logits = keys @ (query.float() * call.scale).transpose(-1, -2)  # b h t n
        if call.mask is not None:
            logits = logits + self._mask_at(call.mask, places + first_key, logits)
        probabilities = torch.exp(logits - lse[:, :, None]).mean(dim=1)
        maps = weights @ probabilities
        if size in self._cross:
            self._cross[size] += maps
        else:
            self._cross[size] = maps
        self._counts[size] = self._counts.get(size, 0) + 1

    @staticmethod
    def _mask_at(mask: Tensor, places: Tensor, logits: Tensor) -> Tensor:
        """What a mask adds to the logits (b h t n) at some keys; it must be the same for all rows and heads."""
        row = mask[(None,) * (4 - mask.dim())][:, 0, 0].expand(len(places), -1)  # b k
        if row.dtype == torch.bool:
            row = torch.zeros_like(row, dtype=logits.dtype).masked_fill(~row, float("-inf"))
        return torch.gather(row, 1, places)[:, None, :, None].to(logits.dtype)

    def _add_edges(self, call: AttentionCall, image: slice) -> None:
        """For each edge the mean probability of its two directions, in multiples of uniform attention."""
        assert call.lse is not None
        rows, columns = self.grid(self.self_level)
        b, heads, _, d = call.query.shape
        q = (call.query[:, :, image].float() * call.scale).reshape(b, heads, rows, columns, d)
        k = call.key[:, :, image].float().reshape(b, heads, rows, columns, d)
        lse = call.lse[:, :, image].reshape(b, heads, rows, columns)
        if self._self is None:
            self._self = q.new_zeros((len(q), len(AFFINITY_OFFSETS), rows, columns))
        for edge, (down, right) in enumerate(AFFINITY_OFFSETS):
            if down >= rows or abs(right) >= columns:
                continue
            here = slice(0, rows - down), slice(max(0, -right), min(columns, columns - right))
            there = slice(down, rows), slice(max(0, right), columns + min(0, right))
            forth = ((q[:, :, *here] * k[:, :, *there]).sum(-1) - lse[:, :, *here]).exp()
            back = ((q[:, :, *there] * k[:, :, *here]).sum(-1) - lse[:, :, *there]).exp()
            self._self[:, edge, *here] += (forth + back).mean(dim=1) * (0.5 * rows * columns)
        self._counts["self"] = self._counts.get("self", 0) + 1

    def _wanted(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The positions of all words' tokens (b t), padded with 0, and the share of each in each word (b words t)."""
        flat = [[position for positions in words for position in positions] for words in self.tokens]
        most = max(map(len, flat))
        places = torch.tensor([row + [0] * (most - len(row)) for row in flat], dtype=torch.long)
        weights = torch.zeros(len(self.tokens), self._num_words, most)
        for image, words in enumerate(self.tokens):
            column = 0
            for word, positions in enumerate(words):
                weights[image, word, column : column + len(positions)] = 1 / max(1, len(positions))
                column += len(positions)
        return places.to(device), weights.to(device)

    # -- when the images are finished

    def weights(self) -> list[Float[np.ndarray, "words h w"]]:
        """For each image its words' mean cross-attention probability, on the grid of the self-attention.

        Raises:
            RuntimeError: no recorded layer has a wanted grid.
        """
        rows, columns = self.grid(self.self_level)
        if not self._num_words:
            return [np.zeros((0, rows, columns), np.float16) for _ in self.tokens]
        means = []
        for level in self.cross_levels:
            size = self.grid(level)
            if size not in self._cross:
                raise RuntimeError(
                    f"no recorded layer has cross-attention on a {size[0]} x {size[1]} grid (level {level})"
                )
            mean = (self._cross[size] / self._counts[size]).reshape(*self._cross[size].shape[:2], *size)
            means.append(F.interpolate(mean, (rows, columns), mode="bilinear", align_corners=False))
        merged = torch.stack(means).mean(0).to(torch.float16).cpu().numpy()
        return [merged[image, : len(words)] for image, words in enumerate(self.tokens)]

    def affinity(self) -> list[Float[np.ndarray, "edges h w"]]:
        """For each image its mean self-attention along ``AFFINITY_OFFSETS``, in multiples of uniform attention.

        Raises:
            RuntimeError: no recorded layer has the wanted grid.
        """
        if self._self is None:
            rows, columns = self.grid(self.self_level)
            raise RuntimeError(f"no recorded layer has self-attention on a {rows} x {columns} grid")
        mean = self._self / self._counts["self"]
        merged = mean.clamp(max=torch.finfo(torch.float16).max).to(torch.float16).cpu().numpy()
        return list(merged)


class _Tap(TorchFunctionMode):
    """While active, passes the arguments of PyTorch's attention to ``observe``; the output is unchanged."""

    def __init__(self, observe: Callable[[AttentionCall], None]) -> None:
        super().__init__()
        self.observe, self.seen = observe, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.seen = True
        return self._attention(*args, **(kwargs or {}))

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if is_causal or enable_gqa:
            raise RuntimeError("attention that is causal, or grouped by queries, cannot be recorded")
        output, lse = attention_with_lse(query, key, value, attn_mask, dropout_p, scale=scale)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        self.observe(AttentionCall(query, key, lse, scale, attn_mask))
        return output


class _Recording:
    """An attention processor that calls ``inner`` and passes its attention calls to the recorder."""

    def __init__(self, inner: Any, recorder: Recorder, *, joint: bool) -> None:
        self.inner, self.recorder, self.joint, self.run = inner, recorder, joint, _uncompiled()

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        return self.run(self, attn, hidden_states, encoder_hidden_states, attention_mask, *args, **kwargs)

    def call_inner(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        attention_mask: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        arguments = (attn, hidden_states, encoder_hidden_states, attention_mask, *args)
        recorder = self.recorder
        if recorder.paused():
            return self.inner(*arguments, **kwargs)
        cross = encoder_hidden_states is not None
        unet = recorder.cross_attention if cross else recorder.self_attention
        observe = recorder.joint_attention if self.joint else unet
        with _Tap(observe) as tap:
            output = self.inner(*arguments, **kwargs)
        if not tap.seen:
            if self.joint:
                raise RuntimeError(
                    f"{type(self.inner).__name__} does not call PyTorch's attention, so there is nothing to record"
                )
            text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            observe(projected(attn, hidden_states, text))
        return output


@cache
def _uncompiled() -> Callable[..., Any]:
    """The call of a recording processor, excluded from compilation of the network.

    Created at the first recording, because it imports the compiler; and only once, to avoid recompilation.
    """
    wrapped: Callable[..., Any] = torch.compiler.disable(_Recording.call_inner)  # type: ignore[no-untyped-call]
    return wrapped


def projected(layer: Any, queries_from: Float[Tensor, "b n c"], keys_from: Float[Tensor, "b k e"]) -> AttentionCall:
    """The queries and keys of a U-Net's attention layer, projected again, for processors that do not expose them.

    These are sliced attention and xFormers. ``layer`` must have no norms before its projections, as in the transformer
    blocks of every U-Net.
    """
    query, key = (
        project(x).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
        for project, x in ((layer.to_q, queries_from), (layer.to_k, keys_from))
    )
    return AttentionCall(query, key, None, layer.scale)


@contextmanager
def record(network: Any, recorder: Recorder, layers: tuple[str, ...] = ("",)) -> Iterator[Recorder]:
    """Within this context ``recorder`` records attention layers of ``network``; on exit its processors are restored.

    ``network`` is the U-Net or the transformer of a pipeline. ``layers`` are beginnings of the names of its attention
    processors, such as ``up_blocks`` or ``transformer_blocks.``; all other layers keep their own processor.
    """
    before = dict(network.attn_processors)
    joint = not hasattr(network, "up_blocks")
    recorded = {
        name: _Recording(inner, recorder, joint=joint) for name, inner in before.items() if name.startswith(layers)
    }
    network.set_attn_processor({**before, **recorded})
    try:
        yield recorder
    finally:
        network.set_attn_processor(before)
