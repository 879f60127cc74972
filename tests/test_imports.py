"""The direction of imports: kernels at the bottom, engines on top, entry points above all."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEAVES = {"errors", "files", "seeding", "config"}
ALLOWED = {
    "kernels": set(),
    "errors": set(),
    "files": set(),
    "seeding": set(),
    "config": set(),
    "checks": LEAVES,
    "cli": LEAVES | {"checks"},
    "progress": LEAVES,
    "device": LEAVES | {"kernels"},
    "models": LEAVES | {"kernels"},
    "data": LEAVES,
    "diffusion": LEAVES,
    "parallel": LEAVES | {"device", "kernels", "models"},
    "engine": LEAVES | {"kernels", "models", "parallel"},
    "training": LEAVES | {"progress", "device", "models", "diffusion", "data", "parallel", "engine"},
    "pipeline": LEAVES | {"device", "kernels", "models", "diffusion", "parallel", "engine"},
    "sample_files": LEAVES | {"data"},
    "sampling": LEAVES
    | {"checks", "progress", "device", "models", "diffusion", "data", "parallel", "engine", "training", "pipeline"}
    | {"sample_files"},
    "validation": LEAVES | {"device", "models", "diffusion", "data", "training", "pipeline", "sample_files"},
    "assets": LEAVES | {"cli", "progress", "models", "data"},
}
ENTRY_POINTS = {"train", "sample", "serve", "inspect", "demo", "reconstruct", "encode"}
BENCH_MAY_NOT_IMPORT = {"tests", "kernels", "av", "PIL", "diffusers", "transformers", "tensorboard"}
KERNELS_MAY_IMPORT = {"torch", "triton", "osp_fast"} | {
    "collections",
    "contextlib",
    "contextvars",
    "dataclasses",
    "functools",
    "math",
    "os",
    "typing",
}


def modules() -> list[tuple[str, Path]]:
    found = [("kernels", path) for path in (ROOT / "kernels").rglob("*.py")]
    for path in (ROOT / "osp_fast").rglob("*.py"):
        part = path.relative_to(ROOT / "osp_fast").parts[0]
        if part != "__init__.py":
            found.append((part.removesuffix(".py"), path))
    return found


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("part, path", modules(), ids=lambda value: str(value).rsplit("/", 1)[-1])
def test_direction(part, path):
    ours = {name.split(".")[1] for name in imported(path) if name.startswith("osp_fast.")} - {part, "__version__"}
    if part in ENTRY_POINTS:
        assert not ours & (ENTRY_POINTS - {part}), f"{path}: an entry point imports another"
    else:
        assert part in ALLOWED, f"{path}: say in ALLOWED what this part may import"
        assert ours <= ALLOWED[part], f"{path} imports {sorted(ours - ALLOWED[part])}"
    assert not any(name.split(".")[0] in ("bench", "tests", "kernels") for name in imported(path))
    if part == "kernels":
        assert {name.split(".")[0] for name in imported(path)} <= KERNELS_MAY_IMPORT


def test_every_part_is_seen():
    assert {"kernels", "models", "data", "diffusion", "training", "pipeline"} <= {part for part, _ in modules()}


@pytest.mark.parametrize("path", sorted((ROOT / "bench").rglob("*.py")), ids=lambda path: path.stem)
def test_bench_needs_torch_and_triton_only(path):
    """It may import any part of ours; kernels are `osp_fast.kernels` there too.

    What videos are read with is measured beside PyAV, which is imported when that is.
    """
    found = {name.split(".")[0] for name in imported(path)} & BENCH_MAY_NOT_IMPORT
    if path.stem == "data_readers":
        at_once = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert found == {"av"} and "av" not in {alias.name for node in at_once for alias in node.names}
    else:
        assert not found


def test_kernels_package_is_a_docstring():
    body = ast.parse((ROOT / "kernels/__init__.py").read_text()).body
    assert len(body) == 1 and isinstance(body[0], ast.Expr)
