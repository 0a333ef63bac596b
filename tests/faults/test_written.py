"""A wrong byte is noticed by whoever reads the file next, and the line that says so names the file and the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from synthgen.columns import Column
from synthgen.engines.local import Local
from synthgen.errors import CorruptFile, MissingArtifact, SynthgenError
from synthgen.run import Run
from synthgen.runner import run_stage
from synthgen.stages._integrity import check_encoder, check_shards
from synthgen.stages._loader_errors import translate_loader_errors
from synthgen.stages.masks import Masks
from synthgen.stages.shards import Shards
from synthgen.stores.checksum import verify_sha256
from synthgen.train.checkpoint import Checkpoints
from tests.factories import Drawn


def turn_over(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    with open(path, "r+b") as file:
        file.write(data)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run.create(tmp_path / "r")
    for stage in (Drawn(unit_size=3), Masks(), Shards(samples_per_shard=2, val_ratio=0)):
        run_stage(stage, run, Local(workers=1))
    return run


def test_a_unit_with_a_wrong_byte_is_read_by_nobody(run: Run) -> None:
    path = run.tar("images", 1)
    turn_over(path, -1)  # behind the last sample: nothing would be decoded differently
    told = rf"^{path} is cut off, or a byte of it is wrong.*delete it and run: synthgen generate --run {run.path}$"
    with pytest.raises(CorruptFile, match=told):
        run.read("images", 1)
    with pytest.raises(CorruptFile, match=told):
        Column(run, "images").read("0000010000")
    assert len(list(run.read("images", 0))) == 3


def test_a_shard_with_a_wrong_byte_is_found_by_the_process_whose_share_it_is(run: Run) -> None:
    check_shards(run, "train")
    path = run.folder("shards") / "train/000001.tar"
    turn_over(path, 700)
    check_shards(run, "train", 0, 2)
    with pytest.raises(CorruptFile, match=rf"^{path} .*synthgen shards --run"):
        check_shards(run, "train", 1, 2)
    path.unlink()
    with pytest.raises(MissingArtifact, match=str(path)):
        check_shards(run, "train")
    path.with_name("000001_stats.json").unlink()  # as a killed repair leaves it
    with pytest.raises(MissingArtifact, match=str(path)):
        check_shards(run, "train")


def test_an_encoder_is_held_against_its_done_mark_if_it_has_one(tmp_path: Path) -> None:
    weights = tmp_path / "encoder.safetensors"
    weights.write_bytes(b"weights")
    check_encoder(tmp_path)  # from elsewhere
    (tmp_path / "done.json").write_text(json.dumps({"sha256": "0" * 64}))
    with pytest.raises(CorruptFile, match=r"encoder\.safetensors .*synthgen pretrain"):
        check_encoder(tmp_path)


def test_what_cannot_be_read_says_so(tmp_path: Path) -> None:
    with pytest.raises(CorruptFile, match=f"^{tmp_path} cannot be read: Is a directory; delete it and run: it$"):
        verify_sha256(tmp_path, "", "it")


def test_a_training_goes_on_from_the_checkpoint_before_one_with_a_wrong_byte(tmp_path: Path) -> None:
    module = torch.nn.Linear(64, 64)
    optimizer, checkpoints = torch.optim.AdamW(module.parameters()), Checkpoints(tmp_path, "f")
    checkpoints.save(module, optimizer, 1)
    checkpoints.save(module, optimizer, 2)
    assert checkpoints.resume(module, optimizer)["step"] == 2
    turn_over(tmp_path / "step-00000002.safetensors", -9)  # in a weight
    assert checkpoints.resume(module, optimizer)["step"] == 1
    turn_over(tmp_path / "step-00000001.safetensors", -9)
    with pytest.raises(CorruptFile, match="a byte of it is wrong"):
        checkpoints.resume(module, optimizer)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), ConnectionResetError(104, "reset")],
)
def test_a_lost_reader_is_told_in_one_line(error: Exception) -> None:
    told = r"^a process that reads samples was lost .*run the same command again"
    with pytest.raises(SynthgenError, match=told), translate_loader_errors():
        raise error
    with pytest.raises(RuntimeError, match="another"), translate_loader_errors():
        raise RuntimeError("another")
