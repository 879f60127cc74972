"""How long the stages of sampling take, predicted from FLOPs, bytes and the rates of `devices.py`.

What computes is taken to be products + attention + passes over memory, one after the other, as in `cost.py`, and every
call of a network reads its weights once. Copies of streamed weights run beside it: only what they take longer than the
computing between is added.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from osp_fast.engine.cost import Workload
from osp_fast.engine.devices import DeviceModel
from osp_fast.engine.exchange_cost import SharedWork
from osp_fast.engine.forward_peak import VaeWork
from osp_fast.models.dit import DiTConfig
from osp_fast.models.wfvae_plan import Task
from osp_fast.models.wfvae_stream import Plan, decoder_windows

PASSES_TO_REST = 3  # until a pass over streamed blocks takes as long as the one before


@dataclass(frozen=True)
class Streaming:
    """streamed: numbers of blocks; slots: they go through; block_bytes: of each block."""

    streamed: tuple[int, ...] = ()
    slots: int = 2
    block_bytes: int = 0


def pass_seconds(blocks: Sequence[float], streaming: Streaming, device: DeviceModel) -> float:
    """Of one pass over blocks of these seconds, in a row of many, as `BlockStreamer` orders copies and computing."""
    count = min(streaming.slots, len(streaming.streamed))
    if count == 0:
        return sum(blocks)
    ranks = {number: rank for rank, number in enumerate(streaming.streamed)}
    copy = streaming.block_bytes / device.host_bytes
    there = {rank: copy * (rank + 1) for rank in range(count)}  # when a block's copy has ended
    link = copy * count  # when all copies that were launched have ended
    now, before = 0.0, 0.0
    for _ in range(PASSES_TO_REST):
        before = now
        for number, seconds in enumerate(blocks):
            rank = ranks.get(number)
            now = max(now, 0.0 if rank is None else there[rank]) + seconds
            following = None if rank is None else rank + count if rank + count < len(ranks) else rank % count
            if following not in (None, rank):
                link = there[following] = max(now, link) + copy
    return now - before


def step_seconds(config: DiTConfig, workload: Workload, turns: int, streaming: Streaming, device: DeviceModel) -> float:
    """Of one step of denoising, with text keys and time vectors computed before.

    workload: of one call of the DiT; turns: such calls in a step
    """
    work = SharedWork(config, workload, device, prepared=True)
    reading = streaming.block_bytes / device.copy_bytes
    blocks = [each.total + reading for each in work.blocks()]
    return turns * (pass_seconds(blocks, streaming, device) + work.outside().total)


def text_seconds(
    layers: Sequence[nn.Module], tokens: int, new_tokens: int, streaming: Streaming, device: DeviceModel
) -> float:
    """Of reading a text of so many tokens, and of then writing tokens one by one: each reads all weights."""
    numbers = sum(parameter.numel() for parameter in layers[0].parameters())
    reading = streaming.block_bytes / device.copy_bytes
    whole = [2 * numbers * tokens / device.matmul_flops + reading] * len(layers)
    one = pass_seconds([reading] * len(layers), streaming, device) if new_tokens else 0.0
    return pass_seconds(whole, streaming, device) + new_tokens * one


def decoding_seconds(vae: nn.Module, task: Task, plan: Plan, work: VaeWork, device: DeviceModel) -> float:
    """Of a clip, as `plan` cuts it: what tiles compute twice is added. work: of whole frames."""
    factor = 1.0
    for cells, tile in zip(task.cells, plan.tile or (None, None), strict=True):
        padded = (window.padded for window in decoder_windows(vae.decoder, cells, tile))
        factor *= sum(end - start for start, end in padded) / cells
    return factor * (work.flops / device.matmul_flops + work.moved / device.copy_bytes)
