"""From latents to frames, beside the denoising of the next clip where there is memory for both."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from osp_fast.device import memory_allowance
from osp_fast.errors import UserError
from osp_fast.models.wfvae import WFVAE, Tiles, as_plan
from osp_fast.models.wfvae_plan import Planner, Task
from osp_fast.models.wfvae_stream import Plan
from osp_fast.pipeline.networks import Held
from osp_fast.pipeline.settings import ClipSettings

OnPiece = Callable[[np.ndarray], None]
ResultT = TypeVar("ResultT")


class Decoder:
    """Callable: latents (1, C, T, H, W) as the DiT has them -> frames, uint8 (num_frames, height, width, 3).

    Decoding keeps to `settings.vae_memory` bytes (None: what is free on the device by then), of which `report` gets a
    line, and to `settings.most_latent_frames` at once; or it takes `plan`.

    Raises:
        UserError: `vae_memory` is not enough, also when the decoder is made; frames are not finite numbers.
    """

    def __init__(
        self,
        vae: Held[WFVAE],
        shape_of: WFVAE,
        settings: ClipSettings,
        device: torch.device,
        plan: Plan | Tiles | None = None,
        report: Callable[[str], None] | None = None,
    ):
        self._vae, self._settings, self._plan = vae, settings, None if plan is None else as_plan(plan)
        memory = settings.vae_memory
        allowance = (lambda held: memory_allowance(device, held)) if memory is None else lambda held: memory
        self._planner = Planner(shape_of, device, allowance, settings.most_latent_frames, report)
        self._pixels = pixel_type(shape_of)
        if memory is not None:
            self._make_plan()

    def _make_plan(self) -> Plan:
        if self._plan is not None:
            return self._plan
        frames, height, width = self._settings.num_frames, self._settings.height, self._settings.width
        return self._planner(Task("decode", frames, height, width, collected=False, pixels=self._pixels))

    def __call__(self, latents: Tensor, on_piece: OnPiece | None = None) -> np.ndarray:
        """`on_piece` gets each piece (t, height, width, 3) as soon as it is decoded."""
        frames = np.empty((self._settings.num_frames, self._settings.height, self._settings.width, 3), np.uint8)
        start = 0
        for piece in self.pieces(latents):
            frames[start : start + len(piece)] = piece
            start += len(piece)
            if on_piece:
                on_piece(piece)
        return frames

    @torch.no_grad()
    def pieces(self, latents: Tensor) -> Iterator[np.ndarray]:
        """The clip piece by piece, as it is decoded, uint8 (t, height, width, 3)."""
        with self._vae.use() as vae:
            raw = vae.denormalize(latents).to(next(vae.parameters()).dtype)
            for video in vae.decode_stream((raw,), self._make_plan(), self._pixels):
                if not torch.isfinite(video).all():
                    raise UserError("the VAE's frames are not finite numbers: check --ae_path, or use --dtype fp32")
                yield to_frames(video)


class Beside:
    """Runs calls one after the other in a thread and on a CUDA stream of its own. A context manager.

    overlap: without it a call is done when `submit` returns
    """

    def __init__(self, device: torch.device, overlap: bool):
        self.overlap, self._device = overlap, device
        self._stream = torch.cuda.Stream(device) if overlap and device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, "decoding")

    def __enter__(self) -> "Beside":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._thread.shutdown(cancel_futures=kind is not None)

    def submit(self, call: Callable[[Tensor], ResultT], latents: Tensor) -> "Future[ResultT]":
        """Let `call` work on latents that were launched on the current stream."""
        if not self.overlap:
            done: Future[ResultT] = Future()
            done.set_result(call(latents))
            return done
        if self._stream is None:
            return self._thread.submit(call, latents)
        there = torch.cuda.current_stream(self._device).record_event()
        latents.record_stream(self._stream)
        return self._thread.submit(self._on_stream, call, latents, there)

    def _on_stream(self, call: Callable[[Tensor], ResultT], latents: Tensor, there: "torch.cuda.Event") -> ResultT:
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            self._stream.wait_event(there)
            return call(latents)


def pixel_type(vae: WFVAE) -> torch.dtype:
    """What frames are decoded to: finer than bytes, as bfloat16 is not, and no wider than it need be."""
    return torch.float32 if next(vae.parameters()).dtype == torch.float32 else torch.float16


def to_frames(video: Tensor) -> np.ndarray:
    """One video (1, 3, T, H, W) in [-1, 1] -> frames, uint8 (T, H, W, 3)."""
    pixels = ((video[0].float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.permute(1, 2, 3, 0).cpu().numpy()
