"""Named tensors in one safetensors file: written as a stream, read strictly into tensors that exist."""

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from osp_fast.errors import UserError

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.int8: "I8",
}


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors of any device as a safetensors file and bring it to the disk (fsync).

    One tensor at a time passes through CPU memory: the state of a large optimizer needs no second copy there.
    Layout: https://huggingface.co/docs/safetensors (8 bytes header length, JSON header, data without holes).

    Raises:
        OSError: the file cannot be written.
    """
    # Wide elements first: then every tensor starts at a multiple of its element size, as readers expect.
    order = sorted(tensors, key=lambda name: -tensors[name].element_size())
    header, offset = {}, 0
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = dict(dtype=DTYPE_NAMES[tensor.dtype], shape=list(tensor.shape), data_offsets=[offset, end])
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            out.write(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        out.flush()
        os.fsync(out.fileno())


def read_tensors_into(file: Path, tensors: Mapping[str, Tensor], fix: str) -> None:
    """Fill `tensors` from a safetensors file that must hold exactly these names, shapes and dtypes.

    Nothing is filled unless everything fits.

    Args:
        fix: what the user should do if it does not fit; ends the error's sentence.

    Raises:
        UserError: the file is missing, truncated or does not fit.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt", device="cpu") as source:
            found = set(source.keys())
            for name in sorted(found ^ tensors.keys()):
                problem = "has the unknown tensor" if name in found else "lacks the tensor"
                raise UserError(f"{file} {problem} {name}: {fix}")
            for name, tensor in tensors.items():
                part = source.get_slice(name)
                saved = (part.get_dtype(), tuple(part.get_shape()))
                wanted = (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
                if saved != wanted:
                    raise UserError(f"{file}: {name} is {saved[0]} {saved[1]}, not {wanted[0]} {wanted[1]}: {fix}")
            for name, tensor in tensors.items():
                tensor.copy_(source.get_tensor(name))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read ({error}): {fix}") from error
