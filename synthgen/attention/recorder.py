"""Record attention while a U-Net runs, without touching what it computes.

Every attention layer keeps its own processor, which is called as before: the image is bit-identical with and without
recording. Beside it the layer's queries and keys are projected once more for the conditional half of the batch, and
their softmax is averaged over heads and added, at once and in place, to a few small accumulators on the device.
Memory does not grow with the number of steps, and nothing is copied to the host before the image is done.

The mean over heads, layers and timesteps follows DAAM (Tang et al., 2023) and Free-ATM, which reportedly compiles
maps "across layers and timesteps"; which layers, and that grids weigh equally, is our choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from synthgen.records import AFFINITY_OFFSETS

__all__ = ["Recorder", "attention_probabilities", "record"]

Size = tuple[int, int]


def attention_probabilities(
    layer: nn.Module, queries_from: Float[Tensor, "b n c"], keys_from: Float[Tensor, "b k d"]
) -> Float[Tensor, "b n k"]:
    """The softmax of one attention layer, in float32, averaged over its heads; each row sums to 1.

    ``layer`` is a ``diffusers`` ``Attention`` without group or query norms before its projections, as in the
    transformer blocks of every U-Net.
    """
    heads: int = layer.heads  # type: ignore[assignment]
    queries = layer.to_q(queries_from).unflatten(-1, (heads, -1)).transpose(1, 2).float()  # type: ignore[operator]
    keys = layer.to_k(keys_from).unflatten(-1, (heads, -1)).transpose(1, 2).float()  # type: ignore[operator]
    logits = queries @ (keys.transpose(-1, -2) * layer.scale)  # b heads n k
    probabilities: Tensor = logits.softmax(dim=-1).mean(dim=1)
    return probabilities


@dataclass
class Recorder:
    """Sums of attention over layers and steps, one accumulator a grid.

    Args:
        latent_size: rows and columns of the latent.
        tokens: for each image of the batch, for each word, the positions of its tokens.
        guided: whether the batch holds an unconditional half first. Asked while recording, so that it is the
            pipeline's own flag that counts and not the batch's size.
        cross_levels: the factors, against the latent, of the grids whose cross-attention counts.
        self_level: the factor of the grid whose self-attention is kept.
        paused: while True nothing is added.
    """

    latent_size: Size
    tokens: Sequence[Sequence[Sequence[int]]]
    guided: Callable[[], bool]
    cross_levels: tuple[int, ...] = (1, 2)
    self_level: int = 1
    paused: bool = False  # steps at which nothing is added
    _cross: dict[Size, Tensor] = field(default_factory=dict)
    _self: Tensor | None = None
    _counts: dict[Size | str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._cross_sizes = {rows * columns: (rows, columns) for rows, columns in map(self.grid, self.cross_levels)}
        self._num_words = max((len(words) for words in self.tokens), default=0)
        self._mean_of_tokens: Tensor | None = None
        self._edges: tuple[Tensor, Tensor, Tensor] | None = None

    def grid(self, level: int) -> Size:
        """Rows and columns of the latent after ``log2(level)`` halvings; each rounds up, as a strided convolution."""
        rows, columns = self.latent_size
        while level > 1:
            rows, columns, level = -(-rows // 2), -(-columns // 2), level // 2
        return rows, columns

    # -- while the model runs

    def cross(self, layer: nn.Module, hidden: Float[Tensor, "b n c"], text: Float[Tensor, "b k d"]) -> None:
        """Add one cross-attention layer at one step."""
        size = self._cross_sizes.get(hidden.shape[1])
        if size is None or not self._num_words:
            return
        probabilities = attention_probabilities(layer, self._conditional(hidden), self._conditional(text))
        if self._mean_of_tokens is None:
            self._mean_of_tokens = self._token_weights(probabilities.shape[-1]).to(probabilities.device)
        maps = self._mean_of_tokens @ probabilities.transpose(1, 2)  # b words n
        self._add(size, maps)

    def self_attention(self, layer: nn.Module, hidden: Float[Tensor, "b n c"]) -> None:
        """Add one self-attention layer at one step: only the edges of ``AFFINITY_OFFSETS`` are kept."""
        rows, columns = self.grid(self.self_level)
        if hidden.shape[1] != rows * columns:
            return
        hidden = self._conditional(hidden)
        if self._edges is None:
            self._edges = self._edge_index(rows, columns, hidden.device)
        here, there, inside = self._edges
        for image, one in enumerate(hidden):  # one at a time: heads x n x n is the largest thing here
            probabilities = attention_probabilities(layer, one[None], one[None])[0]
            both = (probabilities[here, there] + probabilities[there, here]) * (0.5 * rows * columns)  # edges n
            if self._self is None:
                self._self = hidden.new_zeros((len(hidden), *here.shape), dtype=torch.float32)
            self._self[image] += both * inside
        self._counts["self"] = self._counts.get("self", 0) + 1

    def _conditional(self, tensor: Tensor) -> Tensor:
        return tensor.chunk(2)[1] if self.guided() else tensor

    def _add(self, size: Size, maps: Tensor) -> None:
        if size in self._cross:
            self._cross[size] += maps
        else:
            self._cross[size] = maps
        self._counts[size] = self._counts.get(size, 0) + 1

    def _token_weights(self, num_tokens: int) -> Float[Tensor, "b words k"]:
        weights = torch.zeros(len(self.tokens), self._num_words, num_tokens)
        for image, words in enumerate(self.tokens):
            for word, positions in enumerate(words):
                if positions:
                    weights[image, word, list(positions)] = 1 / len(positions)
        return weights

    @staticmethod
    def _edge_index(
        rows: int, columns: int, device: torch.device
    ) -> tuple[Int[Tensor, "edges n"], Int[Tensor, "edges n"], Float[Tensor, "edges n"]]:
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        here = (y * columns + x).flatten()
        there, inside = [], []
        for down, right in AFFINITY_OFFSETS:
            valid = (y + down >= 0) & (y + down < rows) & (x + right >= 0) & (x + right < columns)
            there.append(torch.where(valid.flatten(), here + down * columns + right, here))
            inside.append(valid.flatten())
        return (
            here.expand(len(there), -1).to(device),
            torch.stack(there).to(device),
            torch.stack(inside).float().to(device),
        )

    # -- when the images are done

    def weights(self) -> list[Float[np.ndarray, "words h w"]]:
        """For each image its words' mean cross-attention probability, on the largest of the recorded grids.

        Raises:
            RuntimeError: a wanted grid had no attention layer.
        """
        rows, columns = self.grid(min(self.cross_levels))
        if not self._num_words:
            return [np.zeros((0, rows, columns), np.float16) for _ in self.tokens]
        means = []
        for level in self.cross_levels:
            size = self.grid(level)
            if size not in self._cross:
                raise RuntimeError(f"the model has no cross-attention on a {size[0]} x {size[1]} grid (level {level})")
            mean = (self._cross[size] / self._counts[size]).reshape(*self._cross[size].shape[:2], *size)
            means.append(F.interpolate(mean, (rows, columns), mode="bilinear", align_corners=False))
        merged = torch.stack(means).mean(0).to(torch.float16).cpu().numpy()
        return [merged[image, : len(words)] for image, words in enumerate(self.tokens)]

    def affinity(self) -> list[Float[np.ndarray, "edges h w"]]:
        """For each image its mean self-attention along ``AFFINITY_OFFSETS``, in multiples of uniform attention.

        Raises:
            RuntimeError: the wanted grid had no attention layer.
        """
        if self._self is None:
            raise RuntimeError(f"the model has no self-attention on the grid {self.grid(self.self_level)}")
        mean = (self._self / self._counts["self"]).reshape(*self._self.shape[:2], *self.grid(self.self_level))
        merged = mean.clamp(max=torch.finfo(torch.float16).max).to(torch.float16).cpu().numpy()
        return list(merged)


class _Recording:
    """An attention processor that does what ``inner`` does, and lets the recorder look on."""

    def __init__(self, inner: Any, recorder: Recorder) -> None:
        self.inner, self.recorder = inner, recorder

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        if self.recorder.paused:
            pass
        elif encoder_hidden_states is None:
            self.recorder.self_attention(attn, hidden_states)
        else:
            self.recorder.cross(attn, hidden_states, encoder_hidden_states)
        output: Tensor = self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, *args, **kwargs)
        return output


@contextmanager
def record(unet: Any, recorder: Recorder, layers: tuple[str, ...] = ("",)) -> Iterator[Recorder]:
    """Within this context ``recorder`` sees attention layers of ``unet``; afterwards the model is as it was.

    ``layers`` are beginnings of their names, such as ``up_blocks``; all other layers keep their own processor.
    """
    before = dict(unet.attn_processors)
    recorded = {name: _Recording(inner, recorder) for name, inner in before.items() if name.startswith(layers)}
    unet.set_attn_processor({**before, **recorded})
    try:
        yield recorder
    finally:
        unet.set_attn_processor(before)
