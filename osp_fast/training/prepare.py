"""From a step's clips to micro-batches on the device: latents, noise, timesteps, text.

Whatever is drawn for a clip is named by (seed, step, slot), its slot being its place in the step's whole batch: how
the batch is cut into micro-batches and spread over ranks, or where a run was resumed, changes nothing that is drawn.
Ranks that share a clip draw the same for it, and read it once for all of them (`shared_clips.py`).

Shape suffixes as in `step.py`.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from osp_fast.config import TrainConfig
from osp_fast.data.dataset import LoadedClip, StepBatch
from osp_fast.data.latent_cache import padded_states
from osp_fast.diffusion.schedule import DiffusionObjective, draw_noise
from osp_fast.models.text_encoder import TextEncoder
from osp_fast.models.wfvae import WFVAE, Posterior
from osp_fast.models.wfvae_plan import Task
from osp_fast.seeding import torch_generator
from osp_fast.training.build import vae_planner
from osp_fast.training.shared_clips import ClipSharing, Contents
from osp_fast.training.step import MicroBatch

JOIN_S = 10.0


class BatchMaker:
    """Callable: clips and what `read` made of them -> a micro-batch on `device`.

    The VAE and the text encoder run without gradients, in the dtype that they were loaded in. Clips from a latent cache
    need no text encoder, and of the VAE only its scale and shift. report: gets a line for each plan of the VAE's work.
    """

    def __init__(
        self,
        vae: WFVAE,
        text_encoder: TextEncoder | None,
        objective: DiffusionObjective,
        config: TrainConfig,
        device: torch.device,
        report: Callable[[str], None] = lambda line: None,
    ):
        self.vae = vae
        self.text_encoder = text_encoder
        self.objective = objective
        self.device = device
        self._seed = config.run.seed
        self._noise_offset = config.diffusion.noise_offset
        self._max_length = config.model.model_max_length
        self._plan = vae_planner(vae, config.model, device, report)

    @torch.no_grad()
    def read(self, clips: Sequence[LoadedClip], step: int) -> list[Contents]:
        """Latents and texts, on the device; step: the step's number, which names what is drawn."""
        if not clips:
            return []
        text, text_mask = self._text(clips)
        return [Contents(*each) for each in zip(self.encode(clips, step), text, text_mask, strict=True)]

    @torch.no_grad()
    def __call__(
        self, clips: Sequence[LoadedClip], contents: Sequence[Contents], step: int, slots: int, ranks: int = 1
    ) -> MicroBatch:
        """slots: clips of the step on all ranks; slot s draws its timestep from the s-th of so many strata.

        Of the clips only their slots are used. ranks: that compute the micro-batch together
        """
        latents = [each.latent for each in contents]
        noise = [
            self._noise("noise", latent.shape, step, clip.slot, self._noise_offset)
            for latent, clip in zip(latents, clips, strict=True)
        ]
        latents_bcthw, latent_mask_bthw = pad_to_largest(latents)
        noise_bcthw, _ = pad_to_largest(noise)
        timesteps = self._timesteps([clip.slot for clip in clips], step, slots)
        text, text_mask = (torch.stack([each[field] for each in contents]) for field in (1, 2))
        return MicroBatch(latents_bcthw, noise_bcthw, timesteps, text, text_mask, latent_mask_bthw, ranks)

    def example(
        self, size: tuple[int, int, int], clips: int, width: int, dtype: torch.dtype, ranks: int = 1
    ) -> MicroBatch:
        """A micro-batch of the same shapes and types as real ones, without meaning.

        size: (T, H, W) of the latents; width, dtype: of the text's states; ranks: that compute it together
        """
        shape = (clips, self.vae.config.latent_dim, *size)
        generator = torch_generator("example", *shape)
        latents, noise = (self._to_device(draw_noise(shape, generator)) for _ in range(2))
        timesteps = self._to_device(self.objective.timesteps(torch.full((clips,), 0.5)))
        text = torch.zeros((clips, self._max_length, width), dtype=dtype, device=self.device)
        text_mask = torch.ones(text.shape[:2], dtype=torch.int64, device=self.device)
        return MicroBatch(latents, noise, timesteps, text, text_mask, ranks=ranks)

    @torch.no_grad()
    def encode(self, clips: Sequence[LoadedClip], step: int) -> list[Tensor]:
        """The normalised latent (C, T, H, W), float32, of each clip: a sample of the VAE's posterior.

        Clips of equal size pass through the VAE together.
        """
        by_size: dict[tuple[int, ...], list[int]] = {}
        for index, clip in enumerate(clips):
            by_size.setdefault(tuple(_contents(clip).shape), []).append(index)
        latents: dict[int, Tensor] = {}
        for indices in by_size.values():
            contents = self._to_device(torch.stack([_contents(clips[index]) for index in indices]))
            if contents.dtype == torch.uint8:
                batch, _, *size = contents.shape
                posterior = self.vae.encode(contents, self._plan(Task("encode", *size, batch)))
            else:
                posterior = Posterior(*contents.chunk(2, dim=1))
            shape = posterior.mean.shape[1:]
            drawn = [self._noise("posterior", shape, step, clips[index].slot) for index in indices]
            raw = posterior.sample(torch.stack(drawn))
            latents.update(zip(indices, self.vae.normalize(raw).unbind(0), strict=True))
        return [latents[index] for index in range(len(clips))]

    def _text(self, clips: Sequence[LoadedClip]) -> tuple[Tensor, Tensor]:
        """States (B, tokens, width) of the captions and their mask (B, tokens)."""
        if self.text_encoder is not None:
            return self.text_encoder([clip.caption for clip in clips])
        text, mask = padded_states([clip.text for clip in clips], self._max_length)
        return self._to_device(text), self._to_device(mask)

    def _noise(self, purpose: str, shape: Sequence[int], step: int, slot: int, noise_offset: float = 0.0) -> Tensor:
        generator = torch_generator(purpose, self._seed, step, slot)
        return self._to_device(draw_noise((1, *shape), generator, noise_offset)[0])

    def _timesteps(self, slots: Sequence[int], step: int, strata: int) -> Tensor:
        uniform = [torch.rand((), generator=torch_generator("timestep", self._seed, step, slot)) for slot in slots]
        return self._to_device(self.objective.timesteps(torch.stack(uniform), torch.tensor(slots), strata))

    def _to_device(self, tensor: Tensor) -> Tensor:
        """On a GPU from pinned memory, so that the host does not wait for the copy."""
        if self.device.type == "cuda" and tensor.device.type == "cpu":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)


def _contents(clip: LoadedClip) -> Tensor:
    """Pixels (3, T, H, W), uint8, or the moments from a latent cache."""
    return clip.pixels if clip.pixels is not None else clip.moments


def pad_to_largest(clips: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Stack (C, T, H, W) tensors, with zeros behind the last frame, row and column of the smaller ones.

    Padded cells are masked from attention and loss. Skiparse counts its sets in the padded grid (as upstream does), so
    only batches of one size, which `--group_data` makes, compute what each clip alone would.

    Returns:
        (B, C, T, H, W), and a mask (B, T, H, W) with 1 where a cell is real; None if all sizes are equal.
    """
    sizes = [clip.shape[1:] for clip in clips]
    if all(size == sizes[0] for size in sizes):
        return torch.stack(list(clips)), None
    largest = [max(size[axis] for size in sizes) for axis in range(3)]
    # F.pad counts axes from the last one, and wants (before, after) for each.
    behind = [[pad for axis in (2, 1, 0) for pad in (0, largest[axis] - size[axis])] for size in sizes]
    padded = [F.pad(clip, pads) for clip, pads in zip(clips, behind, strict=True)]
    masks = [F.pad(clip.new_ones(size), pads) for clip, size, pads in zip(clips, sizes, behind, strict=True)]
    return torch.stack(padded), torch.stack(masks)


class BatchFeed:
    """Iterates over a run's batches and their micro-batches, the next ones made while the present ones train.

    On a GPU a thread makes them on a stream of its own: the VAE, the text encoder and the copies overlap with the
    training of the batch before. On a CPU, whose cores are all taken by training, they are made when they are asked
    for. What making them raises is raised to the caller. `StepBatch.wait_s` is what the caller waited in all, and
    `StepBatch.clips` are those that this rank computes, whoever loaded them.

    batches: of this rank
    step: optimizer steps done before the first of them
    accumulation: micro-batches of a step
    sharing: with whom this rank shares clips; they must all take as many batches
    """

    def __init__(
        self,
        batches: Iterable[StepBatch],
        maker: BatchMaker,
        step: int,
        accumulation: int,
        sharing: ClipSharing | None = None,
    ):
        self._batches, self._maker = iter(batches), maker
        self._step, self._accumulation, self._sharing = step, accumulation, sharing
        self._made: queue.Queue | None = None
        self._closed = threading.Event()
        if maker.device.type == "cuda":
            self._made = queue.Queue(maxsize=1)
            self._stream = torch.cuda.Stream(maker.device)
            self._stream.wait_stream(torch.cuda.current_stream(maker.device))  # until the networks are there
            self._thread = threading.Thread(target=self._run, daemon=True, name="prepare")
            self._thread.start()

    def __iter__(self) -> Iterator[tuple[StepBatch, list[MicroBatch]]]:
        while True:
            item = self._make() if self._made is None else self._take()
            if item is None:
                return
            yield item

    def close(self) -> None:
        """End the thread; the batches' source must have been closed before, if it may wait for ever."""
        self._closed.set()
        if self._made is not None:
            self._thread.join(JOIN_S)

    def _make(self) -> tuple[StepBatch, list[MicroBatch]] | None:
        loaded = self._load() if self._sharing is None else self._sharing.complete(self._load)
        if loaded is None:
            return None
        batch, contents = loaded
        made, first = [], 0
        for slots in self._micro_batches(batch):
            part = slice(first, first := first + len(slots))
            made.append(self._maker(batch.clips[part], contents[part], self._step, batch.size, batch.ranks_per_clip))
        self._step += 1
        return batch, made

    def _load(self) -> tuple[StepBatch, list[Contents]] | None:
        """The next batch with the clips that this rank has loaded, and their contents; those of a micro-batch pass
        through the networks together."""
        batch = next(self._batches, None)
        if batch is None:
            return None
        contents: list[Contents] = []
        for slots in self._micro_batches(batch):
            contents += self._maker.read([clip for clip in batch.clips if clip.slot in slots], self._step)
        return batch, contents

    def _micro_batches(self, batch: StepBatch) -> list[list[int]]:
        """The slots of each."""
        micro = -(-len(batch.slots) // self._accumulation)
        return [batch.slots[first : first + micro] for first in range(0, len(batch.slots), micro)]

    def _run(self) -> None:
        more = True
        while more and not self._closed.is_set():
            try:
                torch.cuda.set_device(self._maker.device)
                with torch.cuda.stream(self._stream):
                    item = self._make()
                    ready = self._stream.record_event()
                result = (item, ready, None)
                more = item is not None
            except BaseException as error:
                result, more = (None, None, error), False
            while not self._closed.is_set():
                try:
                    self._made.put(result, timeout=0.1)
                    break
                except queue.Full:
                    continue
        if self._sharing is not None:
            self._sharing.leave()

    def _take(self) -> tuple[StepBatch, list[MicroBatch]] | None:
        started = time.monotonic()
        item, ready, error = self._made.get()
        if error is not None:
            raise error
        if item is None:
            return None
        item[0].wait_s = time.monotonic() - started
        current = torch.cuda.current_stream(self._maker.device)
        current.wait_event(ready)
        for tensor in (tensor for batch in item[1] for tensor in batch.values()):
            if tensor is not None:
                tensor.record_stream(current)  # its memory is not to be reused before training has read it
        return item
