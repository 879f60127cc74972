"""Bytes of global memory that kernels touch in Triton's interpreter.

    with count_traffic() as moved:
        call()
    moved.loaded, moved.stored    # bytes over all launches
    moved.launches                # one `Launch` per `kernel[grid](...)`, in order

Within a launch each byte counts once for loads and once for stores, however often it is touched: what a cache that
forgets nothing would fetch and write. A second launch on the same memory counts anew. Lanes that a mask or the edge of
a tensor descriptor switches off do not count; an atomic operation loads and stores. In tests it is the fixture
`count_traffic`.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

LARGEST_PILE = 1 << 22  # addresses kept before equal ones are dropped


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel's name, bytes loaded and bytes stored."""

    kernel: str
    loaded: int
    stored: int


@dataclass
class Traffic:
    """What was moved so far, by launch."""

    launches: list[Launch] = field(default_factory=list)

    @property
    def loaded(self) -> int:
        """Bytes loaded, over all launches."""
        return sum(launch.loaded for launch in self.launches)

    @property
    def stored(self) -> int:
        """Bytes stored, over all launches."""
        return sum(launch.stored for launch in self.launches)


class Touched:
    """The bytes that one launch has touched, as item size -> addresses of items."""

    def __init__(self) -> None:
        self.piles: dict[int, list[np.ndarray]] = {}

    def add(self, pointers: Any, mask: Any) -> None:
        """pointers: the interpreter's handle of a block of them; mask: booleans of its shape."""
        bits = pointers.get_element_ty().primitive_bitwidth
        addresses, wanted = np.broadcast_arrays(pointers.data, np.asarray(mask, bool))
        pile = self.piles.setdefault(max(1, bits // 8), [])
        pile.append(np.unique(addresses[wanted]))
        if sum(map(len, pile)) > LARGEST_PILE:
            pile[:] = [np.unique(np.concatenate(pile))]

    def count(self) -> int:
        """How many bytes, each once, also where items of two sizes overlap."""
        if not self.piles:
            return 0
        starts = {size: np.unique(np.concatenate(pile)).astype(np.int64) for size, pile in self.piles.items()}
        spans = np.concatenate([np.stack((start, start + size), 1) for size, start in starts.items()])
        spans = spans[spans[:, 0].argsort(kind="stable")]
        reached = np.maximum.accumulate(np.concatenate((spans[:1, 0], spans[:-1, 1])))  # by all spans before
        return int(np.maximum(0, spans[:, 1] - np.maximum(spans[:, 0], reached)).sum())


@contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Within it the launches of interpreted kernels are counted."""
    moved, loads, stores = Traffic(), Touched(), Touched()

    def watch(name: str, sees: Any) -> Any:
        method = getattr(InterpreterBuilder, name)

        def watching(self: InterpreterBuilder, *arguments: Any, **options: Any) -> Any:
            sees(*arguments, **options)
            return method(self, *arguments, **options)

        return mock.patch.object(InterpreterBuilder, name, watching)

    def launch(self: GridExecutor, *arguments: Any, **options: Any) -> None:
        loads.piles.clear()
        stores.piles.clear()
        run(self, *arguments, **options)
        moved.launches.append(Launch(self.fn.__name__, loads.count(), stores.count()))

    def compare_and_swap(pointers: Any, *others: Any) -> None:
        update(None, pointers, None, np.ones(np.shape(pointers.data), bool))

    def update(kind: Any, pointers: Any, value: Any, mask: Any, *others: Any) -> None:
        for touched in (loads, stores):
            touched.add(pointers, getattr(mask, "data", mask))

    # The interpreter does every other access, with a descriptor or without a mask, by one of these.
    with ExitStack() as patches:
        run = GridExecutor.__call__
        patches.enter_context(mock.patch.object(GridExecutor, "__call__", launch))
        for patch in (
            watch("create_masked_load", lambda pointers, mask, *rest, **options: loads.add(pointers, mask.data)),
            watch("create_masked_store", lambda pointers, value, mask, *rest: stores.add(pointers, mask.data)),
            watch("create_atomic_rmw", update),
            watch("create_atomic_cas", compare_and_swap),
        ):
            patches.enter_context(patch)
        yield moved
