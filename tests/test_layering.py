"""The layers: imports and includes point down only, inline PTX has one place, and files stay short enough to read."""

from __future__ import annotations

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
MAX_LINES = 420

# From top to bottom. A module imports those below its own line.
MODULES = (
    ("__main__",),
    ("nn",),
    ("__init__",),  # the public names
    ("api",),
    ("primitive",),
    ("cuda",),
    ("launch", "order", "decode"),
    ("reference",),
    ("append", "merge"),
    ("quantize", "heuristics", "jit", "codegen", "tensor_map", "_ffi"),
    ("kernel_spec",),
    ("canonical",),
    ("validate_cache",),
    ("validate",),
    ("spec",),
)
# A kernel file includes those of lines below its own; spec.h and wgmma.h are generated.
KERNEL_FILES = (
    ("mainloop.cuh", "decode/multiply.cuh"),
    ("epilogue.cuh", "decode/join.cuh", "decode/load.cuh"),
    ("prepare.cuh", "load.cuh", "mask.cuh", "schedule.cuh", "softmax.cuh", "total.cuh", "decode/storage.cuh"),
    ("softcap.cuh", "storage.cuh", "rows.cuh"),
    ("fragment.cuh", "parts.cuh", "segments.cuh"),
    ("tile.cuh",),
    ("keys.cuh",),
    ("operands.cuh", "order.cuh"),
    ("params.h", "spec.h", "wgmma.h"),
)


def files(folder: str, *suffixes: str) -> list[str]:
    """Files of a folder and below, as paths from the root."""
    paths = (path for path in (ROOT / folder).rglob("*") if path.suffix in suffixes)
    return sorted(str(path.relative_to(ROOT)) for path in paths)


def line_of(name: str, lines) -> int:
    """The line that names a module or file, counted from the top."""
    found = [number for number, names in enumerate(lines) if name in names]
    assert found, f"{name} is new: give it its place in tests/test_layering.py"
    return found[0]


def imported_modules(path: str) -> set[str]:
    """Modules of the package that a file imports anywhere, functions included; those of a subpackage by its name."""
    modules = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            modules |= {f"{alias.name}.__init__" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    own = {module.split(".")[1] for module in modules if module.startswith("jax_flash.")}
    known = {name for names in MODULES for name in names} | {path.stem for path in (ROOT / "jax_flash").glob("*.py")}
    return {name if name in known else "__init__" for name in own}


def includes(path: str) -> list[str]:
    """What a file includes with quotation marks."""
    return re.findall(r'^#include "([^"]+)"', (ROOT / path).read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", files("jax_flash", ".py"))
def test_imports_point_down(path):
    module = pathlib.Path(path).parts[1].removesuffix(".py")
    for imported in imported_modules(path) - {module}:
        assert line_of(imported, MODULES) > line_of(module, MODULES), f"{module} imports {imported}"


@pytest.mark.parametrize("path", files("jax_flash/kernels", ".cu", ".cuh", ".h"))
def test_kernel_includes_point_down(path):
    name = path.removeprefix("jax_flash/kernels/")
    for included in includes(path):
        if name.startswith("hopper/") or included.startswith("hopper/"):
            assert included.startswith("hopper/"), f"{name} includes {included}"
        elif not name.endswith(".cu"):
            assert line_of(included, KERNEL_FILES) > line_of(name, KERNEL_FILES), f"{name} includes {included}"


@pytest.mark.parametrize("path", files("ffi", ".cc", ".h"))
def test_handlers_know_nothing_of_kernels_but_params(path):
    for included in includes(path):
        assert (
            included == "jax_flash/kernels/params.h"
            or included.startswith(("ffi/", "xla/ffi/"))
            or included == "cuda.h"
        )


def test_inline_ptx_has_one_place():
    users = [
        path
        for path in files("jax_flash", ".py", ".cu", ".cuh", ".h")
        if re.search(r"\basm\b", (ROOT / path).read_text())
    ]
    elsewhere = [path for path in users if not path.startswith("jax_flash/kernels/hopper/")]
    assert elsewhere == ["jax_flash/codegen.py"]  # wgmma, whose text depends on the shape


@pytest.mark.parametrize("folder", ["jax_flash", "ffi", "tests", "examples", "benchmarks"])
def test_files_are_short(folder):
    lines = {path: (ROOT / path).read_text().count("\n") for path in files(folder, ".py", ".cc", ".h", ".cu", ".cuh")}
    assert {path: count for path, count in lines.items() if count > MAX_LINES} == {}
