"""How fast a run is: seconds, tokens and model FLOPs of its steps, and how much of them was waiting."""

from collections.abc import Sequence
from functools import lru_cache

import torch

from osp_fast.engine.cost import Workload, step_flops, tokens_of
from osp_fast.engine.devices import peak_flops
from osp_fast.models.dit import DiTConfig
from osp_fast.training.step import MicroBatch


class Pace:
    """The steps since the last log entry, without the time of checkpoints and validation.

    Tokens and FLOPs are counted at the shapes that are computed, padding included. Model FLOPs are three times those of
    the forward (two where the weights are frozen), whatever is recomputed.

    ranks: of the run; those that compute a micro-batch together each count their part of it
    """

    def __init__(self, config: DiTConfig, lora_rank: int | None, device: torch.device, ranks: int):
        self._config, self._lora_rank, self._ranks = config, lora_rank, ranks
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self._peak = peak_flops(name)
        self.restart()

    def restart(self) -> None:
        """Begin anew, after a log entry."""
        self._steps = self._tokens = self._flops = 0
        self._seconds = self._wait_s = 0.0

    def add(self, batches: Sequence[MicroBatch], seconds: float, wait_s: float) -> None:
        """A step on these micro-batches took `seconds`, `wait_s` of which it waited for its data."""
        self._steps += 1
        self._seconds += seconds
        self._wait_s += wait_s
        for batch in batches:
            clips, _, *size = batch.latents.shape
            tokens, flops = _work(self._config, clips, tuple(size), batch.text.shape[1], self._lora_rank)
            self._tokens += tokens / batch.ranks
            self._flops += flops / batch.ranks

    def facts(self) -> dict[str, float]:
        """Means over the steps: seconds, of these waiting for data; tokens/s of all ranks; model FLOP/s of one GPU.

        `mfu` is these as a share of the GPU's bf16 peak; it is left out where that is not known.
        """
        facts = dict(
            s_per_step=self._seconds / self._steps,
            data_wait_s=self._wait_s / self._steps,
            tokens_per_s=self._tokens * self._ranks / self._seconds,
            model_tflops=self._flops / self._seconds / 1e12,
        )
        return facts if self._peak is None else facts | dict(mfu=self._flops / self._seconds / self._peak)


@lru_cache
def _work(
    config: DiTConfig, clips: int, size: tuple[int, int, int], text_tokens: int, lora_rank: int | None
) -> tuple[int, int]:
    """Tokens and model FLOPs of a micro-batch."""
    workload = Workload(clips, size, text_tokens, lora_rank=lora_rank)
    return clips * tokens_of(config, size), step_flops(config, workload).model
