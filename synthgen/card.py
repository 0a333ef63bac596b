"""Metadata of shards: parquet table, counts, wids index, and the dataset card (``README.md``)."""

from __future__ import annotations

import hashlib
import heapq
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jaxtyping import UInt64

from synthgen.untrusted import visible

__all__ = [
    "MASK_COLUMNS",
    "SCHEMA_VERSION",
    "PromptCount",
    "count_split",
    "dataset_card",
    "parquet_bytes",
    "prompt_figures",
    "wids_index",
]

SCHEMA_VERSION = 1  # of dataset.json and of the json of samples

#: Columns of the parquet for each mask: keys of the json's ``masks``.
MASK_COLUMNS = (
    *("score", "confidence", "area", "box", "touches_border", "components", "instances"),
    *("sharpness", "disagreement", "dropped"),
)

_SPLIT_NAMES = {"train": "train", "val": "validation"}  # folder → name at Hugging Face
_MEMBERS = {
    "txt": "the prompt, UTF-8",
    "json": "key, prompt, words and where they stand, label, seed, source, size, backbone, model, licence, warnings",
    "mask.png": "8-bit grey, as large as the image: k where the k-th of `words` is, 0 background; `masks` in the json "
    "holds value, confidence, box, separate objects and more of each",
    "cls": "the number of the label in `classes` of dataset.json",
}

_CARD = """\
# {name}

{samples} {origin}{masks}. Written by synthgen {version}.

## Contents

| split | samples | shards | MB |
|---|---|---|---|
{splits}

{labels}{words}Image size: {sizes}. {prompts} different prompts{shared}, such as:

````text
{examples}
````

Every sample has the same members; its key is ten digits.

| member | content |
|---|---|
{members}

`NNNNNN.parquet` beside a shard holds the same metadata as a table; `dataset.json` holds counts, classes, checksums and
settings.

## How to load it

With webdataset, in this folder:

```python
import webdataset as wds

dataset = wds.WebDataset("{urls}", shardshuffle=100).decode("pil")
for {targets} in dataset.to_tuple({tuple}):
    {use}
```

With wids, by number (`localname=str` reads the shards where they are and copies none):

```python
import os, wids

dataset = wids.ShardListDataset(os.path.abspath("{index}"), localname=str)
sample = dataset[0]
print(sample["__key__"], sample[".{image}"].size, sample[".txt"])
```

With Hugging Face datasets:

```python
from datasets import load_dataset

dataset = load_dataset("path/to/this/folder", split="{split}", streaming=True)
for row in dataset:
    print(row["__key__"], row["{image}"].size, row["txt"])
```

With open_clip: `--train-data '{urls}' --dataset-type webdataset` (`sizes.json` tells it the number of samples).

## How it was made

Backbone {backbone}, model {model}, run seed {seed}. The `json` of each image has {own}.{rejected}
{mask_note}
Versions of the libraries:

{versions}

## Licence

{licence}
"""

_MASK_NOTE = """
The masks come from the model's attention while it {attended} the image, refined by {refine}. No person
drew or checked them: use them for training, not as ground truth.
"""


def wids_index(name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The ``wids`` index of the shards in ``rows``, with urls relative to the index."""
    shards = [{"url": row["file"], "nsamples": row["samples"], "filesize": row["bytes"]} for row in rows]
    return {"__kind__": "wids-shard-index-v1", "wids_version": 1, "name": name, "shardlist": shards}


def count_split(folder: Path, rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], PromptCount]:
    """Samples, bytes, labels, words, image sizes and prompts of the shards in ``rows``, from their parquet files."""
    from pyarrow import parquet

    labels, words, sizes, prompts = Counter[str](), Counter[str](), Counter[str](), PromptCount()
    for row in rows:
        path = (folder / row["file"]).with_suffix(".parquet")
        table = parquet.read_table(path, columns=["label", "words", "width", "height", "prompt"]).to_pydict()
        labels.update(label for label in table["label"] if label)
        words.update(word for all_words in table["words"] for word in set(all_words))
        sizes.update(f"{width}x{height}" for width, height in zip(table["width"], table["height"], strict=True))
        prompts.add(table["prompt"])
    counts = {
        "samples": sum(row["samples"] for row in rows),
        "shards": len(rows),
        "bytes": sum(row["bytes"] for row in rows),
        "labels": dict(sorted(labels.items())),
        "words": dict(sorted(words.items())),
        "sizes": dict(sorted(sizes.items())),
    }
    return counts, prompts


class PromptCount:
    """Counts distinct prompts by 64-bit hashes, 8 bytes a prompt, and keeps the first ten in order as examples."""

    def __init__(self) -> None:
        self.examples: list[str] = []
        self._hashes: list[np.ndarray] = []

    def add(self, prompts: Sequence[str]) -> None:
        """Count the prompts of a shard."""
        different = set(prompts)
        self.examples = heapq.nsmallest(10, {*self.examples, *different})
        data = b"".join(hashlib.blake2b(prompt.encode(), digest_size=8).digest() for prompt in different)
        self._hashes.append(np.frombuffer(data, np.uint64))

    @property
    def hashes(self) -> UInt64[np.ndarray, " n"]:
        """The hash of each distinct prompt, in order."""
        return np.unique(np.concatenate(self._hashes)) if self._hashes else np.empty(0, np.uint64)


def prompt_figures(train: PromptCount, val: PromptCount) -> dict[str, Any]:
    """The distinct prompts of both splits, examples of them, and how many of val are in train as well."""
    in_train, in_val = train.hashes, val.hashes
    shared = {"val": len(in_val), "val_in_train": len(np.intersect1d(in_train, in_val, assume_unique=True))}
    return {
        "distinct": len(np.union1d(in_train, in_val)),
        "examples": heapq.nsmallest(10, {*train.examples, *val.examples}),
        **(shared if len(in_train) and len(in_val) else {}),
    }


def parquet_bytes(rows: Sequence[Mapping[str, Any]], *, masks: bool) -> bytes:
    """The rows of a shard as a parquet file, with explicit types."""
    import pyarrow as pa
    from pyarrow import parquet

    text, number, real = pa.string(), pa.int64(), pa.float64()
    fields = {"key": text, "prompt": text, "words": pa.list_(text), "spans": pa.list_(pa.list_(number)), "label": text}
    fields |= {
        "seed": number,
        "source": text,
        "width": number,
        "height": number,
        "backbone": text,
        "model": text,
        "licence": text,
        "warnings": text,
    }
    if masks:
        box = pa.list_(number)
        types = {"box": box, "instances": pa.list_(pa.struct({"area": real, "box": box}))}
        types |= {"touches_border": pa.bool_(), "components": number, "dropped": text}
        fields |= {f"mask_{name}": pa.list_(types.get(name, real)) for name in MASK_COLUMNS}
    fields |= {"status": text, "error": text}
    buffer = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(list(rows), schema=pa.schema(list(fields.items()))), buffer)
    return buffer.getvalue()


def dataset_card(description: Mapping[str, Any]) -> str:
    """The README.md of a set of shards, from the contents of its ``dataset.json``.

    Its YAML header tells Hugging Face which files are the data (by default the side files, without images) and their
    types (by default inferred from five samples, which fails if those have no words).
    """
    head = yaml.safe_dump(_head(description), sort_keys=False, allow_unicode=True)
    return f"---\n{head}---\n\n{_CARD.format(**_facts(description))}"


def _head(description: Mapping[str, Any]) -> dict[str, Any]:
    files = [{"split": _SPLIT_NAMES[split], "path": f"{split}/*.tar"} for split in description["splits"]]
    return {
        "pretty_name": description["name"],
        "license": "other",
        "tags": [*([] if _attended(description) else ["synthetic"]), "webdataset", "synthgen"],
        "size_categories": [_size_category(_samples(description))],
        "configs": [{"config_name": "default", "data_files": files}],
        "dataset_info": {"features": _features(description)},
    }


def _features(description: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The types of the members in the notation of Hugging Face's YAML."""
    labels = {str(number): label for number, label in enumerate(description["classes"])}
    types: dict[str, dict[str, Any]] = {
        "txt": {"dtype": "string"},
        "json": {"struct": _json_features(masks="mask.png" in description["members"])},
        "cls": {"dtype": {"class_label": {"names": labels}}},
    }
    types |= {"__key__": {"dtype": "string"}, "__url__": {"dtype": "string"}}  # added by the loader
    names = [*description["members"], "__key__", "__url__"]
    return [{"name": name, **types.get(name, {"dtype": "image"})} for name in names]


def _json_features(*, masks: bool) -> list[dict[str, Any]]:
    def plain(dtype: str, *names: str) -> list[dict[str, Any]]:
        return [{"name": name, "dtype": dtype} for name in names]

    lists: list[dict[str, Any]] = [{"name": "words", "list": "string"}, {"name": "spans", "list": {"list": "int64"}}]
    fields = plain("string", "key", "prompt") + lists + plain("string", "label")
    fields += plain("int64", "seed") + plain("string", "source") + plain("int64", "width", "height")
    fields += plain("string", "backbone", "model", "licence", "warnings")
    if masks:
        box, area = {"name": "box", "list": "int64"}, {"name": "area", "dtype": "float64"}
        mask = plain("string", "word") + plain("int64", "value") + plain("float64", "score", "confidence")
        mask += [area, box, *plain("bool", "touches_border"), *plain("int64", "components")]
        mask += [{"name": "instances", "list": [dict(area), dict(box)]}]  # copies: YAML would write an alias
        mask += plain("float64", "sharpness", "disagreement") + plain("string", "dropped")
        fields.append({"name": "masks", "list": mask})
    return fields


def _facts(description: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the card's placeholders."""
    splits, versions = description["splits"], description["versions"]
    masks, attended = "mask.png" in description["members"], _attended(description)
    refine = (description["made_from"].get("masks", {}).get("refine") or {}).get("name", "the masks stage")
    prompts, rejected = description["prompts"], description["rejected"]
    left_out, samples = sum(rejected.values()), _samples(description)
    words, sizes = (sum((Counter(one[name]) for one in splits.values()), Counter()) for name in ("words", "sizes"))
    rows = [
        f"| {name} | {one['samples']} | {one['shards']} | {one['bytes'] / 1e6:.1f} |" for name, one in splits.items()
    ]
    return _loading(description) | {
        **{name: description[name] for name in ("name", "seed", "licence")},
        "backbone": description["backbone"] or "unknown",
        "model": description["model"] or "unknown",
        "samples": samples,
        "origin": "existing images with captions" if attended else "generated images",
        "own": "its seed, and its original name as `source`" if attended else "its seed",
        "rejected": f" A filter left out {left_out} of {left_out + samples} images: {_most(rejected)}."
        if rejected
        else "",
        "masks": ", with a mask for each marked word" if masks else "",
        "splits": "\n".join(rows),
        "labels": f"{len(description['classes'])} classes. " if description["classes"] else "",
        "words": f"Words by number of images: {_most(words)}. " if words else "",
        "sizes": _most(sizes),
        "prompts": prompts["distinct"],
        "shared": f" ({prompts['val_in_train']} of the {prompts['val']} in val are in train as well)"
        if "val" in prompts
        else "",
        "examples": "\n".join(visible(example) for example in prompts["examples"]),
        "members": "\n".join(
            f"| `{name}` | {_MEMBERS.get(name, 'the image, RGB')} |" for name in description["members"]
        ),
        "mask_note": _MASK_NOTE.format(
            attended="processed" if attended else "generated",
            refine="synthgen's own attentioncut" if refine == "attentioncut" else refine,  # its energy is not a paper's
        )
        if masks
        else "",
        "version": versions.get("synthgen", "unknown"),
        "versions": _versions(description["made_with"] | {"shards": versions}),
    }


def _versions(artifacts: Mapping[str, Mapping[str, str]]) -> str:
    """The versions that each artifact was made with; artifacts with the same versions share a line."""
    names: dict[str, list[str]] = {}
    for name, versions in artifacts.items():
        listed = ", ".join(f"{library} {version}" for library, version in versions.items()) or "not recorded"
        names.setdefault(listed, []).append(name)
    return "\n".join(f"- {', '.join(alike)}: {listed}" for listed, alike in names.items())


def _loading(description: Mapping[str, Any]) -> dict[str, str]:
    """The values of the placeholders in the card's snippets, which read the first split."""
    members = description["members"]
    masks = "mask.png" in members
    image = next(name for name in ("jpg", "png", "webp") if name in members)
    split, counts = next(iter(description["splits"].items()))
    last = counts["shards"] - 1
    return {
        "image": image,
        "index": "index.json" if split == "train" else f"index-{split}.json",
        "split": _SPLIT_NAMES[split],
        "urls": f"{split}/{{000000..{last:06d}}}.tar" if last else f"{split}/000000.tar",
        "tuple": ", ".join(f'"{name}"' for name in [image, "txt", "json"] + ["mask.png"] * masks),
        "targets": "image, text, meta" + ", mask" * masks,
        "use": 'print(meta["key"], image.size, text' + (', meta["words"], mask.getextrema())' if masks else ")"),
    }


def _attended(description: Mapping[str, Any]) -> bool:
    """Whether the images are existing ones, from the stage attend."""
    return bool(description.get("made_by") == "attend")


def _samples(description: Mapping[str, Any]) -> int:
    return sum(split["samples"] for split in description["splits"].values())


def _most(counts: Mapping[str, int], limit: int = 12) -> str:
    """The most frequent names with their counts."""
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    listed = ", ".join(f"{name} ({count})" for name, count in ranked[:limit])
    return listed + (f", and {len(ranked) - limit} more" if len(ranked) > limit else "")


def _size_category(samples: int) -> str:
    """The Hub's name for a number of samples."""
    bounds = (("1K", 10**3), ("10K", 10**4), ("100K", 10**5), ("1M", 10**6), ("10M", 10**7), ("100M", 10**8))
    lower = "n"
    for name, bound in bounds:
        if samples < bound:
            return "n<1K" if lower == "n" else f"{lower}<n<{name}"
        lower = name
    return "100M<n<1B"
