"""Where a training begins: from which weights, and whether they are still those that it was begun with."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from synthgen.config import Choice
from synthgen.errors import ConfigError, CorruptFile, MissingArtifact, MissingWeights, StaleArtifact
from synthgen.stages._integrity import check_encoder, encoder_hash
from synthgen.stores import parse_location
from synthgen.stores.checksum import sha256_of
from synthgen.untrusted import read_file, read_json

if TYPE_CHECKING:
    from synthgen.methods import Method
    from synthgen.models.vit import EncoderConfig, VisionTransformer

__all__ = ["Start", "begin", "find_start", "option_inputs", "start_inputs"]

logger = logging.getLogger(__name__)

_ENCODER, _WHOLE = "start", "start.method"  # inputs of a training: the sha256 of an encoder, and of a whole method


@dataclass(frozen=True)
class Start:
    """Weights that exist."""

    folder: Path
    whole: Path | None  # the last checkpoint of a training with the same method; None: only its encoder is wanted
    method: Choice | None  # what trained it, where that is known

    def hashes(self) -> dict[str, str]:
        """What tells these weights from others."""
        from synthgen.train.checkpoint import method_hash

        found = {_ENCODER: encoder_hash(self.folder, processor=False)}
        return found if self.whole is None else found | {_WHOLE: method_hash(self.whole)}


def find_start(name: str, method: str) -> Start:
    """The weights in a folder, or of a model of the hub, for a training with ``method``.

    Raises:
        MissingArtifact: there are none, or the training is not finished.
        MissingWeights: the model cannot be fetched.
        CorruptFile: what describes the training cannot be read.
    """
    from synthgen.models.transformers_encoder import encoder_folder

    folder = parse_location(name)
    of_training = any((folder / part).exists() for part in ("settings.yaml", "metrics.jsonl", "checkpoints"))
    if of_training and not (folder / "done.json").is_file():
        again = "the same command that began it"
        if folder.parent.name == "pretrain":
            again = f"synthgen pretrain --label {folder.name} --run {shlex.quote(str(folder.parent.parent))}"
        raise MissingArtifact(f"the training in {folder} is not finished, and cannot be a start; first run: {again}")
    folder = encoder_folder(name)
    if not of_training:
        return Start(folder, None, None)
    try:
        trained = Choice.of(read_json(read_file(folder / "config.json"))["method"])
        steps = int(read_json(read_file(folder / "done.json"), finite=False)["steps"])
    except (OSError, ValueError, LookupError, TypeError, ConfigError):
        raise CorruptFile(f"done.json and config.json in {folder} do not tell how it was trained") from None
    last = folder / "checkpoints" / f"step-{steps:08d}.safetensors"
    return Start(folder, last if trained.name == method and last.is_file() else None, trained)


def option_inputs(method: Choice) -> dict[str, str]:
    """Hashes of the encoders that options of a method name, and of the ``tokenizer.json`` of one that reads texts."""
    from synthgen.methods import METHODS
    from synthgen.models.transformers_encoder import is_tower

    reads_texts, found = METHODS.load(method.name).reads_texts, {}
    for option, value in method.options.items():
        if not isinstance(value, str) or not value:
            continue
        place, name = parse_location(value), f"method.{option}"
        tokenizer = place / "tokenizer.json" if place.is_dir() else place
        if reads_texts and tokenizer.is_file():
            found[name] = sha256_of(tokenizer)
        elif (place / "encoder.safetensors").is_file() or is_tower(place):
            found[name] = encoder_hash(place)
    return found


def start_inputs(name: str, method: str, begun: Mapping[str, Any] | None) -> dict[str, str]:
    """Hashes of what a training starts from.

    A training that was ``begun`` from it keeps to what was noted then where the weights are gone since: what is
    finished stays finished without them.

    Raises:
        MissingArtifact, MissingWeights, CorruptFile: see :func:`find_start`.
    """
    noted: dict[str, str] = {}
    if begun is not None and begun["settings"].get("start") == name and begun["settings"]["method"]["name"] == method:
        noted = {key: value for key, value in begun["inputs"].items() if key in (_ENCODER, _WHOLE)}
    try:
        found = find_start(name, method).hashes()
    except (MissingArtifact, MissingWeights, CorruptFile, OSError):
        if noted:
            return noted
        raise
    return noted if found[_ENCODER] == noted.get(_ENCODER) and _WHOLE not in found else found


def begin(method: Method, name: str, choice: Choice, inputs: Mapping[str, str]) -> dict[str, Any]:
    """Put the weights of a start into ``method``, and say what became of them.

    Args:
        method: as it would begin without.
        name: of the start.
        choice: what ``method`` was built from.
        inputs: of the training, as they were noted.

    Raises:
        MissingArtifact, MissingWeights, CorruptFile, ConfigError: there are no such weights, they cannot be read, or
            do not fit.
        StaleArtifact: they have changed since the training was begun.
    """
    from synthgen.train.checkpoint import method_tensors
    from synthgen.train.start import take_over

    start = find_start(name, choice.name)
    check_encoder(start.folder)
    wanted = {key: inputs[key] for key in (_ENCODER, _WHOLE) if key in inputs}
    if _WHOLE in wanted and start.whole is None:
        raise MissingArtifact(f"the last checkpoint of the training in {start.folder}, where this one begins, is gone")
    hashes = start.hashes()
    if hashes != wanted:
        raise StaleArtifact(f"the weights in {start.folder} have changed since this training was begun from them")
    encoder = _encoder(start.folder)
    _check_shape(name, encoder.config, method.encoder.config)
    tensors = {f"encoder.{key}": tensor for key, tensor in encoder.state_dict().items()}
    if start.whole is not None and start.method is not None:
        _check_named(name, start.method, choice)
        method.check_start(start.folder)
        every = method_tensors(start.whole)
        if any(key not in every or not every[key].equal(tensor) for key, tensor in tensors.items()):
            raise CorruptFile(
                f"{start.whole} is not of the encoder beside it; delete {start.folder} and pretrain again"
            )
        tensors = every
    try:
        begun = take_over(method, tensors)
    except ConfigError as error:
        raise ConfigError(f"the training in {name} cannot go on as this one: {error}") from None
    what = "the whole training" if start.whole is not None else "the encoder"
    logger.info("begins with %s in %s: %s", what, name, begun)
    return {
        "from": name,
        "whole": start.whole is not None,
        "sha256": hashes,
        **{item.name: getattr(begun, item.name) for item in fields(begun)},
    }


def _encoder(folder: Path) -> VisionTransformer:
    from synthgen.models.transformers_encoder import is_tower
    from synthgen.models.transformers_vit import from_transformers
    from synthgen.models.vit import load_encoder

    return from_transformers(folder) if is_tower(folder) else load_encoder(folder)


def _check_shape(name: str, theirs: EncoderConfig, ours: EncoderConfig) -> None:
    """See that an encoder is built as ours, and sees pixels as ours does.

    Raises:
        ConfigError: it is not.
    """
    other = [item.name for item in fields(ours) if getattr(theirs, item.name) != getattr(ours, item.name)]
    if other:
        said = ", ".join(f"{part} {_plain(getattr(theirs, part))}" for part in other)
        here = ", ".join(f"{part} {_plain(getattr(ours, part))}" for part in other)
        options = " ".join(f"--set encoder.{part}={_plain(getattr(theirs, part))}" for part in other)
        raise ConfigError(f"the encoder in {name} has {said}, and that of this training {here}; give: {options}")


def _plain(value: Any) -> str:
    return "[" + ",".join(f"{part!r}" for part in value) + "]" if isinstance(value, tuple) else str(value)


def _check_named(name: str, theirs: Choice, ours: Choice) -> None:
    """See that options that name files of weights or tokens are the same: those come with the method.

    Raises:
        ConfigError: they are not.
    """
    from synthgen.methods import METHODS

    usual = METHODS.complete(ours.name, "encoder").options
    for option in [option for option, value in usual.items() if value == ""]:
        was, now = theirs.options.get(option, ""), ours.options.get(option, "")
        if was != now:
            raise ConfigError(
                f"the training in {name} has the {option} {was!r}, and this one {now!r}; give the same, or begin with "
                f"its encoder alone, such as {name}/transformers"
            )
