"""The DiT's forward in sampling as one CUDA graph, where that measures faster.

A run samples clips of one size, hundreds of times the same work. Where a GPU takes less time for it than the host needs
to launch its thousands of kernels, as for images and short clips, a graph is launched at once. It reads from memory of
its own, to which each call copies latents and time vectors, and a text's keys and values when the text changes. What
`cuda_graphs.py` says of what a graph must not hold is true of this one: see there.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from osp_fast.engine.cuda_graphs import LEAST_GAIN, ROOM, Choice, Graph, Machine
from osp_fast.errors import UserError
from osp_fast.models.dit import DiT, TextContext
from osp_fast.models.time_embedding import TimeContext
from osp_fast.models.wfvae_plan import gib


@dataclass
class _Captured:
    """A kept graph, what it reads, and the first tensor of the text that was copied there."""

    graph: Graph
    latents: list[Tensor]
    text: list[Tensor]
    whose: "weakref.ref[Tensor]"  # so that a text's memory is free when its caller lets it go


class GraphedForward:
    """Callable: what the DiT returns for latents, a `TimeContext` and a `TextContext`, without gradients.

    Each size is measured with and without a graph when it is first met; the DiT's weights must stay where they are.

    always: a graph for every size, whatever it measures (`--cuda_graphs`)
    report: takes a line for each size
    spare: bytes that a graph must leave to others on the device, as decoding; with `always` it need not

    Raises:
        UserError: with `always`, a graph cannot be captured.
    """

    def __init__(self, dit: DiT, machine: Machine, always: bool, report: Callable[[str], None], spare: int = 0):
        self._dit, self._machine, self._always, self._report, self._spare = dit, machine, always, report, spare
        self._known: dict[tuple, _Captured | None] = {}

    @property
    def size(self) -> int:
        """Bytes of the device that graphs hold; PyTorch counts them as reserved, not as allocated."""
        return sum(captured.graph.size for captured in self._known.values() if captured is not None)

    @torch.no_grad()
    def __call__(self, latents: Tensor, time: TimeContext, text: TextContext) -> Tensor:
        """See `DiT.forward`."""
        inputs = [latents, *time]
        size = tuple((x.shape, x.dtype) for x in (*inputs, *_tensors(text)))
        if size not in self._known:
            self._known[size] = self._decide(inputs, text)
        captured = self._known[size]
        return self._dit(latents, time, text) if captured is None else self._replay(captured, inputs, text)

    def _replay(self, captured: _Captured, inputs: list[Tensor], text: TextContext) -> Tensor:
        torch._foreach_copy_(captured.latents, inputs)
        tensors = _tensors(text)
        if captured.whose() is not tensors[0]:
            torch._foreach_copy_(captured.text, tensors)
            captured.whose = weakref.ref(tensors[0])
        captured.graph.replay()
        return captured.graph.result.clone()

    def _decide(self, inputs: list[Tensor], text: TextContext) -> _Captured | None:
        """Measure this size and keep a graph of it, or not."""
        name = "x".join(map(str, inputs[0].shape[2:])) + f" latents, batch of {len(inputs[0])}"
        eager = self._machine.seconds(lambda: self._dit(inputs[0], TimeContext(*inputs[1:]), text))
        static, keys = [x.clone() for x in inputs], [x.clone() for x in _tensors(text)]
        call = self._call(static, keys, text)
        need = self._machine.peak_bytes(call)
        free = max(0, round(ROOM * self._machine.available_bytes()) - self._spare)
        if need > free and not self._always:
            why = f"its {gib(need)} are more than the {gib(free)} to be had"
            return self._tell(Choice(name, eager, None, None, False, why), None)
        try:
            graph = self._machine.capture(call)
        except RuntimeError as error:  # the same call has just run without a graph, so it is the capture's
            full = isinstance(error, torch.OutOfMemoryError)
            why = "it does not fit into memory" if full else f"it cannot be captured ({str(error).splitlines()[0]})"
            if self._always:
                raise UserError(f"--cuda_graphs: {name}: {why}: leave the flag out") from error
            return self._tell(Choice(name, eager, None, None, False, why), None)
        captured = _Captured(graph, static, keys, weakref.ref(_tensors(text)[0]))
        graphed = self._machine.seconds(lambda: self._replay(captured, inputs, text))
        kept = self._always or graphed <= (1 - LEAST_GAIN) * eager
        return self._tell(Choice(name, eager, graphed, graph.size, kept), captured if kept else None)

    def _call(self, inputs: list[Tensor], keys: list[Tensor], text: TextContext) -> Callable[[], Tensor]:
        context = _with_tensors(text, keys)
        return lambda: self._dit(inputs[0], TimeContext(*inputs[1:]), context)

    def _tell(self, choice: Choice, captured: _Captured | None) -> _Captured | None:
        self._report(str(choice))
        return captured


def _tensors(text: TextContext) -> list[Tensor]:
    """All tensors of a text."""
    return [x for keys in text.keys for x in keys] + [x for x in text.tokens if x is not None]


def _with_tensors(text: TextContext, tensors: list[Tensor]) -> TextContext:
    """The text with these tensors in place of its own."""
    rest = iter(tensors)
    keys = tuple(type(pair)(next(rest), next(rest)) for pair in text.keys)
    return TextContext(keys, type(text.tokens)(*(None if x is None else next(rest) for x in text.tokens)))
