"""The ranks that share each clip of a pipeline (`sample --sp`)."""

import math
from collections.abc import Callable

import torch

from osp_fast.engine.exchange_cost import choose_plan, describe_choice
from osp_fast.models.dit import DiT, DiTConfig
from osp_fast.parallel.guidance import SamplingMesh
from osp_fast.parallel.sequence_plan import SequencePlan, plan_of_mode
from osp_fast.pipeline.sampler import Teamwork
from osp_fast.pipeline.settings import ClipSettings


class Team:
    """How they do it, settled when the first clip's size is known; all ranks must call everything alike.

    mode: as `--sp_mode` has it; dtype: of the model; report: gets lines for the user
    """

    def __init__(self, mesh: SamplingMesh, mode: str, dtype: torch.dtype, report: Callable[[str], None]):
        self._mesh, self._mode, self._dtype, self._report = mesh, mode, dtype, report
        self.plan: SequencePlan | None = None

    @property
    def ranks(self) -> int:
        """How many there are."""
        return self._mesh.size

    def settle(self, settings: ClipSettings, config: DiTConfig) -> SequencePlan:
        """How those share the tokens that compute the same half of guidance, by the size of the first clips.

        Raises `UserError` where the mode does not go with the ranks.
        """
        if self.plan is None:
            length, sparse_n = self._mesh.length, config.sparse_n if config.sparse1d else 1
            cells = settings.latent_size(config)
            tokens = math.prod(cell // patch for cell, patch in zip(cells, config.patch, strict=True))
            batch = 2 if settings.guided and self._mesh.half is None else 1
            self._report(self._mesh.describe())
            self.plan = plan_of_mode(self._mode, length, sparse_n)
            if self.plan is None:
                self.plan = choose_plan(config, length, tokens, batch, self._dtype)
            for line in describe_choice(config, self.plan, tokens, batch, self._dtype) if length > 1 else ():
                self._report(line)
        return self.plan

    def join(self, dit: DiT) -> Teamwork:
        """Make a DiT one of the ranks', once it is settled how."""
        self._mesh.share(dit, self.plan, self._report)
        return Teamwork(self._mesh.half, self._mesh.exchange, self._mesh.agree)
