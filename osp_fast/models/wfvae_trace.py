"""How many bytes the WF-VAE's stages hold: each stage is run on the meta device, where tensors have sizes only.

Every storage that an operation makes counts from then until nothing refers to it, so what is predicted is what the code
does: activations in and out, temporaries, and what a `ChunkState` carries. What a library's kernel allocates within one
operation and frees again (a convolution's workspace) is not seen.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from osp_fast.models.wfvae_layers import ChunkState


class LiveBytes(TorchDispatchMode):
    """Within it, `live` is the size of all storages made inside that are still referred to, `peak` its maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and id(x.untyped_storage()) not in given:
                self._add(x.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._seen:
            return

        def gone(_: weakref.ref) -> None:
            del self._seen[key]
            self.live -= size

        self._seen[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)


@dataclass(frozen=True)
class StageCost:
    """Bytes of a stage for each of a clip's chunks: `peak` while it runs, with what is carried into it, without its
    input; `kept` carried out of it; `out` its result.
    """

    peak: tuple[int, ...]
    kept: tuple[int, ...]
    out: tuple[int, ...]


def stage_cost(
    stage: Callable[[Tensor, ChunkState], Tensor], shapes: Sequence[tuple[int, ...]], dtype: torch.dtype
) -> StageCost:
    """Run a stage of a network on the meta device through chunks of these shapes, the last of them the clip's last."""
    state, peaks, kept, outs = ChunkState(), [], [], []
    with torch.no_grad():
        for number, shape in enumerate(shapes):
            x = torch.empty(shape, dtype=dtype, device="meta")
            if dtype != torch.uint8:
                x = x.contiguous(memory_format=torch.channels_last_3d)
            state.last = number == len(shapes) - 1
            if number == 0:
                trace = LiveBytes()
            trace.peak = trace.live
            with trace:
                out = stage(x, state)
            peaks.append(trace.peak)
            outs.append(out.untyped_storage().nbytes())
            state.first = False
            del out
            kept.append(trace.live)
    return StageCost(tuple(peaks), tuple(kept), tuple(outs))
