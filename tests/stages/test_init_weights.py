"""Trainings that begin from weights: of another training whole, of an encoder alone, or of transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from synthgen.config import Choice
from synthgen.datasets import ShardDataset
from synthgen.engines.local import Local
from synthgen.errors import ConfigError, CorruptFile, MissingArtifact, StaleArtifact
from synthgen.methods import METHODS
from synthgen.models.transformers_encoder import load_tower
from synthgen.models.transformers_vit import from_transformers
from synthgen.models.vit import VisionTransformer, load_encoder
from synthgen.run import Run
from synthgen.runner import Progress, Summary, run_stage
from synthgen.stages import make_stage
from synthgen.stages._init_weights import option_inputs
from synthgen.stores.checksum import sha256_of
from synthgen.tiny import WEIGHTS
from synthgen.train.checkpoint import load_method
from tests.factories import record_settings
from tests.stages.test_methods_training import KillAt, Killed, losses, members, write

ENCODER = {"name": "micro", "dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}
SMALL = {
    "encoder": ENCODER,
    "samples_seen": 24,
    "batch_size": 8,
    "export": False,
    "log_every": 1,
    "save_every": 1,
    "num_workers": 0,
}
STILL = {"base_learning_rate": 1e-12, "weight_decay": 0.0}  # so that the end tells the beginning
TUNED = {"name": "umd", "class_labels": True, "clean_share": 0.125, "noisy_mask_ratio": 0.0, "ema_decay": 0.9999}
SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "image_size": 32,
    "patch_size": 8,
}
SEEN = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def train(run: Run, method: object, label: str, progress: Progress | None = None, **changes: object) -> Path:
    """The folder that a training leaves."""
    started(run, method, label, progress, **changes)
    return run.folder(f"pretrain/{label}")


def started(run: Run, method: object, label: str, progress: Progress | None = None, **changes: object) -> Summary:
    settings = SMALL | {"data": [str(run.path.parent / "data.tar")], "method": method, "label": label} | changes
    return run_stage(make_stage("pretrain", settings), run, Local(workers=1), progress)


def told(folder: Path) -> dict:
    return json.loads((folder / "done.json").read_text())["start"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and a run with short trainings; tests take copies."""
    folder = tmp_path_factory.mktemp("source")
    write(folder / "data.tar", [members(number) for number in range(16)])
    run = Run.create(folder / "run")
    for method in ("mae", "umd", "maskdit"):
        train(run, method, method)
    return folder


@pytest.fixture
def run(source: Path, tmp_path: Path) -> Run:
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    return Run.open(tmp_path / "run")


@pytest.fixture
def umd(run: Run) -> Path:
    return run.folder("pretrain/umd")


def equal(one: dict, other: dict, **within: float) -> bool:
    return one.keys() == other.keys() and all(torch.allclose(one[name], other[name], **within) for name in one)


# -- whole trainings


def test_umd_is_tuned_without_masks_and_with_classes(run, umd):
    folder = train(run, TUNED, "tuned", start=str(umd), **STILL)
    assert np.isfinite(losses(folder)).all()
    before, after = load_method(umd), load_method(folder)
    for part in ("encoder", "decoder", "time", "changes"):
        parts = [getattr(method, part).state_dict() for method in (after, before, after.average)]
        assert equal(parts[0], parts[1], atol=1e-6)
        assert equal(parts[2], parts[1], atol=1e-6)  # the average began there as well
    assert after.classes.names == ("disc", "square")
    assert after.sample(torch.arange(2), 2, labels="disc", guidance_scale=1.5).shape == (2, 3, 32, 32)
    start, count = told(folder), len(before.state_dict())
    assert (start["from"], start["whole"], start["taken"]) == (str(umd), True, count)
    assert (start["new_parts"], start["left_parts"]) == (["classes", "steps"], [])
    assert start["taken"] + start["copied"] + start["anew"] == len(after.state_dict())
    assert load_encoder(folder / "average").config == before.encoder.config
    inputs = run.artifact("pretrain/tuned")["inputs"]
    assert {name: inputs[name] for name in ("start", "start.method")} == start["sha256"]
    log = "".join(path.read_text() for path in (run.path / "pretrain/tuned").rglob("*.jsonl"))
    log += "".join(path.read_text() for path in (run.path / "logs").glob("*.jsonl"))
    assert f"starts from the whole training in {umd}: {count} tensors loaded" in log


def test_maskdit_is_tuned_by_the_papers_schedule_and_its_average_goes_on(run):
    first = run.folder("pretrain/maskdit")
    for tuning in ({"mask_ratio": 0.0}, {"tuning": "cosine", "tuning_share": 1.0}):
        folder = train(run, {"name": "maskdit", **tuning}, "-".join(tuning), start=str(first), **STILL)
        before, after = load_method(first).state_dict(), load_method(folder).state_dict()
        assert (float(before.pop("steps")), float(after.pop("steps"))) == (3, 6)
        own = {name: tensor for name, tensor in after.items() if not name.startswith("average.")}
        assert equal(own, {name: before[name] for name in own}, atol=1e-6)
        slow = {name: before[name] for name in before.keys() - own.keys()}  # not a copy of the weights
        assert not equal(slow, {f"average.{name}": own[name] for name in own}, atol=1e-6)
        assert told(folder)["anew"] == 0
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert ["rebuild" in record for record in records] == [tuning != {"mask_ratio": 0.0}] * 2 + [False]


def test_a_killed_training_ends_the_same_and_a_finished_one_needs_no_start(run, umd):
    whole = load_file(train(run, TUNED, "tuned", start=str(umd)) / "encoder.safetensors")
    shutil.rmtree(run.folder("pretrain/tuned"))
    with pytest.raises(Killed):
        train(run, TUNED, "tuned", KillAt(2), start=str(umd))
    moved = umd.rename(umd.with_name("moved"))
    with pytest.raises(MissingArtifact, match="there is no encoder in"):
        train(run, TUNED, "tuned", start=str(umd))
    moved.rename(umd)
    assert equal(load_file(train(run, TUNED, "tuned", start=str(umd)) / "encoder.safetensors"), whole, atol=0.0)
    (last,) = (umd / "checkpoints").glob("step-00000003.*")
    last.write_bytes(last.read_bytes()[:-9])
    assert started(run, TUNED, "tuned", start=str(umd)).done_before == 1
    (umd / "config.json").write_text("{")
    assert started(run, TUNED, "tuned", start=str(umd)).done_before == 1
    shutil.rmtree(umd / "checkpoints")
    assert started(run, TUNED, "tuned", start=str(umd)).done_before == 1
    shutil.rmtree(umd)
    assert started(run, TUNED, "tuned", start=str(umd)).done_before == 1


def test_another_start_is_another_training(run, umd):
    """Also where only what is not its encoder is another one."""
    again = {"method": TUNED, "label": "tuned", "start": str(umd)}
    train(run, **again)
    checkpoint = max((umd / "checkpoints").iterdir())
    with safe_open(checkpoint, framework="pt") as file:
        about, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, checkpoint, about | {"more": "1"})
    assert started(run, **again).done_before == 1  # the same weights, in other bytes
    save_file(tensors | {"model.decoder.mask_token": tensors["model.decoder.mask_token"] + 1}, checkpoint, about)
    with pytest.raises(StaleArtifact, match=r"its input 'start\.method' has changed"):
        train(run, **again)
    with pytest.raises(StaleArtifact, match=r"differently: start is '' and was '.*umd'; its input 'start' has"):
        train(run, TUNED, "tuned")
    train(run, "mae", "other", beta2=0.999, save_every=2)
    with pytest.raises(StaleArtifact, match=r"differently: beta2 is 0\.95 and was 0\.999; use the same settings"):
        train(run, "mae", "other")
    with pytest.raises(StaleArtifact, match=r"differently: .*start is '.*umd' and was ''"):
        train(run, "mae", "mae", start=str(umd))


def test_labels_are_read_once_for_a_training(run, umd, monkeypatch):
    """And again by one that goes on: the data may have other ones."""
    read, label = [], ShardDataset.label
    monkeypatch.setattr(ShardDataset, "label", lambda data, index: read.append(index) or label(data, index))
    with pytest.raises(Killed):
        train(run, TUNED, "tuned", KillAt(2), start=str(umd))
    assert read == list(range(16))
    train(run, TUNED, "tuned", start=str(umd))
    assert read == list(range(16)) * 2


# -- what does not fit


@pytest.mark.parametrize(
    ("method", "changes", "said"),
    [
        ("umd", {"encoder": ENCODER | {"dim": 64}}, r"umd has dim 32, and that of this training dim 64; give: --set e"),
        ("umd", {"encoder": ENCODER | {"depth": 3}}, r"has depth 2, and that of this training depth 3; give"),
        ("umd", {"encoder": ENCODER | {"patch_size": 4}}, r"--set encoder\.patch_size=8$"),
        ("umd", {"encoder": ENCODER | {"image_size": 16}}, r"has image_size 32, and that of this training image_size"),
        ("mae", {"encoder": ENCODER | {"std": [0.5, 0.5, 0.5]}}, r"--set encoder\.std=\[0\.229,0\.224,0\.225\]"),
        ({"name": "umd", "decoder_depth": 2}, {}, r"cannot go on as this one: its decoder fits only in part: it lacks"),
    ],
)
def test_a_start_of_another_architecture_is_refused_in_one_line(run, umd, method, changes, said):
    with pytest.raises(ConfigError, match=said):
        train(run, method, "tuned", start=str(umd), **changes)
    assert not run.folder("pretrain/tuned").exists()


def test_a_tensor_of_another_shape_is_refused_with_both_shapes(run):
    first = train(run, {"name": "contrastive", "projection_dim": 16, "hidden_dim": 16}, "first")
    said = r"its queue_keys has the shape \(0, 16\), and that of this training \(0, 8\); give the options that it was"
    with pytest.raises(ConfigError, match=said):
        train(run, {"name": "contrastive", "projection_dim": 8, "hidden_dim": 16}, "second", start=str(first))


def test_other_classes_are_named_and_may_be_left_out(run, umd, tmp_path):
    first = train(run, TUNED, "first", start=str(umd))
    label = json.dumps({"words": ["disc"], "label": "cone"}).encode()
    write(tmp_path / "data.tar", [members(number, ("disc",), json=label) for number in range(16)])
    with pytest.raises(ConfigError, match="its classes have other names than those of the data"):
        train(run, TUNED, "second", start=str(first))
    folder = train(run, {"name": "umd"}, "third", start=str(first))
    assert (told(folder)["left_parts"], told(folder)["anew"]) == (["average", "classes", "steps"], 0)


def test_unfinished_trainings_are_refused_as_a_start(run, umd, tmp_path):
    (umd / "done.json").unlink()
    with pytest.raises(MissingArtifact, match=r"umd is not finished.*synthgen pretrain --label umd --run "):
        train(run, TUNED, "tuned", start=str(umd))
    (umd / "encoder.safetensors").unlink()
    with pytest.raises(MissingArtifact, match="is not finished"):
        train(run, TUNED, "tuned", start=str(umd))
    for place in (tmp_path / "nothing", run.path):
        with pytest.raises(MissingArtifact, match="there is no encoder in"):
            train(run, TUNED, "tuned", start=str(place))
    assert not run.folder("pretrain/tuned").exists()


def test_damaged_weights_are_refused_before_training(run, umd):
    checkpoint = max((umd / "checkpoints").iterdir())
    data = bytearray(checkpoint.read_bytes())
    data[-5] ^= 1  # of the optimizer or of the method: all of it is looked at
    checkpoint.write_bytes(data)
    with pytest.raises(CorruptFile, match="a byte of it is wrong"):
        train(run, TUNED, "tuned", start=str(umd))
    with pytest.raises(CorruptFile, match="a byte of it is wrong"):
        load_method(umd)
    with safe_open(checkpoint, framework="pt") as file:
        about, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, checkpoint, {"state": about["state"]})  # without its sha256
    with pytest.raises(CorruptFile, match="a byte of it is wrong"):
        load_method(umd)
    (umd / "encoder.safetensors").write_bytes((run.folder("pretrain/mae") / "encoder.safetensors").read_bytes())
    with pytest.raises(CorruptFile, match=r"encoder\.safetensors is cut off, or a byte of it is wrong"):
        train(run, TUNED, "tuned", start=str(umd))


# -- tokenizers


VLP = {"name": "vlp", "embed_dim": 8}


def other_numbers(path: Path) -> None:
    """The same vocabulary, numbered otherwise."""
    told = json.loads(path.read_text(encoding="utf-8"))
    words = list(told["model"]["vocab"])[300:]
    told["model"]["vocab"] |= dict(zip(words, [told["model"]["vocab"][word] for word in reversed(words)], strict=True))
    path.write_text(json.dumps(told), encoding="utf-8")


@pytest.mark.parametrize("place", ["", "tokenizer.json"])
def test_another_vocabulary_is_another_training(run, tmp_path, place):
    (tmp_path / "tok").mkdir()
    path = Path(shutil.copy(WEIGHTS / "tokenizer" / "tokenizer.json", tmp_path / "tok"))
    method = VLP | {"tokenizer": str(path.parent / place)}
    stage = make_stage("pretrain", SMALL | {"data": [str(tmp_path / "data.tar")], "method": method}).complete()
    record_settings(run, stage)
    noted = run.artifact("pretrain/vlp")
    assert noted["settings"]["method"]["tokenizer"] == method["tokenizer"]  # it is called like a secret, and is none
    assert noted["inputs"]["method.tokenizer"] == sha256_of(path)
    (run.folder("pretrain/vlp") / "metrics.jsonl").write_text("{}")
    run.check(stage)
    other_numbers(path)
    with pytest.raises(StaleArtifact, match=r"differently: its input 'method\.tokenizer' has changed; use"):
        run.check(stage)


def test_tokenizers_of_encoders_are_their_weights(run, tmp_path):
    """Of ``mapet``, whose tokenizer is an encoder; one of vlp's lies beside its words."""
    folder = Path(shutil.copytree(run.folder("pretrain/mae"), tmp_path / "enc"))
    (folder / "tokenizer.json").write_text("{}")
    before = option_inputs(Choice("mapet", {"tokenizer": str(folder)}))
    (folder / "tokenizer.json").write_text("{ }")
    assert option_inputs(Choice("mapet", {"tokenizer": str(folder)})) == before
    assert option_inputs(Choice("vlp", {"tokenizer": str(folder)})) != before
    assert option_inputs(Choice("vlp", {"tokenizer": ""})) == {}


def test_a_whole_training_keeps_its_vocabulary(run, tmp_path):
    (tmp_path / "tok").mkdir()
    path = Path(shutil.copy(WEIGHTS / "tokenizer" / "tokenizer.json", tmp_path / "tok"))
    method = VLP | {"tokenizer": str(path)}
    first = train(run, method, "first", samples_seen=8)
    config = load_encoder(first).config
    METHODS.build(Choice.of(method), encoder=VisionTransformer(config)).check_start(first)
    other_numbers(path)
    said = r"training in .*first had another tokenizer\.json than this one has; use the one in that folder, or start"
    with pytest.raises(ConfigError, match=said):
        train(run, method, "second", start=str(first))
    assert not run.folder("pretrain/second").exists()


# -- encoders alone


def test_another_method_takes_the_encoder_and_its_teacher_follows(run):
    first = run.folder("pretrain/mae")
    folder = train(run, "contrastive", "second", start=str(first), **STILL)
    method, encoder = load_method(folder), load_encoder(first).state_dict()
    assert equal(method.encoder.state_dict(), encoder, atol=1e-6)
    assert equal(method.teacher.state_dict(), encoder, atol=1e-6)
    start = told(folder)
    assert (start["whole"], start["taken"]) == (False, len(encoder))
    assert start["new_parts"] == ["predict", "project", "queue_end", "queue_keys", "queue_words"]


def test_without_its_checkpoints_a_training_gives_its_encoder(run, umd):
    shutil.rmtree(umd / "checkpoints")
    start = told(train(run, TUNED, "tuned", start=str(umd)))
    assert (start["whole"], list(start["sha256"])) == (False, ["start"])
    assert {"decoder", "time", "changes", "classes"} <= set(start["new_parts"])


def test_a_scorer_from_a_file_is_kept(run):
    first = run.folder("pretrain/mae")
    scorer = shutil.copytree(train(run, "mae", "other", seed=1), first.with_name("scorer"))
    folder = train(run, {"name": "automae", "scorer": str(scorer)}, "auto", start=str(first), **STILL)
    assert equal(load_method(folder).scorer.state_dict(), load_encoder(scorer).state_dict(), atol=1e-6)
    assert equal(load_method(folder).encoder.state_dict(), load_encoder(first).state_dict(), atol=1e-6)
    with pytest.raises(ConfigError, match=r"has the scorer '.*scorer', and this one ''; give the same, or start"):
        train(run, "automae", "again", start=str(folder))


# -- of transformers


def of_transformers(folder: Path, kind: str = "vit", **changes: object) -> Path:
    """A model as ``save_pretrained`` leaves it, no weight of it 0."""
    torch.manual_seed(0)
    config = {
        "vit": transformers.ViTConfig,
        "pooled": transformers.ViTConfig,
        "mae": transformers.ViTMAEConfig,
        "dinov2": transformers.Dinov2Config,
    }[kind](**SHAPE | changes)
    model = {
        "vit": transformers.ViTForImageClassification,
        "pooled": transformers.ViTModel,
        "mae": transformers.ViTMAEForPreTraining,
        "dinov2": transformers.Dinov2Model,
    }[kind](config)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": 32, **SEEN}))
    return folder


@pytest.mark.parametrize("kind", ["vit", "pooled", "mae"])
def test_a_vit_of_transformers_is_ours_with_the_same_features(tmp_path, kind):
    small = {"decoder_num_hidden_layers": 1, "decoder_hidden_size": 32, "decoder_num_attention_heads": 2}
    same = {"layer_norm_eps": 1e-6}  # what transformers adds to a variance unless it is told; no weight tells it
    folder = of_transformers(tmp_path / kind, kind, **same, **(small if kind == "mae" else {}))
    encoder, tower = from_transformers(folder), load_tower(folder)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.allclose(encoder(images), tower(images), atol=1e-5)
    assert encoder.config == tower.config


def test_a_training_begins_from_transformers(run, tmp_path):
    folder = train(run, "mae", "begun", start=str(of_transformers(tmp_path / "vit")), **STILL)
    assert equal(load_encoder(folder).state_dict(), from_transformers(tmp_path / "vit").state_dict(), atol=1e-6)
    assert told(folder)["taken"] == len(load_encoder(folder).state_dict())
    exported = train(run, "mae", "exported", export=True) / "transformers"
    again = train(run, "mae", "again", start=str(exported), **STILL)
    assert equal(load_encoder(again).state_dict(), load_encoder(exported.parent).state_dict(), atol=1e-6)


def test_only_weights_and_architecture_of_transformers_identify_a_start(run, tmp_path):
    start = of_transformers(tmp_path / "vit")
    with pytest.raises(Killed):
        train(run, "mae", "begun", KillAt(2), start=str(start))
    for name in ("tokenizer.json", "special_tokens_map.json"):
        (start / name).write_text("{}")
    (start / "preprocessor_config.json").write_text(json.dumps({"size": 224, **SEEN}))
    train(run, "mae", "begun", start=str(start))
    assert started(run, "mae", "begun", start=str(start)).done_before == 1
    described = json.loads((start / "config.json").read_text())
    (start / "config.json").write_text(json.dumps(described | {"layer_norm_eps": 1e-9}))
    with pytest.raises(StaleArtifact, match="its input 'start' has changed"):
        train(run, "mae", "begun", start=str(start))


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("dinov2", {"mlp_ratio": 4}, r"the dinov2 in .* has another architecture than synthgen's ViT; choose"),
        (
            "vit",
            {"hidden_act": "gelu_new"},
            r"the vit in .* another architecture than synthgen's ViT: its hidden_act is g",
        ),
        ("vit", {"intermediate_size": 64}, "its intermediate_size is 64"),
        ("vit", {"layer_norm_eps": 1e-5}, "its layer_norm_eps is 1e-05"),
        ("vit", {"qkv_bias": False}, "its qkv_bias is False"),
        ("vit", {"image_size": 64}, "has image_size 64, and that of this training image_size 32"),
    ],
)
def test_an_unsupported_architecture_is_refused_in_one_line(run, tmp_path, kind, changes, said):
    with pytest.raises(ConfigError, match=said):
        train(run, "mae", "begun", start=str(of_transformers(tmp_path / kind, kind, **changes)))


def test_the_advice_on_another_mean_works(run, tmp_path):
    start = of_transformers(tmp_path / "vit")
    mean = [0.48145466, 0.4578275, 0.40821073]
    (start / "preprocessor_config.json").write_text(json.dumps({"size": 32, **SEEN, "image_mean": mean}))
    with pytest.raises(ConfigError, match=r"give: --set encoder.mean=\[0.48145466,0.4578275,0.40821073\]$"):
        train(run, "mae", "begun", start=str(start))
    train(run, "mae", "begun", start=str(start), encoder={**ENCODER, "mean": mean})


def test_maskdit_accepts_new_classes_and_reports_the_same_of_its_average(run):
    folder = train(
        run, {"name": "maskdit", "class_labels": True}, "told", start=str(run.folder("pretrain/maskdit")), **STILL
    )
    assert (told(folder)["new_parts"], told(folder)["copied"]) == (["classes"], 2)
    method = load_method(folder)
    assert equal(method.average.classes.state_dict(), method.classes.state_dict(), atol=1e-6)
    assert method.average.classes.names == ("disc", "square")


def test_averages_and_snapshots_are_accepted_as_a_start(run):
    first = train(run, "maskdit", "first", snapshots=1)
    for place in (first / "average", *(first / "snapshots").iterdir()):
        start = told(train(run, "maskdit", place.name, start=str(place)))
        assert (start["whole"], start["copied"] > start["taken"], "decoder" in start["new_parts"]) == (
            False,
            True,
            True,
        )


def test_missing_and_unused_weights_are_named(tmp_path):
    folder = of_transformers(tmp_path / "vit")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    extra = {name.replace(".1.", ".2."): tensor for name, tensor in tensors.items() if ".layer.1." in name}
    save_file(tensors | {name: tensor.clone() for name, tensor in extra.items()}, path)
    with pytest.raises(CorruptFile, match=r"16 of its tensors are unknown to our ViT, such as encoder\.layer\.2"):
        from_transformers(folder)
    save_file({name: tensor for name, tensor in tensors.items() if name not in extra and ".1." not in name}, path)
    with pytest.raises(CorruptFile, match=r"it lacks encoder\.layer\.1\."):
        from_transformers(folder)
    save_file(tensors | {"vit.layernorm.bias": torch.zeros(31)}, path)
    with pytest.raises(CorruptFile, match=r"norm\.bias has the shape \(31,\) instead of \(32,\)"):
        from_transformers(folder)
    path.unlink()
    with pytest.raises(CorruptFile, match="or not there"):
        from_transformers(folder)
