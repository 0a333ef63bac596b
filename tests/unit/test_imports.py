"""Imports go one way through the house."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2] / "synthgen"

#: From the cellar to the roof: a module imports from its own floor or below.
FLOORS = [
    {"redact"},
    {"errors"},
    {"progress", "records", "tiny.__init__"},
    {"config", "devices", "image", "log", "mask_shape", "stores", "text", "untrusted"},
    {"registry", "codecs", "prompts", "prompt_copy", "entries", "run", "units", "graphcut", "maxflow"},
    {"columns", "captions", "tallies", "rejected", "json_types", "validation"},
    {"stages.__init__"},
    {"attention", "models", "augment", "datasets", "mask_controls", "loader", "diffusion"},
    {"backbones", "refiners", "filters", "methods", "evaluators", "engines", "card", "mask_quality"},
    {"train"},
    {"stages", "status", "doctor"},
    {"viewers"},
    {"runner", "export"},
    {"api", "pipeline", "console", "plan", "schema"},
    {"cli", "flags", "options"},
    {"__main__", "__init__", "tiny"},  # tiny: the recipe of the shipped model uses all of the house
]
FAMILIES = {"backbones", "refiners", "filters", "methods", "evaluators", "engines", "stages"}


def room(module: str) -> str:
    name = module.removeprefix("synthgen").removeprefix(".") or "__init__"
    if name.removesuffix(".__init__") in ("stages", "tiny"):  # the contract and the constants lie lower than the rest
        return f"{name.removesuffix('.__init__')}.__init__"
    return name.partition(".")[0]


def floor(module: str) -> int:
    return next(level for level, rooms in enumerate(FLOORS) if room(module) in rooms)


def imports(path: Path, *, at_run_time: bool = True):
    """The synthgen modules a file imports, without those for type checkers only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "synthgen":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                path = ROOT.parent / whole.replace(".", "/")
                if whole != "synthgen.__version__":
                    yield whole if path.is_dir() or path.with_suffix(".py").exists() else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] == "synthgen")


MODULES = sorted(
    path.relative_to(ROOT.parent).with_suffix("").as_posix().replace("/", ".") for path in ROOT.rglob("*.py")
)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_from_its_own_floor_or_below(module):
    path = ROOT.parent / (module.replace(".", "/") + ".py")
    for imported in imports(path):
        assert floor(imported) <= floor(module), f"{module} imports {imported}, which is above it"


@pytest.mark.parametrize("module", [module for module in MODULES if room(module) in FAMILIES])
def test_parts_of_a_family_do_not_import_each_other(module):
    path = ROOT.parent / (module.replace(".", "/") + ".py")
    package, _, name = module.rpartition(".")
    for imported in imports(path):
        family, _, other = imported.rpartition(".")
        sibling = family == package and other not in (name, "__init__") and not other.startswith("_")
        assert not sibling, f"{module} imports its sibling {imported}"
