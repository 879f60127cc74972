"""Encoding and decoding piece by piece: temporal chunks, tiles of the frames, and what state belongs to which.

The stage at pixel resolution may be tiled: every tile's input is as much wider as the layers' `needs` say (clipped at
the border of the frame, where the network pads), so the tile's own cells come out as they would from the whole frame.
Time is the outer loop (a chunk is finished, all its tiles, before the next one; every tile's state is alive) or the
tiles are (one tile through the whole clip, then the next; one state is alive, but nothing is done before all is).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from osp_fast.models.wfvae_decoder import COLOURS, Decoder
from osp_fast.models.wfvae_encoder import Encoder
from osp_fast.models.wfvae_layers import ChunkState, Span

TIME_STRIDE, SPACE_STRIDE = 4, 8


@dataclass(frozen=True)
class Plan:
    """How a clip is cut.

    chunk: latent frames at once, None for all; tile: (rows, columns) in latent cells, None for the whole frame;
    tiles_outside: whether tiles are the outer loop; peak_bytes: what a planner predicts, 0 if none did.
    """

    chunk: int | None = None
    tile: tuple[int, int] | None = None
    tiles_outside: bool = False
    peak_bytes: int = 0

    def __post_init__(self) -> None:
        sizes = [size for size in (self.chunk, *(self.tile or ())) if size is not None]
        if not all(isinstance(size, int) and size > 0 for size in sizes) or (self.tile and len(self.tile) != 2):
            raise ValueError(
                f"chunk {self.chunk} and tile {self.tile} must be whole numbers of latent cells, at least 1"
            )


@dataclass(frozen=True)
class Window:
    """A tile along one axis. own: its latent cells; padded: those that it is computed from."""

    own: Span
    padded: Span

    def slices(self, scale_out: int) -> tuple[slice, slice]:
        """(where the tile's result goes, which part of the padded tile's result that is), `scale_out` per cell."""
        start, end = (scale_out * cell for cell in self.own)
        skipped = scale_out * self.padded[0]
        return slice(start, end), slice(start - skipped, end - skipped)


def windows(cells: int, tile: int | None, padded: Callable[[Span], Span]) -> list[Window]:
    """An axis of `cells` latent cells in tiles of nearly equal size, none larger than `tile`."""
    count = -(-cells // tile) if tile else 1
    edges = [cells * index // count for index in range(count + 1)]
    found = []
    for own in pairwise(edges):
        first, end = padded(own)
        found.append(Window(own, (max(first, 0), min(end, cells))))
    return found


def encoder_windows(encoder: Encoder, cells: int, tile: int | None) -> list[Window]:
    """Tiles of `Encoder.early`."""

    def padded(own: Span) -> Span:
        first, end = encoder.early_needs(own)
        return first // SPACE_STRIDE, -(-end // SPACE_STRIDE)

    return windows(cells, tile, padded)


def decoder_windows(decoder: Decoder, cells: int, tile: int | None) -> list[Window]:
    """Tiles of `Decoder.late`."""
    return windows(cells, tile, lambda own: decoder.late_needs((SPACE_STRIDE * own[0], SPACE_STRIDE * own[1])))


def chunks(pieces: Iterable[Tensor], first: int, others: int) -> Iterator[tuple[Tensor, bool]]:
    """Pieces (B, C, t, H, W) of any lengths -> (chunk, whether it is the last): `first` frames, then `others` each.

    Chunks are views of pieces, joined only where a chunk spans several.
    """
    waiting: list[Tensor] = []
    size = first
    for piece in pieces:
        waiting.append(piece)
        while sum(part.shape[2] for part in waiting) > size:
            yield _take(waiting, size), False
            size = others
    if waiting:
        yield _take(waiting, sum(part.shape[2] for part in waiting)), True


def _take(waiting: list[Tensor], frames: int) -> Tensor:
    """Remove that many frames from the front of the list."""
    taken = []
    while frames:
        part = waiting.pop(0)
        if part.shape[2] > frames:
            waiting.insert(0, part[:, :, frames:])
            part = part[:, :, :frames]
        taken.append(part)
        frames -= part.shape[2]
    return taken[0] if len(taken) == 1 else torch.cat(taken, dim=2)


class _Tiles:
    """One stage's pass over a clip in tiles: windows, and one state for each tile."""

    def __init__(self, rows: list[Window], columns: list[Window]):
        self.places = [(row, column) for row in rows for column in columns]
        self.states = [ChunkState() for _ in self.places]

    def __len__(self) -> int:
        return len(self.places)

    def run(
        self,
        index: int,
        last: bool,
        x: Tensor,
        stage: Callable[[Tensor, ChunkState], Tensor],
        scales: tuple[int, int],
    ) -> tuple[Tensor, tuple[slice, slice]]:
        """Stage on tile `index` of x, a chunk of whole frames: (the tile's result, its rows and columns).

        scales: of the stage's input and output, rows per latent cell.
        """
        into, out_of = scales
        window = [slice(into * axis.padded[0], into * axis.padded[1]) for axis in self.places[index]]
        state = self.states[index]
        state.last = last
        result = stage(x[..., window[0], window[1]], state)
        state.first = False
        if last:
            state.kept.clear()
        (rows, inner_rows), (columns, inner_columns) = (axis.slices(out_of) for axis in self.places[index])
        return result[..., inner_rows, inner_columns], (rows, columns)


def encode_stream(encoder: Encoder, pieces: Iterable[Tensor], plan: Plan) -> Iterator[Tensor]:
    """Frames (B, 3, t, H, W) in pieces of any lengths -> mean and log-variance of their latent frames, in chunks.

    Raises ValueError if the frames are not 4n+1 or not of multiples of 8 pixels.
    """
    step = TIME_STRIDE * (plan.chunk or 1 << 40)
    clip = _checked(chunks(pieces, step - TIME_STRIDE + 1, step))
    state = ChunkState()

    def tiles_of(video: Tensor) -> _Tiles:
        sizes = [size // SPACE_STRIDE for size in video.shape[3:]]
        return _Tiles(*(encoder_windows(encoder, *axis) for axis in zip(sizes, plan.tile or (None, None), strict=True)))

    def early(tiles: _Tiles, index: int, video: Tensor, last: bool, whole: Tensor | None) -> Tensor:
        part, place = tiles.run(index, last, video, encoder.early, (SPACE_STRIDE, 1))
        return _placed(part, place, [size // SPACE_STRIDE for size in video.shape[3:]], whole, len(tiles))

    def late(x: Tensor, last: bool) -> Tensor:
        state.last = last
        moments = encoder.late(x, state)
        state.first = False
        return moments

    tiles = None
    if plan.tiles_outside:
        held = list(clip)
        features: list[Tensor | None] = [None] * len(held)
        tiles = tiles_of(held[0][0])
        for index in range(len(tiles)):
            for number, (video, last) in enumerate(held):
                features[number] = early(tiles, index, video, last, features[number])
        for number, (_, last) in enumerate(held):
            x, features[number] = features[number], None
            yield late(x, last)
        return
    for video, last in clip:
        tiles = tiles or tiles_of(video)
        x = None
        for index in range(len(tiles)):
            x = early(tiles, index, video, last, x)
        moments = late(x, last)
        del x, video  # nothing of this chunk is held while the next one is computed
        yield moments
        del moments


def decode_stream(
    decoder: Decoder, latents: Iterable[Tensor], plan: Plan, dtype: torch.dtype | None = None
) -> Iterator[Tensor]:
    """Raw latents (B, C, t, h, w) in pieces of any lengths -> frames (B, 3, t', 8h, 8w) in order.

    dtype: of the pixels, by default the latents'. With tiles outside all frames come at once.
    """
    chunk = plan.chunk or 1 << 40
    state = ChunkState()

    def early() -> Iterator[tuple[Tensor, bool]]:
        for part, last in chunks(latents, chunk, chunk):
            state.last = last
            x = decoder.early(part, state)
            state.first = False
            yield x, last
            del x

    def tiles_of(x: Tensor) -> _Tiles:
        axes = zip(x.shape[3:], plan.tile or (None, None), strict=True)
        return _Tiles(*(decoder_windows(decoder, *axis) for axis in axes))

    def late(tiles: _Tiles, index: int, x: Tensor, last: bool) -> tuple[Tensor, tuple[slice, slice]]:
        return tiles.run(
            index, last, x, lambda part, tile_state: decoder.late(part, tile_state, dtype), (1, SPACE_STRIDE)
        )

    tiles = None
    if plan.tiles_outside:
        held = list(early())
        x = held[0][0]
        tiles, frames = tiles_of(x), TIME_STRIDE * (sum(x.shape[2] for x, _ in held) - 1) + 1
        video = None
        for index in range(len(tiles)):
            start = 0
            for x, last in held:
                part, place = late(tiles, index, x, last)
                if video is None:
                    sizes = (SPACE_STRIDE * size for size in x.shape[3:])
                    video = part.new_empty((x.shape[0], COLOURS, frames, *sizes))
                end = start + part.shape[2]
                video[:, :, start:end, place[0], place[1]] = part
                start = end
        yield video
        return
    for x, last in early():
        tiles = tiles or tiles_of(x)
        video = None
        for index in range(len(tiles)):
            part, place = late(tiles, index, x, last)
            video = _placed(part, place, [SPACE_STRIDE * size for size in x.shape[3:]], video, len(tiles))
        del x, part  # nothing of this chunk is held while the next one is computed
        yield video
        del video


def _placed(part: Tensor, place: tuple[slice, slice], size: list[int], whole: Tensor | None, count: int) -> Tensor:
    """A tile's result written into the whole frames, which the first of `count` tiles makes; a lone one is whole."""
    if count == 1:
        return part
    if whole is None:
        batch, channels, frames = part.shape[:3]
        whole = part.new_empty((batch, frames, *size, channels)).movedim(-1, 1)
    whole[..., place[0], place[1]] = part
    return whole


def _checked(clip: Iterator[tuple[Tensor, bool]]) -> Iterator[tuple[Tensor, bool]]:
    """Chunks of a video as they are. Raises ValueError for sizes that the encoder cannot take."""
    seen = 0
    for video, last in clip:
        seen += video.shape[2]
        height, width = video.shape[3:]
        if (last and (seen - 1) % TIME_STRIDE) or height % SPACE_STRIDE or width % SPACE_STRIDE:
            raise ValueError(f"a video of (T, H, W) = {(seen, height, width)}: T must be 4n+1, H and W multiples of 8")
        yield video, last
