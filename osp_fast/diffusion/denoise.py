"""The denoising loop: from noise to clean latents, with classifier-free guidance (Ho & Salimans, arXiv:2207.12598).

What does not change from step to step is computed before the first one: the text's keys and values in all blocks once
for a prompt (`prepare_text`), the vectors that depend on the timestep for all steps at once (`GuidedModel`). A step
needs nothing back from a GPU, so that the host launches the next one while it works; a step cache is the exception.
"""

from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from osp_fast.diffusion.samplers import Scheduler
from osp_fast.errors import UserError


class Text(NamedTuple):
    """An encoded text: states (1, L, caption_channels) and mask (1, L), 1 = real token."""

    states: Tensor
    mask: Tensor


class Halves(Enum):
    """How the two halves of guidance, negative prompt and prompt, are computed.

    TOGETHER: as one batch of two; IN_TURNS: one after the other, with half the activations; APART: one half here, the
    other one elsewhere, and the predictions exchanged
    """

    TOGETHER = "together"
    IN_TURNS = "in turns"
    APART = "apart"


def prepare_text(
    dit: nn.Module, text: Text, negative: Text | None, halves: Halves = Halves.TOGETHER, half: int = 0
) -> tuple[Any, ...]:
    """What the DiT needs of a prompt and the negative one, one `TextContext` for each of its calls in a step.

    negative: None without guidance; half: with `Halves.APART` which one is computed here, 0 = negative
    """
    device, dtype = _place(dit)
    texts = [text] if negative is None else [negative, text]
    if negative is not None and halves is Halves.APART:
        texts = [texts[half]]
    groups = [texts] if halves is Halves.TOGETHER else [[one] for one in texts]
    with torch.no_grad():
        return tuple(
            dit.text_context(
                torch.cat([text.states for text in group]).to(device, dtype),
                torch.cat([text.mask for text in group]).to(device),
            )
            for group in groups
        )


class GuidedModel:
    """A DiT's guided prediction in each step of a run: `model(latents, call)`.

    dit: with `time_context`; texts: `prepare_text`'s; timesteps: of the run's model calls
    scale: of guidance; 1: there is none
    halves: as the texts were prepared for
    forward: what to call in place of the DiT, such as a CUDA graph of it
    step_cache: of this clip; only with `Halves.TOGETHER` or APART, as it decides for both halves at once
    exchange: with `Halves.APART` my half's prediction -> the negative prompt's and the prompt's
    """

    def __init__(
        self,
        dit: nn.Module,
        texts: Sequence[Any],
        timesteps: Tensor,
        scale: float = 1.0,
        halves: Halves = Halves.TOGETHER,
        *,
        forward: Callable[..., Tensor] | None = None,
        step_cache: Any = None,
        exchange: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
    ):
        device, self.dtype = _place(dit)
        self._texts, self._scale, self._exchange = texts, scale, exchange
        self._forward = forward or dit
        # Not given where it is not used: a graph of the forward has no place for it.
        self._options = {} if step_cache is None else {"step_cache": step_cache}
        self._batch = 2 if scale != 1 and halves is Halves.TOGETHER else 1
        with torch.no_grad():
            # float32: a 16-bit type would round the timestep.
            self._times = dit.time_context(timesteps.to(device, torch.float32))

    def __call__(self, latents: Tensor, call: int) -> Tensor:
        """latents (1, C, T, H, W) scaled for model call number `call` -> the prediction, float32."""
        x = latents.to(self.dtype)
        if self._batch == 2:
            x = torch.cat([x, x])
        time = self._times.at(call, self._batch)
        predictions = [self._forward(x, time, text, **self._options).float() for text in self._texts]
        if self._scale == 1:
            return predictions[0]
        if self._exchange is not None:
            without, with_prompt = self._exchange(predictions[0])
        elif self._batch == 2:
            without, with_prompt = predictions[0].chunk(2)
        else:
            without, with_prompt = predictions
        return without + self._scale * (with_prompt - without)


@torch.no_grad()
def denoise(
    model: Callable[[Tensor, int], Tensor],
    scheduler: Scheduler,
    steps: int,
    noise: Tensor,
    generator: torch.Generator | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Sample latents, float32, of the shape and on the device of `noise` (B, C, T, H, W), which is standard normal.

    `model` predicts from the latents of a model call and its number, as `GuidedModel` does. `generator`, on the CPU,
    serves the methods that add noise. `on_step(done, calls)` is called when a model call is done; what it raises ends
    the loop. Raises `UserError` if the result is not finite.
    """
    timesteps = scheduler.set_steps(steps)
    latents = scheduler.initial(noise.float())
    done = _Done(latents.device, lambda count: on_step(count, len(timesteps)) if on_step else None)
    for call, timestep in enumerate(timesteps):
        prediction = model(scheduler.model_input(latents, timestep), call)
        latents = scheduler.step(prediction, timestep, latents, generator).float()
        done.launched()
    done.wait(0)
    if not torch.isfinite(latents).all():
        raise UserError(
            f"{scheduler.method} ended in numbers that are not finite after {steps} steps: "
            "check the model's weights, or use --dtype fp32 or another --sample_method"
        )
    return latents


class _Done:
    """Tells of steps when they are done, not when they are launched, and keeps the host from running far ahead.

    Without that a GPU's whole queue would be filled at once: a bar that shows nothing, and a Ctrl-C minutes late.
    """

    AHEAD = 2  # steps: enough that the GPU never waits

    def __init__(self, device: torch.device, tell: Callable[[int], None]):
        self._device, self._tell = device, tell
        self._events: deque[torch.cuda.Event] = deque()
        self._count = 0

    def launched(self) -> None:
        """Another step."""
        if self._device.type != "cuda":
            self._count += 1
            self._tell(self._count)
            return
        self._events.append(torch.cuda.Event(blocking=True))
        self._events[-1].record(torch.cuda.current_stream(self._device))
        self.wait(self.AHEAD)

    def wait(self, left: int) -> None:
        """Until at most so many are not done."""
        while len(self._events) > left:
            self._events.popleft().synchronize()
            self._count += 1
            self._tell(self._count)


def _place(dit: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where the DiT computes, and in what."""
    parameter = next(dit.parameters())
    return parameter.device, parameter.dtype
