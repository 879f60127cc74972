"""How many bytes the DiT's blocks keep for backward, and need while they run: measured on fake tensors.

A model with one block of each kind of attention runs forward and backward at the real shape, where tensors have sizes
and no contents; `LiveBytes` counts their storages. So what is predicted is what the code does, whatever autograd and
checkpointing save. What a library's kernel allocates within one operation and frees again is not seen, and compiled
blocks need less than these, which run operation by operation.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from osp_fast.engine.cost import Workload
from osp_fast.engine.levels import Level
from osp_fast.kernels.launch import forced_path
from osp_fast.kernels.skiparse_attention import skiparse_attention_ref, skiparse_attention_triton
from osp_fast.models.attention_backends import AttentionBackend, sdpa_attention
from osp_fast.models.dit import DiT, DiTConfig
from osp_fast.models.lora import add_lora
from osp_fast.models.wfvae_trace import LiveBytes
from osp_fast.parallel.links import Link
from osp_fast.parallel.sequence import SequenceExchange

NOBODY = Link("")  # a group that is never asked for

# flash-attn keeps what PyTorch's fused attention does: inputs as gathered, output, one number for each row and head.
ATTENTION_FUNCTIONS = {
    "triton": skiparse_attention_triton,
    "sdpa": sdpa_attention,
    "flash": sdpa_attention,
    "reference": skiparse_attention_ref,
}


@dataclass(frozen=True)
class BlockBytes:
    """kept: from a block's forward until its backward; forward, backward: beside that, at most, while it runs.

    `backward` is counted beside all that is kept when it begins, this block's own included. Parameters and their
    gradients do not count.
    """

    kept: int
    forward: int
    backward: int


@dataclass(frozen=True)
class Measured:
    """Bytes of one level, in a micro-batch.

    before, after: kept outside of the blocks, made before the first and after the last
    ends: at most, beside what is kept, from the last block's forward to the loss and back
    blocks: by mode of attention
    """

    before: int
    after: int
    ends: int
    blocks: dict[str, BlockBytes]


@lru_cache(maxsize=64)
def measure(config: DiTConfig, workload: Workload, level: Level) -> Measured:
    """Run a block of each mode at this level on fake tensors: a third of a second."""
    of_mode = {config.attention_mode(index): index for index in range(config.num_layers)}
    modes = list(of_mode)
    # No block is measured at either end of the model, where there is no part of another one to add: one goes ahead.
    indices = [of_mode[mode] for mode in (modes[0], *modes)]
    dit = _model(config, workload, indices).recompute_blocks(level.recompute(workload.lora_rank is not None))
    with FakeTensorMode(), forced_path(workload.path):
        _allocate(dit, workload.weight_dtype)
        watch = _Watch(dit)
        inputs = _inputs(config, workload)
        autocast = torch.autocast("cpu", workload.dtype, enabled=workload.dtype != torch.float32, cache_enabled=False)
        with watch.trace:
            with autocast:
                prediction = dit(*inputs)
            loss = (prediction.float() - inputs[0]).square().mean()
            watch.loss_is_there()
            loss.backward()
            watch.backward_is_done()
    return watch.result(modes)


def _model(config: DiTConfig, workload: Workload, indices: list[int]) -> DiT:
    """On the meta device, with the blocks of these numbers."""
    with torch.device("meta"):
        dit = DiT(replace(config, num_layers=0))
        dit.transformer_blocks.extend(config.block(index) for index in indices)
    dit.config = replace(config, num_layers=len(indices))
    if workload.lora_rank is not None:
        add_lora(dit, workload.lora_rank, workload.lora_rank, 0)
    backend = AttentionBackend(workload.attention, ATTENTION_FUNCTIONS[workload.attention], lambda mode, sparse_n: "")
    for block in dit.transformer_blocks:
        block.self_attention.backend = block.cross_attention.backend = backend
    return share_as_in(workload, dit)


def share_as_in(workload: Workload, dit: DiT) -> DiT:
    """Let a traced model compute the tokens of the first of the ranks that share clips. Returns it.

    On tensors without contents the exchange makes what it makes on a GPU, and asks no other rank.
    """
    plan = workload.sequence
    if plan is None or plan.ranks == 1:
        return dit
    exchange = SequenceExchange(plan, 0, dit.config.sparse_n, NOBODY, NOBODY, NOBODY)
    dit.share_tokens(exchange)
    for block in dit.transformer_blocks:  # in the whole model another kind follows on each that skips
        block.mover = exchange if plan.scope > 1 and block.self_attention.mode != "full" else None
    return dit


def _allocate(dit: DiT, dtype: torch.dtype) -> None:
    """Fake parameters for those on the meta device, and their gradients.

    The gradients are there from the start: what is added to them, and not they themselves, is part of a backward.
    """
    for module in dit.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            fake = nn.Parameter(torch.empty(parameter.shape, dtype=dtype), parameter.requires_grad)
            fake.grad = torch.empty_like(fake) if fake.requires_grad else None
            setattr(module, name, fake)


def _inputs(config: DiTConfig, workload: Workload) -> tuple[torch.Tensor | None, ...]:
    clips, size, text = workload.clips, workload.latent_size, workload.text_tokens
    return (
        torch.empty(clips, config.in_channels, *size),
        torch.empty(clips, dtype=torch.long),
        torch.empty(clips, text, config.caption_channels, dtype=workload.dtype),
        torch.empty(clips, text, dtype=torch.long),
        torch.empty(clips, *size) if workload.masked else None,
    )


class _Watch:
    """Notes what is alive whenever a block's forward or backward ends."""

    def __init__(self, dit: DiT):
        self.trace = LiveBytes()
        self._blocks = len(dit.transformer_blocks)
        self._live: list[int] = []  # before the first block, after each, after the loss
        self._forward_peaks: list[int] = []
        self._backward_peaks: list[int] = []  # of the loss, then of the blocks from the last to the first
        for block in dit.transformer_blocks:
            block.register_forward_pre_hook(self._block_begins)
            block.register_forward_hook(self._block_ends)

    def _block_begins(self, block, arguments) -> None:
        if not self._live:
            self._live.append(self.trace.live)
            self._restart()
            # A gradient of what goes into the first block ends its backward.
            if arguments[0].requires_grad:
                arguments[0].register_hook(self._gradient)

    def _block_ends(self, block, arguments, results) -> None:
        self._live.append(self.trace.live)
        self._forward_peaks.append(self._restart())
        results[0].register_hook(self._gradient)

    def loss_is_there(self) -> None:
        """Forward has ended."""
        self._live.append(self.trace.live)

    def backward_is_done(self) -> None:
        """Backward has ended, also of what comes before the first block."""
        if len(self._backward_peaks) == self._blocks:  # nothing before the first block trains
            self._gradient(None)

    def _gradient(self, _: torch.Tensor | None) -> None:
        self._backward_peaks.append(self._restart())

    def _restart(self) -> int:
        peak, self.trace.peak = self.trace.peak, self.trace.live
        return peak

    def result(self, modes: list[str]) -> Measured:
        """modes: of the blocks after the first, which has the mode of the second."""
        _, first, *others, total = self._live
        ends_peak, *backward_peaks = self._backward_peaks
        forward_peaks, backward_peaks = self._forward_peaks[1:], backward_peaks[-2::-1]
        blocks = {}
        rows = zip(modes, [first, *others[:-1]], others, forward_peaks, backward_peaks, strict=True)
        for mode, start, end, forward, backward in rows:
            blocks[mode] = BlockBytes(end - start, max(0, forward - end), max(0, backward - end))
        before = first - blocks[modes[0]].kept
        return Measured(before, total - others[-1], max(0, ends_peak - total), blocks)
