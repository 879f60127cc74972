"""What all cases of the suite `sample` share: what is right, what a step costs, and what it is predicted to take."""

import torch
from torch import Tensor

from bench.accuracy import relative_error
from bench.results import Row
from bench.suites.dits import (
    BUILD_S,
    DTYPES,
    Case,
    exact_seconds,
    exactly,
    fault,
    forward_bytes,
    fresh_dit,
)
from bench.suites.sample_steps import Sampler, Way, exact_prediction, guided_flops
from osp_fast.engine.cost import Workload
from osp_fast.engine.devices import DeviceModel
from osp_fast.engine.forward_peak import dit_on_meta, weight_bytes
from osp_fast.engine.sampling_cost import Streaming, step_seconds
from osp_fast.models.dit import DiTConfig

SUITE = "sample"
STEPS = 100  # of a clip
CHECKED_STEP = 37  # neither the first step, which a CUDA graph is captured of, nor the last
# Of the guided prediction. bfloat16: 3.3 % was reckoned on a CPU for 32 blocks, a quarter as wide.
TOLERANCE = {"cuda": 0.07, "cpu": 1e-4}
CPU_SECONDS = 8.0  # predicted, of the steps of a tiny clip


def expected_prediction(config: DiTConfig, case: Case, device: torch.device) -> tuple[Case, Tensor]:
    """What all are held against, of the weights as they are in the type that is measured, and of which clip."""
    dtype = DTYPES[device.type]

    def compute(smaller: Case) -> Tensor:
        return exact_prediction(fresh_dit(config, device, dtype), smaller, STEPS, CHECKED_STEP)

    return exactly(case, compute, device)


@torch.no_grad()
def judge(row: Row, sampler: Sampler, noise: Tensor, expected: Tensor) -> None:
    """Fill in whether a sampler of `STEPS` steps predicts what is expected of `checked_noise`."""
    row.rel_err = relative_error(sampler.predict(noise, CHECKED_STEP), expected)
    row.ok = row.rel_err <= TOLERANCE[expected.device.type]  # not if it is NaN
    if not row.ok:
        fault(row, f"WRONG, not timed: off by {row.rel_err:.1e}")


def step_row(config: DiTConfig, case: Case, one: Way, dtype: torch.dtype, name: str | None = None) -> Row:
    """Of a step, not measured yet. name: of its case, the clip's by default."""
    words = str(dtype).removeprefix("torch.")
    row = Row(SUITE, name or str(case), one.name, one.role, words, case.shape)
    row.flops, row.moved = guided_flops(config, case), forward_bytes(config, _workload(case, dtype))
    return row


def predicted_seconds(config: DiTConfig, case: Case, rates: DeviceModel) -> float:
    """Of the engine's step in bfloat16."""
    block = weight_bytes(dit_on_meta(config, torch.bfloat16).transformer_blocks[0])
    return step_seconds(config, _workload(case, torch.bfloat16), 1, Streaming(block_bytes=block), rates)


def _workload(case: Case, dtype: torch.dtype) -> Workload:
    """Of a step's one call of the DiT."""
    return Workload(2, case.latent_size, case.text_tokens, dtype, dtype)


def exact_step_seconds(config: DiTConfig, case: Case) -> float:
    """Predicted, of the two forwards in float32 and the model for them."""
    return BUILD_S + exact_seconds(config, _workload(case, torch.float32), training=False)
