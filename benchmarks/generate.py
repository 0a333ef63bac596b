"""Images per second with and without recording attention, on the shipped model.

``python benchmarks/generate.py`` writes ``results/generate.json``. Contenders, each on the same prompts and seeds:

* ``plain``: the pipeline alone.
* ``recorded``: the cross- and self-attention of the decoder (``up_blocks``) in the second half of the steps.
* ``recorded, all layers and steps``: that of the whole U-Net in every step.
* ``cross-attention written out``: the usual hook script, whose cross-attention processors form the softmax over all
  tokens and multiply it with the values.

The best of all rounds counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from _common import make_parser, rounds, write_result

from synthgen import tiny
from synthgen.attention.words import locate_words
from synthgen.diffusion import AttentionSelection, Loading, Sampling, StableDiffusion, load_pipeline
from synthgen.prompts import read_prompts

ROOT = Path(__file__).resolve().parents[1]


class WrittenOut:
    """Cross-attention that keeps its probabilities, as sums over steps of the mean over heads."""

    def __init__(self) -> None:
        self.sums: dict[int, torch.Tensor] = {}

    def __call__(
        self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Compute what diffusers' ``AttnProcessor`` computes."""
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        key = attn.head_to_batch_dim(attn.to_k(encoder_hidden_states))
        value = attn.head_to_batch_dim(attn.to_v(encoder_hidden_states))
        probabilities = attn.get_attention_scores(query, key)
        maps = probabilities.unflatten(0, (-1, attn.heads)).mean(1)
        self.sums[maps.shape[1]] = self.sums.get(maps.shape[1], 0) + maps
        output: torch.Tensor = attn.to_out[0](attn.batch_to_head_dim(torch.bmm(probabilities, value)))
        return output


@contextmanager
def written_out(unet: Any) -> Iterator[None]:
    """Replace the cross-attention processors within the block."""
    before = dict(unet.attn_processors)
    unet.set_attn_processor({name: WrittenOut() if "attn2" in name else old for name, old in before.items()})
    try:
        yield
    finally:
        unet.set_attn_processor(before)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipeline = load_pipeline(Loading(str(tiny.WEIGHTS)), ["StableDiffusionPipeline"])
    side = StableDiffusion.native_size(pipeline)
    sampling = Sampling(tiny.DEFAULT_STEPS, tiny.DEFAULT_GUIDANCE, "", side, side)
    everything = StableDiffusion(pipeline, sampling, AttentionSelection(cross_levels=(1, 2), self_level=1))
    decoder = StableDiffusion(pipeline, sampling, AttentionSelection((1, 2), 1, layers=("up_blocks",), skip_steps=0.5))
    prompts = read_prompts(ROOT / "prompts" / "demo.jsonl")[: args.batch_size]
    texts, seeds = [prompt.text for prompt in prompts], list(range(len(prompts)))
    tokens = [locate_words(pipeline.tokenizer, prompt).positions for prompt in prompts]

    def plain() -> None:
        everything.sample(texts, seeds, [], recorded=False)

    def recorded(model: StableDiffusion) -> None:
        _, recorder = model.sample(texts, seeds, tokens)
        recorder.weights(), recorder.affinity()

    def hooked() -> None:
        with written_out(pipeline.unet):
            plain()

    seconds = rounds(
        {
            "plain": plain,
            "recorded": lambda: recorded(decoder),
            "recorded, all layers and steps": lambda: recorded(everything),
            "cross-attention written out": hooked,
        },
        args.repeats,
    )
    best = {name: min(times) for name, times in seconds.items()}
    figures: dict[str, Any] = {
        "steps": sampling.num_steps,
        "guidance_scale": sampling.guidance_scale,
        "batch_size": len(prompts),
        "threads": 1,
        "repeats": args.repeats,
        "images_per_second": {name: len(prompts) / time for name, time in best.items()},
        "time_over_plain": {name: time / best["plain"] for name, time in best.items()},
        "seconds": seconds,
    }
    print(write_result("generate", figures))


if __name__ == "__main__":
    main()
