"""The loss of a micro-batch that is ready on the device, and the update that follows its gradients.

Nothing here waits for the GPU: what the host must know of a step is copied to it while the next one runs
(`records.py`).

Shape suffixes: b clips of a micro-batch, c latent channels, t latent frames, h latent rows, w latent columns.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.optim import Optimizer

from osp_fast.diffusion.schedule import DiffusionObjective
from osp_fast.engine.cuda_graphs import GraphedBuckets
from osp_fast.models.dit import DiT
from osp_fast.models.token_exchange import TokenExchange
from osp_fast.parallel.shards import LocalShards
from osp_fast.parallel.world import World
from osp_fast.training.ema import EMA
from osp_fast.training.optimizer import steps_by_flag, take_step

CLIP_EPS = 1e-6  # as in torch.nn.utils.clip_grad_norm_


@dataclass
class MicroBatch:
    """What one call of the DiT needs, on its device.

    latents and noise (B, C, T, H, W), float32; timesteps (B,); text (B, L, width) and its mask (B, L); latent_mask
    (B, T, H, W), 1 = real cell, None if all are. ranks: that compute it together, each with the same of all these.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    text: Tensor
    text_mask: Tensor
    latent_mask: Tensor | None = None
    ranks: int = 1

    def values(self) -> list[Tensor | None]:
        """The tensors in order: `MicroBatch(*batch.values())` is the same, for one rank."""
        return [getattr(self, field.name) for field in fields(self) if field.name != "ranks"]


class DenoisingLoss:
    """Callable: a micro-batch -> the loss of each clip, (B,) float32, with gradients for the DiT.

    bf16: whether products and attention run in bfloat16 (autocast)
    exchange: of the ranks that compute micro-batches together. All of them have the whole loss, and each the gradient
    of its own tokens' part in it. The DiT is left as the last micro-batch had it.
    """

    def __init__(self, dit: DiT, objective: DiffusionObjective, bf16: bool, exchange: TokenExchange | None = None):
        self.dit = dit
        self.objective = objective
        self._bf16, self._exchange = bf16, exchange

    def __call__(self, batch: MicroBatch) -> Tensor:
        exchange = self._exchange if batch.ranks > 1 else None
        if self.dit.exchange is not exchange:
            self.dit.share_tokens(exchange)
        noisy_bcthw = self.objective.corrupt(batch.latents, batch.noise, batch.timesteps)
        with self.autocast(batch.latents.device):
            prediction_bcthw = self.dit(noisy_bcthw, batch.timesteps, batch.text, batch.text_mask, batch.latent_mask)
        return self.objective.loss(prediction_bcthw, batch.latents, batch.noise, batch.timesteps, batch.latent_mask)

    def autocast(self, device: torch.device) -> AbstractContextManager:
        """The types that the DiT computes in on `device`."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self._bf16)


def add_gradients(loss: DenoisingLoss, batch: MicroBatch, clips: int) -> Tensor:
    """Backward of a micro-batch's share in the mean loss of a step's `clips`. Returns the loss of each, detached.

    Gradients are averaged over all ranks. Ranks that compute a micro-batch together have parts of its gradient, to be
    added up, so these are given as many times the weight.
    """
    losses = loss(batch)
    (losses.sum() / clips * batch.ranks).backward()
    return losses.detach()


def accumulate_gradients(
    loss: DenoisingLoss, batches: Sequence[MicroBatch], graphs: GraphedBuckets | None = None
) -> Tensor:
    """Backward of the mean loss of a step's clips, one micro-batch after the other; each clip weighs the same.

    graphs: run the micro-batches that they know; made for micro-batches of equal numbers of clips

    Returns:
        The loss of each clip, (clips,) float32, detached, on the device.
    """
    if graphs is not None:
        graphs.start_step()
        return torch.cat([graphs(batch.values()) for batch in batches])
    clips = sum(len(batch.timesteps) for batch in batches)
    losses = []
    for number, batch in enumerate(batches, 1):
        if hasattr(loss.dit, "set_requires_all_reduce"):  # of FSDP: copies of the weights meet in the last backward
            loss.dit.set_requires_all_reduce(number == len(batches))
        losses.append(add_gradients(loss, batch, clips))
    return torch.cat(losses)


class Update:
    """Callable: gradients are there -> clipped, taken in by optimizer and average, and dropped.

    A gradient that is not finite anywhere, on any rank, changes nothing: the fused optimizer and the average look at a
    flag on the device. Optimizers that cannot do that (`optimizer.steps_by_flag`) are asked by the host, which then
    waits for the step.

    shards: of the DiT's parameters; the optimizer and the average hold their local parts
    copies: how many groups of ranks hold the same part (HSDP's replicas)
    """

    def __init__(
        self,
        shards: LocalShards,
        optimizer: Optimizer,
        ema: EMA | None,
        world: World,
        max_norm: float,
        copies: int = 1,
    ):
        self.shards, self.optimizer, self.ema = shards, optimizer, ema
        self._world, self._max_norm, self._copies = world, max_norm, copies

    @torch.no_grad()
    def __call__(self, losses: Tensor, step: int) -> Tensor:
        """losses: of this rank's clips, (clips,), of which those that ranks share are on each of them; step: from 1.

        Returns (4 + clips,) float32 on the device: mean loss of all ranks' clips, norm of the gradient before clipping,
        1 if the step was skipped, how many losses of all ranks are not finite; this rank's losses.
        """
        gradients = self.shards.collect_gradients()
        squares = torch.stack(torch._foreach_norm(gradients)).square().sum() / self._copies
        sums = torch.stack((squares, losses.sum(), (~losses.isfinite()).sum().float()))
        self._world.add_up(sums)
        norm, mean = sums[0].sqrt(), sums[1] / (len(losses) * self._world.size)
        skipped = (~(norm.isfinite() & mean.isfinite())).float()
        torch._foreach_mul_(gradients, (self._max_norm / (norm + CLIP_EPS)).clamp(max=1.0))
        self._step(skipped, step)
        self.shards.drop_gradients()
        return torch.cat((torch.stack((mean, norm, skipped, sums[2])), losses))

    def _step(self, skipped: Tensor, step: int) -> None:
        if self.ema is not None:
            self.ema.before_step()
        if steps_by_flag(self.optimizer):
            self.optimizer.found_inf = skipped
            self.optimizer.step()
        elif not skipped.item():
            with torch.enable_grad():
                take_step(self.optimizer)
        if self.ema is not None:
            self.ema.update(step, skipped)
