"""Kernels that a computation launches and bytes that they move, counted on fake tensors: nothing is computed.

An operation of PyTorch's eager mode is one kernel; one that returns views or reserves memory is none; `SEVERAL` has
those that are more. Ours launch what `LAUNCHES` says. A kernel moves every distinct tensor that it reads and that it
writes once: what a cache holds between kernels, and what a kernel reads again, is not seen.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MEMORY, PRODUCTS, ATTENTION = "memory-bound", "products", "attention"
KINDS = (MEMORY, PRODUCTS, ATTENTION)
PRODUCT_OPS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward"}
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
WRITE_ONLY = {"copy_", "fill_", "zero_"}  # what they change they do not read
SEVERAL = {"select_backward": 2, "slice_backward": 2}  # zeros, then a part
# Our operation -> launches on a GPU, for a call as the DiT makes it: deterministic attention is off.
LAUNCHES = {
    "adaln": 1,
    "adaln_backward": 2,
    "rope3d": 1,
    "rope3d_": 1,
    "rope3d_backward": 1,
    "skiparse_attention": 1,
    "skiparse_attention_backward": 4,  # row sums, zeros for dq, the kernel itself, dq scaled to its type
}


@dataclass(frozen=True)
class Key:
    """What is counted together: one of `KINDS`, and the operation's name."""

    kind: str
    op: str


class Traffic(TorchDispatchMode):
    """Within it operations are counted: `kernels` and `bytes` by `Key`."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[Key] = Counter()
        self.bytes: Counter[Key] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: tuple = (), options: dict | None = None) -> Any:
        result = function(*arguments, **(options or {}))
        name = function._schema.name.split("::")[1]
        given = list(_tensors((arguments, options or {})))
        changed = list(_changed(function._schema, arguments, options or {}))
        made = [x for x in _tensors(result) if not any(_shares_memory(x, other) for other in given)]
        if name in ALLOCATIONS or not (made or changed):
            return result
        key = Key(_kind(function.namespace, name), name)
        self.kernels[key] += launches(function.namespace, name)
        read = [x for x in given if not (name in WRITE_ONLY and any(x is other for other in changed))]
        self.bytes[key] += _distinct_bytes(read) + _distinct_bytes([*made, *changed])
        return result


def launches(namespace: str, name: str) -> int:
    """Kernels of one call. Raises KeyError for an operation of ours that `LAUNCHES` does not know."""
    return LAUNCHES[name] if namespace == "osp_fast" else SEVERAL.get(name, 1)


def _kind(namespace: str, name: str) -> str:
    if "attention" in name:
        return ATTENTION
    return PRODUCTS if namespace == "aten" and name in PRODUCT_OPS else MEMORY


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _changed(schema: torch.FunctionSchema, arguments: tuple, options: dict) -> Iterator[Tensor]:
    """The tensors among the arguments that the operation writes to."""
    for place, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from _tensors(arguments[place] if place < len(arguments) else options.get(argument.name))


def _shares_memory(x: Tensor, other: Tensor) -> bool:
    return x.untyped_storage()._cdata == other.untyped_storage()._cdata


def _distinct_bytes(tensors: list[Tensor]) -> int:
    """Bytes of the elements of these tensors, those of equal views once, and expanded ones once."""
    sizes = {}
    for x in tensors:
        lengths = [length for length, stride in zip(x.shape, x.stride(), strict=True) if stride]
        place = (x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride())
        sizes[place] = torch.Size(lengths).numel() * x.element_size()
    return sum(sizes.values())
