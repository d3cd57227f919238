"""Imports point down the house list, in Python and in C++; docs/architecture.md draws the house."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "python" / "fastkernels"
CSRC = ROOT / "csrc"

# Top to bottom; a module may import its own layer and those below. "" is fastkernels/__init__.py.
PYTHON_LAYERS = (
    ("", "cli", "generate", "inspect", "evaluate", "serving", "integrations", "tune"),
    ("llm",),
    ("runtime",),
    ("speculative", "guided"),
    ("compiler",),
    ("quantize", "lora", "distributed"),
    ("models", "checkpoint"),
    ("ops",),
    ("progress",),
    ("config",),
    ("errors", "_library", "_C"),
)
PYTHON_LEVEL = {name: level for level, names in enumerate(PYTHON_LAYERS) for name in names}

# What a folder of csrc may include beside itself; a kernel family is every folder that is not named here.
CSRC_MAY_INCLUDE = {
    "common": set(),
    "include": {"common"},
    "host": {"include", "common"},
}
FAMILY_MAY_INCLUDE = {"include", "host", "common"}
FRAMEWORKS = ("torch/", "ATen/", "c10/", "pybind11/", "Python.h")
CUDA_HEADERS = re.compile(r"cuda|cooperative_groups|vector_types\.h|\.cuh$")
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)


def python_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def csrc_files() -> list[Path]:
    return sorted(path for path in CSRC.rglob("*") if path.suffix in {".h", ".cuh", ".cpp", ".cu"})


def layer_of(module: str) -> str:
    """The first name below fastkernels of a module's dotted name."""
    return module.partition("fastkernels")[2].lstrip(".").split(".")[0]


def imported_modules(path: Path) -> set[str]:
    """Dotted names of what a file imports from this package, wherever the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.relative_to(ROOT)}: relative import; write the full name"
            if node.module == "fastkernels":  # a module, or a name of the package's face
                found |= {f"fastkernels.{alias.name}" for alias in node.names}
            elif node.module:
                found.add(node.module)
    return {name for name in found if name == "fastkernels" or name.startswith("fastkernels.")}


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_python_imports_point_down(path: Path) -> None:
    own = path.relative_to(PACKAGE).with_suffix("").parts[0].replace("__init__", "")
    assert own in PYTHON_LEVEL, f"{own!r} has no place in PYTHON_LAYERS"
    for name in imported_modules(path):
        layer = layer_of(name)
        level = PYTHON_LEVEL.get(layer, 0)  # a name that is no module comes from the face
        assert level >= PYTHON_LEVEL[own], f"{path.relative_to(ROOT)} imports {name}, which is above it"


@pytest.mark.parametrize("path", csrc_files(), ids=lambda path: str(path.relative_to(CSRC)))
def test_csrc_includes_point_down(path: Path) -> None:
    folder = path.relative_to(CSRC).parts[0]
    if folder == "bindings":
        return
    allowed = CSRC_MAY_INCLUDE.get(folder, FAMILY_MAY_INCLUDE) | {folder}
    for name in INCLUDE.findall(path.read_text(encoding="utf-8")):
        assert not name.startswith(FRAMEWORKS), (
            f"{path.relative_to(ROOT)} includes {name}: only bindings/ may"
        )
        if "/" in name and (CSRC / name).is_file():
            target = name.split("/")[0]
        elif (CSRC / "include" / name).is_file():
            target = "include"
        else:
            continue  # the standard library or the CUDA toolkit
        assert target in allowed, f"{path.relative_to(ROOT)} includes {name}, which is not below it"


@pytest.mark.parametrize(
    "path",
    [path for path in csrc_files() if path.suffix == ".cpp"],
    ids=lambda path: str(path.relative_to(CSRC)),
)
def test_cpp_needs_no_cuda_toolkit(path: Path) -> None:
    for name in INCLUDE.findall(path.read_text(encoding="utf-8")):
        assert not CUDA_HEADERS.search(name), f"{path.relative_to(ROOT)} includes {name}"
