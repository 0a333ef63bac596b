"""Whether this machine will work, and how well. Nothing is downloaded, and nothing is left behind."""

from __future__ import annotations

import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from synthgen.errors import UnknownName
from synthgen.run import versions
from synthgen.untrusted import read_file, read_json

__all__ = [
    "Attention",
    "Device",
    "Disk",
    "Examination",
    "Extra",
    "Hosted",
    "Memory",
    "Plan",
    "Shipped",
    "examine",
]

SHAPES: dict[str, tuple[int, int, int]] = {  # rows, keys and width of a head
    "cross 4096 x 77": (4096, 77, 40),  # Stable Diffusion 1.5 at 512 px
    "joint 1024 + 333": (1357, 1357, 64),  # Stable Diffusion 3 at 512 px
}
TOLERANCE = 2**-12  # of a probability: half a step, below 1, of the float16 that maps are stored in
_ADDS = {
    "tensorboard": "training curves: synthgen pretrain --set trackers=[tensorboard]",
    "lora": "LoRA weights: --set backbone.lora=...",
    "dev": "tests, lint and types",
}
_UNSAFE = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}
_WITHOUT_WEIGHTS = re.compile(r"(Scheduler|Tokenizer|TokenizerFast|Processor|Extractor)$")  # classes of a pipeline
_WEIGHTS = re.compile(  # with the number of a shard, of so many, and a variant on either side of it
    r"(?:diffusion_pytorch_model|model)(?:\.(?P<early>\w+))?(?:-\d{5}-of-(?P<of>\d{5}))?(?:\.(?P<late>\w+))?\.safetensors"
)


@dataclass(frozen=True, slots=True)
class Device:
    """What can compute."""

    name: str  # as torch calls it
    model: str
    cores: int | None  # of a CPU
    memory_total: int | None  # bytes of its own; None: it has the machine's
    memory_free: int | None
    bfloat16: bool

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes that a pipeline can be held in."""
        return ("float32", "float16", *(["bfloat16"] if self.bfloat16 else []))


@dataclass(frozen=True, slots=True)
class Plan:
    """What ``synthgen generate`` uses by default."""

    devices: tuple[str, ...]
    workers: int


@dataclass(frozen=True, slots=True)
class Attention:
    """How recording goes on one device, in one dtype, at one shape."""

    device: str
    dtype: str
    shape: str
    kernel: str  # that ``scaled_dot_product_attention`` chooses; "math" is not fused
    tells_normaliser: bool
    same_output: bool  # bit for bit
    error: float  # the largest of a recorded probability, against softmax in float64
    exact: bool


@dataclass(frozen=True, slots=True)
class Disk:
    """Where runs would be written."""

    path: str
    free: int  # bytes
    writable: bool


@dataclass(frozen=True, slots=True)
class Memory:
    """Main memory, in bytes; None where the system does not tell."""

    total: int | None
    available: int | None


@dataclass(frozen=True, slots=True)
class Shipped:
    """The model that ships with synthgen."""

    path: str
    there: bool
    safetensors: bool  # all of its weights
    bytes: int  # of weights
    loads: bool


@dataclass(frozen=True, slots=True)
class Hosted:
    """A model of ``diffusers`` that was asked for."""

    name: str
    model: str  # folder or hub id
    folder: str = ""  # where it lies on this machine; empty: nowhere
    pipeline: str = ""  # the class that its index names
    family: str = ""
    bytes: int = 0  # of the weights that would be loaded
    variant: str = ""  # of these weights
    missing: tuple[str, ...] = ()  # parts without weights


@dataclass(frozen=True, slots=True)
class Extra:
    """Libraries that synthgen does without."""

    name: str
    adds: str
    libraries: dict[str, str]  # version, or empty where it is not there
    install: str

    @property
    def missing(self) -> list[str]:
        """Its libraries that are not there."""
        return [name for name, version in self.libraries.items() if not version]


@dataclass(frozen=True, slots=True)
class Examination:
    """All that ``synthgen doctor`` tells."""

    versions: dict[str, str]
    platform: str
    devices: tuple[Device, ...]
    generate: Plan | None
    attention: tuple[Attention, ...]
    disk: Disk
    memory: Memory
    shipped: Shipped | None
    model: Hosted | None
    extras: tuple[Extra, ...]
    notes: tuple[str, ...]  # what could be better
    problems: tuple[str, ...]  # what must be put right, a line each

    def plain(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return {"ok": not self.problems, **asdict(self)}


def examine(run: Path, model: str = "") -> Examination:
    """Look at this machine; what does not work is named in ``problems`` instead of raised.

    Args:
        run: where runs would be written; it need not be there yet.
        model: a short name, folder or hub id that should work too.
    """
    problems: list[str] = []
    notes: list[str] = []
    devices: tuple[Device, ...] = ()
    plan, shipped, hosted = None, None, None
    attention: list[Attention] = []
    if _has_libraries(problems):
        devices, plan = _devices(problems), _plan()
        if len(devices) == 1 and Path("/dev/nvidiactl").exists():
            notes.append("there is an NVIDIA driver, but this torch sees no GPU; see pytorch.org for one that does")
        for device in devices:
            attention += _attention(device, problems)
        shipped = _shipped(problems)
        hosted = _hosted(model, problems, notes) if model else None
    return Examination(
        versions(),
        platform.platform(),
        devices,
        plan,
        tuple(attention),
        _disk(run, problems),
        _memory(),
        shipped,
        hosted,
        _extras(),
        tuple(notes),
        tuple(problems),
    )


# -- libraries


def _has_libraries(problems: list[str]) -> bool:
    """Whether what synthgen needs is installed, and torch can be imported; an old version is only named."""
    missing = []
    for extra, name, least in _requirements():
        if extra:
            continue
        version = _version(name)
        if not version:
            missing.append(name)
        elif _numbers(version) < _numbers(least):
            problems.append(f"{name} {version} is too old; update it with: pip install '{name}>={least}'")
    if missing:
        problems.append(f"not installed: {', '.join(missing)}; install them with: pip install {' '.join(missing)}")
        return False
    try:
        import torch  # noqa: F401
    except (ImportError, OSError) as error:
        problems.append(f"torch cannot be imported ({_reason(error)}); install it again, see pytorch.org")
        return False
    return True


def _extras() -> tuple[Extra, ...]:
    groups: dict[str, list[str]] = {}
    for extra, name, _ in _requirements():
        if extra:
            groups.setdefault(extra, []).append(name)
    installs = {extra: f"pip install 'synthgen[{extra}]'" for extra in groups}
    return tuple(
        Extra(group, _ADDS.get(group, ""), {name: _version(name) for name in names}, installs[group])
        for group, names in sorted(groups.items(), key=lambda item: (item[0] == "dev", item[0]))
    )


def _requirements() -> list[tuple[str, str, str]]:
    """What pyproject.toml asks for: extra ("" for what is always needed), library, least version."""
    found = []
    for line in metadata.requires("synthgen") or ():
        needed, _, marker = line.partition(";")
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)", marker)
        if marker and not extra:
            continue  # of some platforms only
        name, least = re.match(r"[\w.-]+", needed), re.search(r">=\s*([\w.]+)", needed)
        if name:
            found.append((extra[1] if extra else "", name[0], least[1] if least else "0"))
    return found


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:3])


# -- devices


def _devices(problems: list[str]) -> tuple[Device, ...]:
    import torch

    found = [Device("cpu", _cpu(), os.cpu_count(), None, None, bfloat16=True)]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        name = f"cuda:{index}"
        try:
            with torch.cuda.device(index):
                free, total = torch.cuda.mem_get_info(index)
                bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
            found.append(Device(name, torch.cuda.get_device_name(index), None, total, free, bfloat16))
        except RuntimeError as error:
            problems.append(f"{name} cannot be used ({_reason(error)}); leave it out with CUDA_VISIBLE_DEVICES")
    if torch.backends.mps.is_available():
        total = torch.mps.recommended_max_memory()
        free = total - torch.mps.driver_allocated_memory()
        newer = torch.backends.mps.is_macos_or_newer(14, 0)
        found.append(Device("mps", "Apple GPU", None, total, free, bfloat16=newer))
    return tuple(found)


def _cpu() -> str:
    try:
        told = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        told = ""
    model = re.search(r"^model name\s*:\s*(.+)$", told, re.MULTILINE)
    return model[1].strip() if model else platform.processor() or platform.machine()


def _plan() -> Plan:
    from synthgen.devices import devices_for
    from synthgen.stages.generate import Generate

    devices = devices_for(Generate(prompts=""))
    return Plan(tuple(dict.fromkeys(devices)), len(devices))


def _attention(device: Device, problems: list[str]) -> list[Attention]:
    found = []
    for dtype in device.dtypes:
        try:
            found += [_attention_at(device.name, dtype, shape) for shape in SHAPES]
        except (RuntimeError, TypeError) as error:
            problems.append(f"attention on {device.name} in {dtype} does not run ({_reason(error)}); use another dtype")
    problems += [
        f"recording on {item.device} in {item.dtype} is not exact at {item.shape}: "
        + (f"a probability is off by {item.error:.1e}" if item.same_output else "it changes the image")
        + "; use another dtype or another version of torch"
        for item in found
        if not item.exact
    ]
    return found


def _attention_at(device: str, dtype: str, shape: str) -> Attention:
    """Compare with the public function and with a softmax in float64, on peaked attention of one head."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend

    from synthgen.attention.kernel import attention_with_normaliser, log_normaliser
    from synthgen.diffusion.loading import DTYPES

    rows, keys, width = SHAPES[shape]
    generator, scale = torch.Generator().manual_seed(0), width**-0.5
    query, key, value = (
        (torch.randn(1, 1, length, width, generator=generator) * spread).to(device, DTYPES[dtype])
        for length, spread in ((rows, 4), (keys, 1), (keys, 1))
    )
    with torch.inference_mode():
        kernel = SDPBackend(torch._fused_sdp_choice(query, key, value)).name.lower().removesuffix("_attention")
        output, told = attention_with_normaliser(query, key, value)
        same = torch.equal(output, F.scaled_dot_product_attention(query, key, value))
        normaliser = log_normaliser(query, key, scale=None) if told is None else told
        recorded = (query.float() * scale @ key.float().transpose(-1, -2) - normaliser[..., None]).exp()
        logits = query.cpu().double() * scale @ key.cpu().double().transpose(-1, -2)  # not every device has float64
        difference = (recorded.cpu().double() - logits.softmax(-1)).abs()
        error = float(difference.nan_to_num(nan=1.0, posinf=1.0).max())
    return Attention(device, dtype, shape, kernel, told is not None, same, error, same and error <= TOLERANCE)


# -- disk and memory


def _disk(run: Path, problems: list[str]) -> Disk:
    folder = run.absolute()
    free, writable = 0, False
    try:
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
        writable = True
    except OSError as error:
        problems.append(f"{run} cannot be written to ({error.strerror or error}); choose another --run folder")
    return Disk(str(run), free, writable)


def _memory() -> Memory:
    try:
        told = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        known = hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names
        return Memory(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else None, None)
    kilobytes = {name: int(value) for name, value in re.findall(r"^(\w+):\s+(\d+) kB", told, re.MULTILINE)}
    total, available = (kilobytes.get(name) for name in ("MemTotal", "MemAvailable"))
    return Memory(total and total * 1024, available and available * 1024)


# -- models


def _shipped(problems: list[str]) -> Shipped:
    from synthgen import tiny
    from synthgen.backbones import BACKBONES

    files = [path for path in tiny.WEIGHTS.rglob("*") if path.is_file()]
    weights = [path for path in files if path.suffix == ".safetensors"]
    safe = bool(weights) and not any(path.suffix in _UNSAFE for path in files)
    loads = False
    try:
        BACKBONES.build("tiny", device="cpu")
        loads = True
    except Exception as error:  # whatever is wrong with files and libraries ends up here
        problems.append(f"the shipped model does not load ({_reason(error)}); install synthgen again")
    if loads and not safe:
        problems.append(f"the shipped model has weights that are not safetensors, in {tiny.WEIGHTS}; delete them")
    return Shipped(str(tiny.WEIGHTS), bool(files), safe, sum(path.stat().st_size for path in weights), loads)


def _hosted(name: str, problems: list[str], notes: list[str]) -> Hosted:
    from synthgen.diffusion import FAMILIES, SHORT_NAMES

    model = SHORT_NAMES.get(name, name)
    folder = _on_this_machine(model)
    if folder is None:
        if "/" in model:
            problems.append(f"the model {model!r} is not on this machine; download it first with: hf download {model}")
        else:
            problems.append(f"{UnknownName.among('model', name, SHORT_NAMES)}; a folder or a hub id will do too")
        return Hosted(name, model)
    try:
        index = dict(read_json(read_file(folder / "model_index.json")))
    except (OSError, ValueError, TypeError) as error:
        problems.append(f"{folder}/model_index.json cannot be read ({_reason(error)}); download {model} again")
        return Hosted(name, model, str(folder))
    pipeline = str(index.get("_class_name", "model without a class"))
    family = FAMILIES.get(pipeline)
    if family is None:
        known = ", ".join(FAMILIES)
        problems.append(f"{model!r} is a {pipeline}, whose attention synthgen does not know; known: {known}")
    found = {part: _weights(folder / part) for part in _parts_with_weights(index)}
    common = set.intersection(*(set(variants) for variants in found.values())) if found else set()
    variant = min(common, default="")  # the plain one is ""
    missing = tuple(part for part, variants in found.items() if variant not in variants)
    if missing:
        problems.append(
            f"{model!r} has no safetensors weights for {', '.join(missing)} on this machine; "
            f"download all of it, for example with: hf download {model}"
        )
    if variant:
        notes.append(f"{model} has only weights of a variant; load them with: --set backbone.variant={variant}")
    total = sum(variants.get(variant, 0) for variants in found.values())
    return Hosted(name, model, str(folder), pipeline, family.__name__ if family else "", total, variant, missing)


def _on_this_machine(model: str) -> Path | None:
    """The folder of a model: its own, or that of the hub's cache."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, local_files_only=True))
    except (OSError, ValueError):  # nothing in the cache, no id of the hub
        return None


def _parts_with_weights(index: dict[str, Any]) -> Iterable[str]:
    for part, value in index.items():
        described = isinstance(value, list) and len(value) == 2 and all(value)  # [None, None]: saved without it
        if described and part != "safety_checker" and not _WITHOUT_WEIGHTS.search(str(value[1])):
            yield part


def _weights(folder: Path) -> dict[str, int]:
    """The bytes of each variant of a part's weights that is whole."""
    shards: dict[tuple[str, int], list[int]] = {}
    for path in folder.glob("*.safetensors"):
        name = _WEIGHTS.fullmatch(path.name)
        if name and path.is_file():  # the cache has links, which may lead nowhere
            kind = (name["early"] or name["late"] or "", int(name["of"] or 1))
            shards.setdefault(kind, []).append(path.stat().st_size)
    return {variant: sum(sizes) for (variant, of), sizes in shards.items() if len(sizes) == of}


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
