"""Prompts in, labelled training shards and a trained encoder out.

The public names load on first use, so that ``import synthgen`` (and ``synthgen --help``) imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Choice": "synthgen.config",
    "Generation": "synthgen.records",
    "Maps": "synthgen.records",
    "Plan": "synthgen.plan",
    "Run": "synthgen.run",
    "Summary": "synthgen.runner",
    "SynthgenError": "synthgen.errors",
    "UnitsFailed": "synthgen.errors",
    "Validation": "synthgen.validation",
    "WordMasks": "synthgen.records",
    "attend": "synthgen.api",
    "evaluate": "synthgen.api",
    "export_dataset": "synthgen.api",
    "filter": "synthgen.api",
    "generate": "synthgen.api",
    "load_encoder": "synthgen.models.vit",
    "masks": "synthgen.api",
    "plan_pipeline": "synthgen.api",
    "plan_stage": "synthgen.api",
    "pretrain": "synthgen.api",
    "run_pipeline": "synthgen.api",
    "samples": "synthgen.api",
    "shards": "synthgen.api",
    "validate": "synthgen.api",
    "view": "synthgen.api",
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'synthgen' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
