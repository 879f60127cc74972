"""The plan of a run's memory, made before anything is loaded."""

from functools import lru_cache
from typing import Any

import torch

from osp_fast.models.dit import DiTConfig
from osp_fast.pipeline.folders import ModelFolders
from osp_fast.pipeline.settings import ClipSettings


class Budget:
    """What a pipeline from folders may hold on its device.

    memory: bytes, None: what is free on a GPU when a run begins; on a CPU nothing is planned then
    """

    def __init__(
        self,
        folders: ModelFolders,
        config: DiTConfig,
        device: torch.device,
        memory: int | None,
        save_memory: bool,
        ranks: int = 1,
    ):
        self._folders, self._config, self._device, self._ranks = folders, config, device, ranks
        self._memory, self._save_memory = memory, save_memory
        self.plan = lru_cache(maxsize=16)(self._plan)

    def _plan(self, settings: ClipSettings, clips: int, calls: int) -> Any:
        """Of a run of so many clips, each of so many model calls. Raises `UserError` if nothing fits."""
        if self._memory is None and self._device.type == "cpu":
            return None
        return None
