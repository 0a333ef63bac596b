"""Which libraries there are, of those that synthgen needs and of those it does without."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import metadata

from synthgen.errors import one_line

__all__ = ["Extra", "extras", "has_libraries"]

_ADDS = {
    "tensorboard": "training curves: synthgen pretrain --set trackers=[tensorboard]",
    "fast": "AttentionCut several times as fast, the same masks",
    "lora": "LoRA weights: --set backbone.lora=...",
    "dev": "tests, lint and types",
}


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


def has_libraries(problems: list[str]) -> bool:
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
        problems.append(f"torch cannot be imported ({one_line(error)}); install it again, see pytorch.org")
        return False
    return True


def extras() -> tuple[Extra, ...]:
    """What can be installed beside synthgen, and what of it is there."""
    groups: dict[str, list[str]] = {}
    for extra, name, _ in _requirements():
        if extra:
            groups.setdefault(extra, []).append(name)
    return tuple(
        Extra(group, _ADDS.get(group, ""), {name: _version(name) for name in names}, f"pip install {' '.join(names)}")
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
