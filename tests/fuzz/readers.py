"""What is fuzzed: valid inputs of each reader, and reading one to its end."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from synthgen import codecs
from synthgen.captions import read_listing
from synthgen.config import Choice
from synthgen.datasets import CaptionedFolder, FolderDataset, ShardDataset, open_masks
from synthgen.engines.local import Local
from synthgen.errors import SynthgenError
from synthgen.image import encode_jpeg, encode_png
from synthgen.models.vit import EncoderConfig, VisionTransformer, load_encoder, save_encoder
from synthgen.pipeline import read_pipeline
from synthgen.prompt_copy import content_of, ensure_copy, open_copy
from synthgen.prompts import read_prompts
from synthgen.records import Prompt
from synthgen.rejected import read_rejected
from synthgen.run import Run
from synthgen.runner import run_stage
from synthgen.stages.filter import Filter
from synthgen.status import status
from synthgen.status.text import render
from synthgen.stores.tar import TarWriter, read_tar
from synthgen.validation import validate_shards
from synthgen.viewers.page import write_page
from tests.factories import make_generation, make_run

__all__ = ["READERS", "Reader", "prepare"]

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Reader:
    """One reader: valid files, where in the box a mutated one is put, how its format is called, and reading it."""

    name: str
    place: str
    kind: str
    read: Callable[[Path], object]
    valid: list[bytes] = field(default_factory=list)


def shards(path: Path) -> None:
    """Everything of every sample of a foreign tar."""
    samples = ShardDataset([path])
    for number in range(len(samples)):
        (
            samples.key(number),
            samples.label(number),
            samples.captions(number),
            samples.words(number),
            samples.boxes(number),
        )
        samples[number]
    for masks in open_masks(path).values():
        masks.values.sum()


def column(path: Path) -> None:
    """Every member of a tar of a run, as pages and exports read them."""
    for key, members in read_tar(path):
        request, _, _ = codecs.decode_image(key, members)
        codecs.decode_maps(key, members, request.prompt.words)


def maps(path: Path) -> None:
    """The maps of a sample with one word."""
    codecs.decode_maps("0000000000", {"maps.npz": path.read_bytes()}, ("disc",))


def masks(path: Path) -> None:
    """The masks of a sample with one word."""
    meta = {"words": ["disc"], "dropped": [""], "masks": [dict.fromkeys(codecs._MEASURED, 0.5)]}
    codecs.decode_masks("0000000000", {"masks.npz": path.read_bytes(), "json": json.dumps(meta).encode()})


def meta(path: Path) -> None:
    """The json of a sample, of its image and of its masks."""
    members = codecs.encode_image(make_generation()[0]) | {"json": path.read_bytes()}
    request, _, _ = codecs.decode_image("0000000000", members)
    codecs.decode_maps("0000000000", codecs.encode_maps(make_generation()[0].maps), request.prompt.words)


def images(path: Path) -> None:
    """An image of a folder."""
    FolderDataset(path.parent)[0]


def captioned(path: Path) -> None:
    """A table beside an image, and what a stage makes of it."""
    from synthgen.stages.attend import prompt_of

    read_listing(path)
    samples = CaptionedFolder(path.parent, path)
    for number in range(len(samples)):
        prompt_of(samples, number, "a photo of a {label}")


def copied(path: Path) -> None:
    """Every prompt of a run's own copy."""
    open_copy.cache_clear()
    kept = open_copy(path.parent, content_of(copied_prompts()).sha256)
    for number in range(len(kept)):
        kept[number]


def copied_prompts() -> list[Prompt]:
    """What that copy holds."""
    return [make_generation(words=words)[0].request.prompt for words in (("disc",), ("disc", "square"))]


def validated(path: Path) -> None:
    """A folder of tars of any program, with what describes them."""
    validate_shards(path.parent).plain()


def rejected(path: Path) -> None:
    """What a filter rejected, as shards and exports read it, and as ``status`` and ``view`` show it."""
    run(path)
    read_rejected(Run.open(path.parents[1]))


def run(path: Path) -> None:
    """A run as ``status`` and ``view`` see it, and its next stage."""
    box = next(folder for folder in path.parents if (folder / "run.yaml").exists())
    opened = Run.open(box)
    for artifact in ("images", "maps", "masks"):
        opened.artifact(artifact), opened.units(artifact), opened.failures(artifact), opened.mark(artifact, 0)
        opened.has_unit(artifact, 0, "0")
    found = status(opened)
    found.plain(), render(found)
    write_page(opened, limit=2)


READERS = (
    Reader("prompts.txt", "in/p.txt", "text", read_prompts),
    Reader("prompts.jsonl", "in/p.jsonl", "jsonl", read_prompts),
    Reader("pipeline", "in/p.yaml", "yaml", read_pipeline),
    Reader("shards", "in/000000.tar", "tar", shards),
    Reader("column", "in/000000.tar", "tar", column),
    Reader("validated tar", "set/000000.tar", "tar", validated),
    Reader("validated json", "set/dataset.json", "json", validated),
    Reader("maps", "in/maps.npz", "npz", maps),
    Reader("masks", "in/masks.npz", "npz", masks),
    Reader("meta", "in/a.json", "json", meta),
    Reader("png", "in/a.png", "png", images),
    Reader("jpeg", "in/a.jpg", "jpeg", images),
    Reader("webp", "in/a.webp", "webp", images),
    Reader("captions.jsonl", "pictures/metadata.jsonl", "jsonl", captioned),
    Reader("captions.csv", "pictures/metadata.csv", "csv", captioned),
    Reader("captions.coco", "pictures/captions.json", "json", captioned),
    Reader("prompt copy", "copy/prompts.jsonl", "jsonl", copied),
    Reader("prompt mark", "copy/prompts.json", "json", copied),
    Reader("run.yaml", "run/run.yaml", "yaml", run),
    Reader("settings.yaml", "run/masks/settings.yaml", "yaml", run),
    Reader("done mark", "run/masks/000000.json", "json", run),
    Reader("failure", "run/masks/000001.failed.json", "json", run),
    Reader("dataset.json", "run/shards/dataset.json", "json", run),
    Reader("scores", "run/evaluate/a.json", "json", run),
    Reader("rejected.json", "run/filter/rejected.json", "json", rejected),
    Reader("masks.tar", "run/masks/000000.tar", "tar", run),
    Reader("encoder", "encoder/config.json", "json", load_encoder_beside := lambda path: load_encoder(path.parent)),
    Reader("weights", "encoder/encoder.safetensors", "safetensors", load_encoder_beside),
)


def prepare(box: Path) -> None:
    """Fill an empty folder with a valid file for every reader, and tell the readers of them."""
    for folder in ("in", "pictures", "encoder", "copy", "set"):
        (box / folder).mkdir(parents=True)
    ensure_copy(box / "copy", prompts := copied_prompts(), content_of(prompts))
    one = make_run(box / "run", units=1, unit_size=2, image_size=16)
    run_stage(Filter(filters=(Choice("duplicate"),)), one, Local(workers=1))
    for name in ("shards", "evaluate"):
        one.folder(name).mkdir()
    generations = [make_generation(f"{number:010d}", size=16)[0] for number in range(2)]
    for name in ("a.png", "b.png"):
        (box / "pictures" / name).write_bytes(encode_png(generations[0].image))
    torch.manual_seed(0)
    save_encoder(
        VisionTransformer(EncoderConfig(image_size=8, patch_size=4, dim=8, depth=1, num_heads=2)), box / "encoder"
    )
    texts = {
        "prompts.txt": [
            b"a photo of a [dog] in a park\n# no\na [red] [cat]\n",
            "ein [Stra\u00dfenbild] im Regen\n".encode(),
        ],
        "prompts.jsonl": [
            b'{"prompt": "a dog and a dog", "words": ["dog", "dog"], "label": "dog"}\n{"prompt": "a [cat]"}'
        ],
        "pipeline": [
            (ROOT / "pipelines" / "tiny.yaml").read_bytes(),
            b"run: r\nstages: {masks: &m {refine: threshold}, shards: }",
        ],
        "meta": [
            json.dumps(
                codecs.prompt_to_json(generations[0].request.prompt) | {"seed": 1, "warnings": ["w"], "source": "s"}
            ).encode()
        ],
        "captions.jsonl": [
            b'{"file_name": "a.png", "text": "a dog", "words": ["dog"]}\n{"file_name": "b.png", "label": "sky"}'
        ],
        "captions.csv": [b'file_name,text,words,label\na.png,"a dog, a cat",dog;cat,x\nb.png,a dog,,\n'],
        "captions.coco": [
            b'{"images": [{"id": 1, "file_name": "a.png"}],'
            b' "annotations": [{"id": 1, "image_id": 1, "caption": "a dog"}]}'
        ],
        "validated json": [b'{"shards": [{"file": "000000.tar", "samples": 2}]}'],
        "failure": [b'{"unit": 1, "error": "no space", "trace": ""}'],
        "dataset.json": [
            b'{"shards": [{"file": "train/000000.tar", "bytes": 10}], "splits": {"train": {"samples": 2}}}'
        ],
        "scores": [
            b'{"scores": {"encoder": {"knn": {"top1": 0.5}}}, "warnings": ["w"], "seconds": 1,'
            b' "settings": {}, "inputs": {}}'
        ],
    }
    (box / "x.tar").unlink(missing_ok=True)
    with TarWriter(box / "x.tar") as tar:
        for one_of in generations:
            labels = encode_png(np.ones((16, 16), np.uint8))
            about = {"words": ["disc"], "label": "disc", "captions": ["a disc"], "boxes": [["disc", 0, 0, 4, 4]]}
            members = {"jpg": encode_jpeg(one_of.image), "mask.png": labels, "txt": b"a disc", "cls": b"1"}
            tar.add(one_of.request.key, members | {"json": json.dumps(about).encode()})
    with TarWriter(box / "y.tar") as tar:
        for one_of in generations:
            tar.add(one_of.request.key, codecs.encode_image(one_of) | codecs.encode_maps(one_of.maps))
    webp, grey = io.BytesIO(), io.BytesIO()
    Image.fromarray(generations[0].image).save(webp, "WEBP")
    Image.fromarray(generations[0].image).convert("P").save(grey, "PNG")
    truth = make_generation(size=16)[1]
    packed = codecs.encode_masks(codecs.WordMasks(("disc",), truth, np.ones(1, np.float32), ("",)))
    binary = {
        "shards": [(box / "x.tar").read_bytes()],
        "validated tar": [(box / "x.tar").read_bytes()],
        "column": [(box / "y.tar").read_bytes()],
        "maps": [codecs.encode_maps(generations[0].maps)["maps.npz"]],
        "masks": [packed["masks.npz"]],
        "png": [encode_png(generations[0].image), grey.getvalue()],
        "jpeg": [encode_jpeg(generations[0].image)],
        "webp": [webp.getvalue()],
    }
    (box / "set" / "000000.tar").write_bytes((box / "x.tar").read_bytes())
    for name in ("x.tar", "y.tar"):
        (box / name).unlink()
    for reader in READERS:
        given = (texts | binary).get(reader.name)
        reader.valid[:] = given or [(box / reader.place).read_bytes()]
        if reader.name == "done mark":  # so that the same seed gives the same inputs
            reader.valid[:] = [json.dumps(json.loads(reader.valid[0]) | {"seconds": 0.5}).encode()]


def check(reader: Reader, box: Path) -> None:
    """See that the valid inputs are read: else nothing is tested by wrong ones."""
    for data in reader.valid:
        (box / reader.place).write_bytes(data)
        try:
            reader.read(box / reader.place)
        except SynthgenError as error:
            raise AssertionError(f"{reader.name}: the valid input is refused: {error}") from error
