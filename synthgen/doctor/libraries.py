"""Which of the required and optional libraries are installed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import metadata

from synthgen.errors import one_line

__all__ = ["Extra", "check_libraries", "extras"]

_ADDS = {
    "tensorboard": "training curves: synthgen pretrain --set trackers=[tensorboard]",
    "detection": "the evaluator detection",
    "ray": "the engine ray",
    "s3": "runs in s3://",
    "opencv": "the refiner grabcut",
    "fast": "a faster solver for attentioncut; the same masks",
    "lora": "LoRA weights: --set backbone.lora=...",
    "report": "figures of benchmarks/learning.py",
    "dev": "tests, lint and types",
}


@dataclass(frozen=True, slots=True)
class Extra:
    """A group of optional libraries."""

    name: str
    adds: str
    libraries: dict[str, str]  # version, or empty if not installed
    install: str

    @property
    def missing(self) -> list[str]:
        """Its libraries that are not installed."""
        return [name for name, version in self.libraries.items() if not version]


def check_libraries(problems: list[str]) -> bool:
    """Whether all required libraries are installed and torch can be imported; old versions are only reported."""
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
        problems.append(f"torch cannot be imported ({one_line(error)}); install it again, see pytorch.org")
        return False
    return True


def extras() -> tuple[Extra, ...]:
    """The optional groups, and which of their libraries are installed."""
    groups: dict[str, list[str]] = {}
    for extra, name, _ in _requirements():
        if extra:
            groups.setdefault(extra, []).append(name)
    return tuple(
        Extra(group, _ADDS.get(group, ""), {name: _version(name) for name in names}, f"pip install {' '.join(names)}")
        for group, names in sorted(groups.items(), key=lambda item: (item[0] == "dev", item[0]))
    )


def _requirements() -> list[tuple[str, str, str]]:
    """The requirements in pyproject.toml: extra ("" if always required), library, minimum version."""
    found = []
    for line in metadata.requires("synthgen") or ():
        needed, _, marker = line.partition(";")
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)", marker)
        if marker and not extra:
            continue  # for some platforms only
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
