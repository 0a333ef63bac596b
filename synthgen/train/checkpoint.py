"""Checkpoints: one safetensors file each, written atomically, with everything that a resumed training needs.

Tensors are ``model.<name>`` (parameters and buffers) and ``optimizer.<moment>.<name>``. The header's ``state`` is JSON:
step, fingerprint, and other values of the loop. It has no state of random generators, as none is needed: every draw
comes from generators that are seeded from the run's seed and the step (or epoch and sample number).
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from synthgen.config import Choice
from synthgen.errors import ConfigError, CorruptFile, MissingArtifact, StaleArtifact, one_line
from synthgen.methods import METHODS, Method
from synthgen.models.vit import load_encoder
from synthgen.stores import parse_location, temporaries
from synthgen.stores.tar import is_abandoned, write_bytes
from synthgen.untrusted import read_file, read_json

__all__ = ["Checkpoints", "load_method", "method_hash", "method_tensors"]

logger = logging.getLogger(__name__)

_METHOD = "model."  # prefix of the names of a method's tensors


def load_method(folder: str | Path) -> Method:
    """Load the whole method of the training in ``folder``, with heads and decoders, from its newest checkpoint to CPU.

    To inspect what it learned: ``load_method("runs/demo/pretrain/umd").sample(torch.arange(8))``.

    Raises:
        MissingArtifact: there is no finished training, or its checkpoints were deleted.
        CorruptFile: its files cannot be read, or do not match each other.
    """
    folder = parse_location(folder)
    encoder = load_encoder(folder)
    paths = sorted((folder / "checkpoints").glob("step-*.safetensors"))
    if not paths:
        raise MissingArtifact(f"there is no checkpoint in {folder / 'checkpoints'}; first run: synthgen pretrain")
    tensors = method_tensors(paths[-1])
    try:
        described = read_json(read_file(folder / "config.json"))
        method = METHODS.build(Choice.of(described["method"]), encoder=encoder)
        method.load_state_dict(tensors)
    except (ValueError, KeyError, TypeError, ConfigError, OSError, RuntimeError) as error:
        raise CorruptFile(
            f"the training in {folder} cannot be read: {one_line(error)}; delete it and pretrain again"
        ) from None
    return method.eval()


def method_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a method by name, from a checkpoint whose sha256 is verified.

    Raises:
        CorruptFile: the checkpoint cannot be read, or its sha256 does not match.
    """
    with _reading(path):
        _, tensors = _read(path)
    return _without_prefix(tensors)


def method_hash(path: Path) -> str:
    """The sha256 of the tensors of a method in a checkpoint, without its timings and its optimizer.

    Raises:
        CorruptFile: the checkpoint cannot be read.
    """
    with _reading(path), safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(_METHOD)]  # noqa: SIM118 - not a mapping
        return _checksum("", {name: file.get_tensor(name) for name in names})


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, ValueError) as error:
        raise CorruptFile(f"{path} cannot be read: {one_line(error)}; delete it and pretrain again") from None


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one training in ``folder``, of which the last ``keep`` are kept."""

    folder: Path
    fingerprint: str  # of settings and inputs; checkpoints with another fingerprint are refused
    keep: int = 2

    def paths(self) -> list[Path]:
        """The existing checkpoints, oldest first."""
        return sorted(self.folder.glob("step-*.safetensors"))

    def save(self, module: nn.Module, optimizer: torch.optim.Optimizer, step: int, **state: Any) -> None:
        """Write the checkpoint of ``step`` and delete all but the last ``keep``.

        Raises:
            StorageError: the checkpoint cannot be written.
        """
        tensors = {f"{_METHOD}{name}": tensor for name, tensor in module.state_dict().items()}
        for name, parameter in module.named_parameters():
            for moment, value in optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{moment}.{name}"] = value
        header = json.dumps({"step": step, "fingerprint": self.fingerprint, **state}, sort_keys=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        data = save(tensors, metadata={"state": header, "sha256": _checksum(header, tensors)})
        write_bytes(self.folder / f"step-{step:08d}.safetensors", data)
        for old in self.paths()[: -self.keep]:
            old.unlink(missing_ok=True)  # another process with the same training may have deleted it

    def resume(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Load the newest readable checkpoint and return its state; an empty state if there is no checkpoint.

        Raises:
            StaleArtifact: the checkpoint is of a training with other settings.
            CorruptFile: there are checkpoints but none can be read, or the checkpoint does not fit the model.
        """
        for leftover in temporaries(self.folder):
            if is_abandoned(leftover):  # its process was killed while writing
                leftover.unlink(missing_ok=True)
        broken = ""
        for path in reversed(self.paths()):
            try:
                state, tensors = _read(path)
            except FileNotFoundError:  # another process with the same training is ahead and has deleted it
                continue
            except (SafetensorError, OSError, ValueError) as error:
                broken = f"{path} cannot be read: {one_line(error)}"
                logger.warning("%s; going on from the checkpoint before it", broken)
                continue
            if state.get("fingerprint") != self.fingerprint:
                raise StaleArtifact(f"{path} was made with other settings; delete {self.folder.parent} to start anew")
            try:
                self._load(tensors, module, optimizer)
            except (RuntimeError, LookupError, ValueError) as error:
                raise CorruptFile(f"{path} does not fit the model: {one_line(error)}; delete it") from None
            return state
        if broken:
            raise CorruptFile(f"{broken}; delete {self.folder} to start this training anew")
        return {}

    def _load(self, tensors: dict[str, Tensor], module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        module.load_state_dict(_without_prefix(tensors))
        parameters = dict(module.named_parameters())
        optimizer.state.clear()
        for full, tensor in tensors.items():
            if full.startswith("optimizer."):
                _, moment, name = full.split(".", 2)
                # AdamW keeps its step count on the CPU and its moments on the device of the weights
                place = torch.device("cpu") if moment == "step" else parameters[name].device
                optimizer.state[parameters[name]][moment] = tensor.to(place)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The state and the tensors of a checkpoint.

    Raises:
        SafetensorError, OSError, ValueError: it cannot be read, or its sha256 does not match.
    """
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    header = metadata.get("state", "")
    if metadata.get("sha256") != _checksum(header, tensors):
        raise ValueError("a byte of it is wrong: its sha256 is not that in its header")
    state = read_json(header, finite=False)
    if not isinstance(state, dict) or not isinstance(state.get("step"), int):
        raise ValueError("its header does not hold the state of a training")
    return state, tensors


def _without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the method, by their names in its ``state_dict``."""
    return {name.removeprefix(_METHOD): tensor for name, tensor in tensors.items() if name.startswith(_METHOD)}


def _checksum(header: str, tensors: Mapping[str, Tensor]) -> str:
    """A sha256 of the header and all tensors; safetensors stores none."""
    digest = hashlib.sha256(header.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
