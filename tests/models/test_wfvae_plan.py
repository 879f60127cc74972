"""Plans fit their budgets, and what is predicted is what the allocator gives out."""

import pytest
import torch
from allocations import peak_bytes
from osp_fast.kernels.launch import forced_path

from osp_fast.errors import UserError
from osp_fast.models.wfvae import WFVAE, WFVAE_CONFIGS, WFVAEConfig
from osp_fast.models.wfvae_plan import Predictor, Task, describe, make_plan
from osp_fast.models.wfvae_stream import Plan
from osp_fast.models.wfvae_trace import LiveBytes

CPU = torch.device("cpu")
MIB = 2**20


@pytest.fixture(scope="module")
def vae() -> WFVAE:
    torch.manual_seed(0)
    config = WFVAEConfig(
        base_channels=16,
        encoder_num_resblocks=1,
        encoder_energy_flow_hidden_size=16,
        decoder_num_resblocks=1,
        decoder_energy_flow_hidden_size=16,
    )
    return WFVAE(config).requires_grad_(False)


@pytest.fixture(scope="module")
def released() -> WFVAE:
    with torch.device("meta"):
        return WFVAE(WFVAE_CONFIGS["WFVAEModel_D8_4x8x8"]).to(torch.bfloat16)


def run(vae: WFVAE, task: Task, plan: Plan) -> None:
    """What the task says, its input made inside."""
    if task.direction == "encode":
        video = torch.zeros((1, 3, task.frames, task.height, task.width), dtype=torch.uint8)
        vae.encode(video, plan)
    elif task.collected:
        vae.decode(torch.zeros(1, 8, task.latent_frames, *task.cells), plan)
    else:
        for piece in vae.decode_stream((torch.zeros(1, 8, task.latent_frames, *task.cells),), plan):
            del piece


@pytest.mark.parametrize(
    "direction, budget, expected",
    [
        ("decode", 70, (6, None, False)),
        ("decode", 50, (2, None, False)),
        ("decode", 32, (1, (12, 20), True)),
        ("encode", 50, (6, None, False)),
        ("encode", 30, (3, None, False)),
        ("encode", 15, (1, (12, 20), True)),
    ],
)
def test_the_peak_is_as_predicted(vae, direction, budget, expected):
    task = Task(direction, 21, 192, 160)
    plan = make_plan(vae, task, budget * MIB, CPU)
    weights = sum(parameter.numel() * 4 for parameter in vae.parameters())
    with torch.no_grad():
        measured = weights + peak_bytes(lambda: run(vae, task, plan))
    print(f"{describe(task, plan, budget * MIB)}; measured {measured / MIB:.1f} MiB")
    assert plan.peak_bytes <= budget * MIB
    assert 0.85 < measured / plan.peak_bytes < 1.15
    assert (plan.chunk, plan.tile, plan.tiles_outside) == expected


def test_pieces_need_less_than_a_whole_result(vae):
    whole, pieces = (Task("decode", 25, 96, 112, collected=collected) for collected in (True, False))
    model = {task: Predictor(vae, task, CPU) for task in (whole, pieces)}
    plan = Plan(chunk=2)
    found = {task: model[task].predicted(plan).peak_bytes for task in model}
    assert found[pieces] < found[whole]
    for task in model:
        with torch.no_grad():
            measured = model[task].weight_bytes + peak_bytes(lambda task=task: run(vae, task, plan))
        assert 0.85 < measured / found[task] < 1.15
    # Time outside with tiles: all tiles carry their frames, overlapping ones in their halos.
    tiled = model[pieces].predicted(Plan(2, (6, 7))).peak_bytes
    with torch.no_grad():
        measured = model[pieces].weight_bytes + peak_bytes(lambda: run(vae, pieces, Plan(2, (6, 7))))
    assert 0.85 < measured / tiled < 1.15


def traced(vae: WFVAE, task: Task, plan: Plan, path: str) -> int:
    """The peak of a whole decode on the meta device, weights and latents included."""
    held = sum(parameter.numel() * parameter.element_size() for parameter in vae.parameters())
    latents = torch.empty((1, 8, task.latent_frames, *task.cells), dtype=torch.bfloat16, device="meta")
    with forced_path(path), torch.no_grad(), LiveBytes() as trace:
        vae.decode(latents, plan)
    return held + latents.nbytes + trace.peak


@pytest.mark.parametrize("path, frames", [("triton", 93), ("reference", 17)])
def test_released_size_at_1080p_fits_4_gib(released, path, frames):
    """Latents in bfloat16, the decoded video held too; on the meta device, every chunk of every tile."""
    task = Task("decode", frames, 1080, 1920)
    with forced_path(path):
        plan = make_plan(released, task, 4 << 30, CPU)
    assert plan.peak_bytes <= 4 << 30
    measured = traced(released, task, plan, path)
    print(f"{describe(task, plan, 4 << 30)}; traced {measured / 2**30:.2f} GiB")
    assert 0.95 < measured / plan.peak_bytes < 1.05
    line = describe(task, plan, 4 << 30)
    assert line.startswith(f"VAE decode of {frames}x1080x1920: ") and line.endswith(" of 4.00 GiB") and "\n" not in line
    assert plan.tile and plan.tiles_outside


def test_released_size_is_not_tiled_where_memory_allows(released):
    plan = make_plan(released, Task("decode", 93, 480, 640), 64 << 30, CPU)
    assert plan == Plan(24, None, False, plan.peak_bytes)
    assert make_plan(released, Task("decode", 93, 480, 640), 64 << 30, CPU, most_frames=4).chunk == 4


def test_what_cannot_fit_is_refused_with_the_least_budget(vae):
    task = Task("decode", 5, 64, 64)
    with pytest.raises(UserError, match=r"VAE decode of 5x64x64 needs at least (\d+\.\d) MiB, and 0\.1 MiB") as error:
        make_plan(vae, task, MIB // 10, CPU)
    least = float(str(error.value).split("at least ")[1].split(" ")[0])
    plan = make_plan(vae, task, round((least + 0.1) * MIB), CPU)
    assert plan.peak_bytes <= (least + 0.1) * MIB


def test_live_bytes_counts_what_is_referred_to():
    with LiveBytes() as trace:
        x = torch.zeros(1000)
        view = x[10:]
        del x
        assert trace.live == 4000
        y = view + 1
        assert trace.live == 4000 + 3960
        y += 1
        del view
        assert (trace.live, trace.peak) == (3960, 7960)
    assert y.numel() == 990
