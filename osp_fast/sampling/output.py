"""The files of a sampling run: which clips there are, which are finished, their sidecars and the grid."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from osp_fast.data.decode import read_image, read_video
from osp_fast.errors import UserError
from osp_fast.files import whole
from osp_fast.models.weights import write_json
from osp_fast.pipeline.settings import PROMPT_TEMPLATE
from osp_fast.sample_files import ClipFiles, Grid, clip_path, versions

# What a clip does not depend on, or by rounding only: a clip is finished whatever these were.
WITHOUT_EFFECT = {
    *("text_prompt", "num_samples_per_prompt", "save_img_path", "overwrite", "dry_run", "preset", "cache_dir"),
    *("device", "sp", "sp_mode", "start_timeout", "compile", "cuda_graphs"),
    *("memory_budget", "save_memory", "vae_memory", "enable_tiling", "versions", "step_cache_skipped", "calls"),
}


@dataclass(frozen=True)
class Clip:
    """One clip of a run: its number, and which sample of which prompt it is, all from 0."""

    index: int
    prompt_index: int
    sample_index: int


class Output:
    """What a run writes to its folder.

    settings: all that the flags resolve to, with the fingerprints of the models
    prompts: as given; per_prompt: clips of each
    """

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any],
        prompts: Sequence[str],
        per_prompt: int,
        negative_prompt: str,
    ):
        self.folder, self._settings, self._prompts = folder, settings, prompts
        self._per_prompt, self._negative = per_prompt, negative_prompt
        self._frames, self._fps = settings["num_frames"], settings["fps"]
        self._suffix = f"gs{settings['guidance_scale']}_s{settings['num_sampling_steps']}"
        self.clips = [
            Clip(prompt * per_prompt + sample, prompt, sample)
            for prompt in range(len(prompts))
            for sample in range(per_prompt)
        ]

    def stem(self, index: int) -> Path:
        """Of a clip's files, without suffix."""
        return self.folder / f"{self._settings['sample_method']}_{index}_{self._suffix}"

    def path(self, clip: Clip) -> Path:
        """Of a clip: .mp4, or .jpg for one frame."""
        return clip_path(self.stem(clip.index), self._frames)

    def sidecar_path(self, clip: Clip) -> Path:
        """Of what is told about a clip."""
        stem = self.stem(clip.index)
        return stem.with_name(stem.name + ".json")

    def facts(self, clip: Clip) -> dict[str, Any]:
        """What is known about a clip before it is made."""
        return {
            "index": clip.index,
            "prompt_index": clip.prompt_index,
            "sample_index": clip.sample_index,
            "prompt": self._prompts[clip.prompt_index],
            **{name: value for name, value in self._settings.items() if name != "text_prompt"},
            "negative_prompt": self._negative,
        }

    def is_finished(self, clip: Clip) -> bool:
        """Whether the clip is there, and made with these settings from these models."""
        return self.path(clip).is_file() and self.difference(clip) is None

    def difference(self, clip: Clip) -> str | None:
        """What tells the clip that is there from the one that is asked for, by its sidecar; None: nothing."""
        try:
            found = json.loads(self.sidecar_path(clip).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return "no sidecar"
        expected = json.loads(json.dumps(self.facts(clip)))
        for name, value in expected.items():
            if name not in WITHOUT_EFFECT and (not isinstance(found, dict) or found.get(name) != value):
                return name
        return None

    def forget(self, clip: Clip) -> None:
        """Let the clip count as not finished."""
        path = self.sidecar_path(clip)
        for file in (path, *path.parent.glob(f".{path.name}.*")):  # a killed process may have left some
            file.unlink(missing_ok=True)

    def files(self) -> ClipFiles:
        """What writes one clip after the other."""
        return ClipFiles(self.stem, self._frames, self._fps)

    def write_sidecar(self, clip: Clip, refined: str | None, cleaned: str, **more: Any) -> None:
        """Tell all that made a clip, once it is there.

        refined: its prompt as the refiner wrote it; cleaned: as it was used; more: facts of making it
        """
        facts = {
            **self.facts(clip),
            **({} if refined is None else {"refined_prompt": refined}),
            "full_prompt": PROMPT_TEMPLATE.format(cleaned),
            **more,
            "versions": versions(),
        }
        path = self.sidecar_path(clip)
        try:
            with whole(path) as writing:
                write_json(writing, facts)
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}): name another --save_img_path") from error

    @property
    def grid_path(self) -> Path:
        """Of all clips side by side."""
        return clip_path(self._grid_stem, self._frames)

    @property
    def _grid_stem(self) -> Path:
        return self.folder / f"{self._settings['sample_method']}_{self._suffix}_grid"

    def has_grid(self) -> bool:
        """Whether the grid is there and newer than all clips."""
        if not self.grid_path.is_file():
            return False
        made = self.grid_path.stat().st_mtime_ns
        return all(self.path(clip).stat().st_mtime_ns <= made for clip in self.clips)

    def write_grid(self) -> Path:
        """All clips side by side, read back from their files; returns its path."""
        width = self._settings["width"]
        grid = Grid(self._per_prompt, width) if self._per_prompt > 1 else Grid.of(len(self.clips), width)
        for clip in self.clips:
            path = self.path(clip)
            grid.add(read_image(path)[None] if self._frames == 1 else read_video(path))
        return grid.write(self._grid_stem, self._fps)
