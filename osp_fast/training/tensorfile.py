"""Named tensors in one safetensors file: written whole, read strictly into tensors that exist."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from osp_fast.errors import UserError
from osp_fast.files import sync


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors of any device as a safetensors file and bring it to the disk (fsync).

    Raises:
        OSError, SafetensorError: the file cannot be written.
    """
    from safetensors.torch import save_file

    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, file)
    sync(file)


def read_tensors_into(file: Path, tensors: Mapping[str, Tensor], fix: str) -> None:
    """Fill `tensors` from a safetensors file that must hold exactly these names, shapes and dtypes.

    Nothing is filled unless everything fits.

    Args:
        fix: what the user should do if it does not fit; ends the error's sentence.

    Raises:
        UserError: the file is missing, truncated or does not fit.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read ({error}): {fix}") from error
    for name in sorted(found.keys() ^ tensors.keys()):
        problem = "has the unknown tensor" if name in found else "lacks the tensor"
        raise UserError(f"{file} {problem} {name}: {fix}")
    for name, tensor in tensors.items():
        if (found[name].dtype, found[name].shape) != (tensor.dtype, tensor.shape):
            raise UserError(f"{file}: {name} is {_kind(found[name])}, not {_kind(tensor)}: {fix}")
    for name, tensor in tensors.items():
        tensor.copy_(found[name])


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
