"""Judge a VAE by a video: python -m osp_fast.reconstruct VIDEO --ae_path FOLDER.

The video is encoded and decoded piece by piece, whatever its length: cut to 4n+1 frames, its sides cropped around the
centre to multiples of 8. The result is written beside it, and its PSNR and SSIM are printed.
"""

import json
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from osp_fast.cli import parse_reconstruct
from osp_fast.config import ReconstructConfig
from osp_fast.data.decode import VideoFacts, open_video
from osp_fast.data.quality import Quality
from osp_fast.data.write import IMAGE_SUFFIXES, VideoWriter, write_image
from osp_fast.device import check_single_process, memory_allowance, resolve_device, resolve_dtype
from osp_fast.errors import UserError, run_entry_point
from osp_fast.models.text_encoder import find_folder
from osp_fast.models.wfvae import WFVAE
from osp_fast.models.wfvae_plan import Planner, Task
from osp_fast.models.wfvae_stream import SPACE_STRIDE, TIME_STRIDE
from osp_fast.pipeline.decoding import pixel_type, to_frames
from osp_fast.progress import Progress, say

DEFAULT_FPS = 24.0  # of a video that does not say


def main(argv: Sequence[str] | None = None) -> None:
    """Reconstruct a video as the flags say. Raises `UserError`."""
    video, config = parse_reconstruct(argv)
    check_single_process("osp_fast.reconstruct")
    device = resolve_device(config.device)
    output = output_path(Path(video), config)
    folder = find_folder(config.ae_path, config.cache_dir)
    vae = WFVAE.from_pretrained(folder, resolve_dtype(config.dtype, device), device).requires_grad_(False).eval()
    with open_video(video) as (facts, pieces), torch.no_grad():
        quality = reconstruct(vae, facts, pieces, output, config.vae_memory, device)
    result = {"video": video, "frames": quality.frames, "psnr": round(quality.psnr, 3), "ssim": round(quality.ssim, 5)}
    say(f"wrote {output}")
    print(json.dumps(result))


def output_path(video: Path, config: ReconstructConfig) -> Path:
    """Where the result goes. Raises `UserError` if there is something already, or the folder is missing."""
    suffix = ".png" if video.suffix.lower() in IMAGE_SUFFIXES else ".mp4"
    output = Path(config.output) if config.output else video.with_name(f"{video.stem}.reconstruction{suffix}")
    if output.suffix.lower() != suffix:
        raise UserError(f"--output {output}: the result of {video} needs a name that ends with {suffix}")
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: the folder {output.parent} is missing: make it, or name another")
    if output.resolve() == video.resolve():
        raise UserError(f"--output {output} is the video itself: name another file")
    if output.exists() and not config.overwrite:
        raise UserError(f"{output} exists: add --overwrite to replace it, or name another file by --output")
    return output


def reconstruct(
    vae: WFVAE,
    facts: VideoFacts,
    pieces: Iterator[np.ndarray],
    output: Path,
    vae_memory: int | None,
    device: torch.device,
) -> Quality:
    """Encode, decode, write and compare a video piece by piece; frames (t, H, W, 3), uint8. Raises `UserError`."""
    height, width = (size // SPACE_STRIDE * SPACE_STRIDE for size in (facts.height, facts.width))
    if not height or not width:
        raise UserError(
            f"the video's {facts.width}x{facts.height} pixels are fewer than {SPACE_STRIDE} in a row: give a larger one"
        )
    top, left = (facts.height - height) // 2, (facts.width - width) // 2
    frames = max(facts.frames, 1)
    frames = (frames - 1) // TIME_STRIDE * TIME_STRIDE + 1
    # Encoder and decoder work in turns, so that each may hold half.
    weights = sum(weight.numel() * weight.element_size() for weight in vae.parameters())
    total = memory_allowance(device, weights) if vae_memory is None else vae_memory
    planner = Planner(vae, device, lambda held: (total + held) // 2, report=say)
    encode, decode = (
        planner(Task(direction, frames, height, width, collected=False, pixels=pixel_type(vae)))
        for direction in ("encode", "decode")
    )
    originals: deque[Tensor] = deque()

    def source() -> Iterator[Tensor]:
        """Pieces (1, 3, t, H, W), uint8, which are kept until their reconstruction comes."""
        for piece in whole_groups(pieces):
            cropped = torch.from_numpy(np.ascontiguousarray(piece[:, top : top + height, left : left + width]))
            originals.append(cropped)
            yield cropped.to(device).permute(3, 0, 1, 2)[None]

    progress, quality = Progress(frames), Quality()
    with ExitStack() as stack:
        writer = None
        means = (moments.chunk(2, dim=1)[0] for moments in vae.encode_stream(source(), encode))
        for video in vae.decode_stream(means, decode, pixel_type(vae)):
            if not torch.isfinite(video).all():
                raise UserError("the VAE's frames are not finite numbers: check --ae_path, or use --dtype fp32")
            found = to_frames(video)
            expected = taken(originals, len(found)).to(device)
            colours = torch.from_numpy(found).to(device).movedim(3, 1), expected.movedim(3, 1)
            quality.add(*(values.float() / 255 for values in colours))
            if output.suffix == ".png":
                write_image(output, found[0])
            else:
                writer = writer or stack.enter_context(VideoWriter(output, facts.fps or DEFAULT_FPS))
                writer.write(found)
            done = min(quality.frames, frames)
            facts_so_far = f"PSNR {quality.psnr:.2f} dB, SSIM {quality.ssim:.4f}"
            progress.show(done, f"frame {quality.frames}/{frames}", facts_so_far)
    progress.close()
    say(f"{quality.frames} frames of {height}x{width}: PSNR {quality.psnr:.2f} dB, SSIM {quality.ssim:.4f}")
    return quality


def whole_groups(pieces: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """One frame, then four at a time; what is left over at the end is dropped, so that 4n+1 frames come."""
    size, waiting = 1, None
    for piece in pieces:
        waiting = piece if waiting is None else np.concatenate((waiting, piece))
        while len(waiting) >= size:
            yield waiting[:size]
            waiting, size = waiting[size:], TIME_STRIDE


def taken(pieces: deque[Tensor], frames: int) -> Tensor:
    """Remove the first `frames` frames of the pieces (t, H, W, 3)."""
    parts = []
    while frames:
        piece = pieces.popleft()
        if len(piece) > frames:
            pieces.appendleft(piece[frames:])
            piece = piece[:frames]
        parts.append(piece)
        frames -= len(piece)
    return torch.cat(parts)


if __name__ == "__main__":
    run_entry_point(main)
