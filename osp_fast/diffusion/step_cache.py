"""Steps that reuse what the blocks behind the first one did in a step before (`--step_cache`).

From one denoising step to the next a DiT's activations change little. What the first block adds to the tokens is
compared with what it added in the last full step: where the mean absolute change is below a threshold of the mean
absolute value, the other blocks are skipped and their sum of the last full step is added instead. The rule is that of
"first block caching", a simplification of TeaCache (Liu et al. 2024, arXiv:2411.19108).

It approximates: how much the result changes is in docs/sampling.md. The decision makes the host wait for the GPU once a
step.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# The sums of |change| and |previous| of each clip of the batch, (B, 2) -> the same over all ranks that work on it.
Agree = Callable[[Tensor], Tensor]


class FirstBlockCache:
    """A DiT's `StepCache`, for one clip: made anew for each. Counts its `calls` and those that were `skipped`.

    A batch of the two halves of guidance is skipped as a whole or not at all. Holds three tensors of (B, N, d).

    threshold: relative change of the first block's part below which the others are skipped
    agree: where ranks share the work, so that all decide alike
    """

    def __init__(self, threshold: float, agree: Agree = lambda sums: sums):
        self._threshold, self._agree = threshold, agree
        self._first: Tensor | None = None
        self._rest: Tensor | None = None
        self.calls = self.skipped = 0

    def __call__(self, x: Tensor, first: Callable[[Tensor], Tensor], rest: Callable[[Tensor], Tensor]) -> Tensor:
        """See `StepCache` of the DiT."""
        self.calls += 1
        after_first = first(x)
        part = after_first - x
        if self._first is not None and self._is_alike(part):
            self.skipped += 1
            return after_first + self._rest
        self._first, self._rest = part, None  # what was kept goes before more is made
        result = rest(after_first)
        self._rest = result - after_first
        return result

    def release(self) -> None:
        """Let the tensors go, when the clip is done; the counts stay."""
        self._first = self._rest = None

    def _is_alike(self, part: Tensor) -> bool:
        sums = torch.stack(
            [
                (part - self._first).abs().sum((1, 2), dtype=torch.float32),
                self._first.abs().sum((1, 2), dtype=torch.float32),
            ],
            1,
        )
        change, before = self._agree(sums).unbind(1)
        return bool((change < self._threshold * before).all())
