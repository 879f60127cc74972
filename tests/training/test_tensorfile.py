"""Tensors to a file and back, strictly."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from osp_fast.errors import UserError
from osp_fast.seeding import torch_generator
from osp_fast.training.tensorfile import read_tensors_into, write_tensors


def tensors() -> dict[str, torch.Tensor]:
    drawn = torch.randn(7, 3, generator=torch_generator("test"))
    return {
        "codes": torch.arange(5, dtype=torch.uint8),
        "step": torch.tensor(3.0),
        "transposed": drawn.t(),
        "half": drawn.to(torch.bfloat16),
        "wide": drawn.double(),
        "count": torch.arange(3),
        "empty": torch.zeros(0, 4),
    }


def test_what_is_written_is_plain_safetensors(tmp_path):
    write_tensors(tmp_path / "x.safetensors", tensors())
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name


def test_reading_fills_the_given_tensors(tmp_path):
    write_tensors(tmp_path / "x.safetensors", tensors())
    filled = {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}
    read_tensors_into(tmp_path / "x.safetensors", filled, "fix")
    assert all(torch.equal(filled[name], tensor) for name, tensor in tensors().items())


def damage(file, kind: str) -> None:
    saved = load_file(file)
    if kind == "missing":
        file.unlink()
    elif kind in ("truncated", "cut in the header"):
        data = file.read_bytes()
        file.write_bytes(data[: -3 if kind == "truncated" else 20])
    elif kind == "lacks":
        save_file({"a": saved["a"]}, file)
    elif kind == "unknown":
        save_file({**saved, "c": saved["a"].clone()}, file)
    elif kind == "shape":
        save_file({**saved, "b": torch.ones(3)}, file)
    else:
        save_file({**saved, "b": saved["b"].double()}, file)


@pytest.mark.parametrize(
    "kind, words",
    [
        ("missing", "cannot be read"),
        ("truncated", "cannot be read"),
        ("cut in the header", "cannot be read"),
        ("lacks", "lacks the tensor b"),
        ("unknown", "has the unknown tensor c"),
        ("shape", r"b is float32 \(3,\), not float32 \(2,\)"),
        ("dtype", r"b is float64 \(2,\), not float32 \(2,\)"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_filled(tmp_path, kind, words):
    file = tmp_path / "x.safetensors"
    write_tensors(file, {"a": torch.ones(2), "b": torch.ones(2)})
    damage(file, kind)
    target = {"a": torch.zeros(2), "b": torch.zeros(2)}
    with pytest.raises(UserError, match=f"x.safetensors.*{words}.*: do this"):
        read_tensors_into(file, target, "do this")
    assert not target["a"].any() and not target["b"].any()
