"""The initial weights of a training: find them, check that they have not changed, and load them into the method."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
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

__all__ = ["Start", "find_start", "load_start", "option_inputs", "start_inputs"]

logger = logging.getLogger(__name__)

_ENCODER, _WHOLE = "start", "start.method"  # inputs of a training: hashes of an encoder, and of a whole method


@dataclass(frozen=True)
class Start:
    """Weights to start from."""

    folder: Path
    checkpoint: Path | None  # the last one of a training by the same method; None: only the encoder is used
    method: Choice | None  # what trained the weights, if a training of ``pretrain`` did

    def hashes(self) -> dict[str, str]:
        """The inputs of a training that starts from these weights."""
        from synthgen.train.checkpoint import method_hash

        found = {_ENCODER: encoder_hash(self.folder, processor=False)}
        return found if self.checkpoint is None else found | {_WHOLE: method_hash(self.checkpoint)}


def find_start(name: str, method: str) -> Start:
    """The weights in a folder, or of a model of the hub, for a training by ``method``.

    Raises:
        MissingArtifact: there are none, or the training is not finished.
        MissingWeights: the model cannot be downloaded.
        CorruptFile: the files that describe the training cannot be read.
    """
    from synthgen.models.transformers_encoder import encoder_folder

    folder = parse_location(name)
    is_training = any((folder / part).exists() for part in ("settings.yaml", "metrics.jsonl", "checkpoints"))
    if is_training and not (folder / "done.json").is_file():
        again = "the same command that began it"
        if folder.parent.name == "pretrain":
            again = f"synthgen pretrain --label {folder.name} --run {shlex.quote(str(folder.parent.parent))}"
        raise MissingArtifact(f"the training in {folder} is not finished, and cannot be a start; first run: {again}")
    folder = encoder_folder(name)
    if not is_training:
        return Start(folder, None, None)
    try:
        trained = Choice.of(read_json(read_file(folder / "config.json"))["method"])
        steps = int(read_json(read_file(folder / "done.json"), finite=False)["steps"])
    except (OSError, ValueError, LookupError, TypeError, ConfigError):
        raise CorruptFile(f"done.json and config.json in {folder} do not say how it was trained") from None
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


def start_inputs(name: str, method: str, before: Mapping[str, Any] | None) -> dict[str, str]:
    """Hashes of the weights that a training starts from.

    Args:
        name: folder or hub id of the weights.
        method: name of the method that is trained.
        before: the entry of this training in its ``settings.yaml``, if there is one. If it started from the same
            weights, which may be gone by now, the hashes are those of the entry, so that a finished training stays
            finished.

    Raises:
        MissingArtifact, MissingWeights, CorruptFile: see :func:`find_start`.
    """
    recorded: dict[str, str] = {}
    if (
        before is not None
        and before["settings"].get("start") == name
        and before["settings"]["method"]["name"] == method
    ):
        recorded = {key: value for key, value in before["inputs"].items() if key in (_ENCODER, _WHOLE)}
    try:
        found = find_start(name, method).hashes()
    except (MissingArtifact, MissingWeights, CorruptFile, OSError):
        if recorded:
            return recorded
        raise
    return recorded if found[_ENCODER] == recorded.get(_ENCODER) and _WHOLE not in found else found


def load_start(method: Method, name: str, choice: Choice, inputs: Mapping[str, str]) -> dict[str, Any]:
    """Load the weights of a start into ``method``; returns the entry ``start`` of ``done.json``.

    Args:
        method: newly built.
        name: folder or hub id of the weights.
        choice: the method's name and options.
        inputs: the recorded inputs of the training.

    Raises:
        MissingArtifact, MissingWeights, CorruptFile, ConfigError: there are no such weights, they cannot be read, or
            do not fit.
        StaleArtifact: they have changed since the training began.
    """
    from synthgen.train.checkpoint import method_tensors
    from synthgen.train.start import load_weights

    start = find_start(name, choice.name)
    check_encoder(start.folder)
    expected = {key: inputs[key] for key in (_ENCODER, _WHOLE) if key in inputs}
    if _WHOLE in expected and start.checkpoint is None:
        raise MissingArtifact(f"the last checkpoint of the training in {start.folder}, where this one begins, is gone")
    hashes = start.hashes()
    if hashes != expected:
        raise StaleArtifact(f"the weights in {start.folder} have changed since this training was begun from them")
    encoder = _encoder(start.folder)
    _check_shape(name, encoder.config, method.encoder.config)
    tensors = {f"encoder.{key}": tensor for key, tensor in encoder.state_dict().items()}
    if start.checkpoint is not None and start.method is not None:
        _check_file_options(name, start.method, choice)
        method.check_start(start.folder)
        whole = method_tensors(start.checkpoint)
        if any(key not in whole or not whole[key].equal(tensor) for key, tensor in tensors.items()):
            raise CorruptFile(
                f"{start.checkpoint} is not of the encoder beside it; delete {start.folder} and pretrain again"
            )
        tensors = whole
    try:
        loaded = load_weights(method, tensors)
    except ConfigError as error:
        raise ConfigError(f"the training in {name} cannot go on as this one: {error}") from None
    what = "the whole training" if start.checkpoint is not None else "the encoder"
    logger.info("starts from %s in %s: %s", what, name, loaded)
    return {"from": name, "whole": start.checkpoint is not None, "sha256": hashes, **asdict(loaded)}


def _encoder(folder: Path) -> VisionTransformer:
    from synthgen.models.transformers_encoder import is_tower
    from synthgen.models.transformers_vit import from_transformers
    from synthgen.models.vit import load_encoder

    return from_transformers(folder) if is_tower(folder) else load_encoder(folder)


def _check_shape(name: str, theirs: EncoderConfig, ours: EncoderConfig) -> None:
    """Check that an encoder has our architecture and normalisation.

    Raises:
        ConfigError: it has not.
    """
    different = [item.name for item in fields(ours) if getattr(theirs, item.name) != getattr(ours, item.name)]
    if different:
        there = ", ".join(f"{part} {_option_text(getattr(theirs, part))}" for part in different)
        here = ", ".join(f"{part} {_option_text(getattr(ours, part))}" for part in different)
        options = " ".join(f"--set encoder.{part}={_option_text(getattr(theirs, part))}" for part in different)
        raise ConfigError(f"the encoder in {name} has {there}, and that of this training {here}; give: {options}")


def _option_text(value: Any) -> str:
    """A value as ``--set`` takes it."""
    return "[" + ",".join(f"{part!r}" for part in value) + "]" if isinstance(value, tuple) else str(value)


def _check_file_options(name: str, theirs: Choice, ours: Choice) -> None:
    """Check that options which name files of weights or tokens are equal: a whole method comes with their content.

    Raises:
        ConfigError: they differ.
    """
    from synthgen.methods import METHODS

    defaults = METHODS.complete(ours.name, "encoder").options
    for option in [option for option, value in defaults.items() if value == ""]:
        there, here = theirs.options.get(option, ""), ours.options.get(option, "")
        if there != here:
            raise ConfigError(
                f"the training in {name} has the {option} {there!r}, and this one {here!r}; give the same, or start "
                f"from its encoder alone, such as {name}/transformers"
            )
