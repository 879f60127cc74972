"""A clip that several ranks share: the same as on one, whatever does not divide."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import shared_clip
from ranks import RankProcesses, run_ranks

from osp_fast.errors import EXIT_USER_ERROR
from osp_fast.parallel.exchange_bytes import ClipExchange
from osp_fast.parallel.guidance import SamplingMesh
from osp_fast.parallel.sequence_plan import SequencePlan, sequence_plans

TOLERANCE = 1e-5


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module")
def alone() -> dict:
    """What one rank finds."""
    models = shared_clip.cases(1)
    found = {name: shared_clip.with_gradients(dit, inputs) for name, dit, inputs in models}
    golden, mesh = models[0][1].requires_grad_(False), SamplingMesh()
    cached = shared_clip.denoised(golden, mesh, shared_clip.CACHED_STEPS, shared_clip.THRESHOLD)
    assert 0 < cached[1] < shared_clip.CACHED_STEPS - 1
    return dict(clips=found, latents=shared_clip.denoised(golden, mesh, shared_clip.STEPS)[0], cached=cached)


def check(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Prediction and gradients are equal up to rounding; a parameter whose gradient is zero may have rounding's."""
    for name, value in found.items():
        wanted = expected["prediction" if name.startswith("prediction") else name]
        scale = max(wanted.norm().item(), 1e-3)
        assert (value - wanted).norm().item() / scale <= TOLERANCE, name
    assert found.keys() >= expected.keys()


DESCRIPTIONS = {
    2: "2 GPUs share each clip: one for the prompt, one for the negative prompt",
    3: "3 GPUs share each clip's tokens",
    4: "4 GPUs share each clip: 2 for the prompt and 2 for the negative prompt, each with a part of the tokens",
    8: "8 GPUs share each clip: 4 for the prompt and 4 for the negative prompt, each with a part of the tokens",
}


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_ranks_compute_what_one_does(alone, ranks, tmp_path):
    """Ulysses, skip sets, and both: predictions, gradients, and what is sent."""
    run_ranks(ranks, tmp_path, shared_clip.share_clips, str(tmp_path))
    every = [torch.load(tmp_path / f"clips-{rank}.pt") for rank in range(ranks)]
    assert {scope for scope, _ in every[0]} == {plan.scope for plan in sequence_plans(ranks, 4)}
    for (scope, name), first in every[0].items():
        check(first["results"], alone["clips"][name])
        dit, inputs = next((dit, inputs) for named, dit, inputs in shared_clip.cases(1) if named == name)
        batch, _, frames, rows, columns = inputs["latents"].shape
        sizes = frames * (rows // 2) * (columns // 2), batch, torch.float32.itemsize
        for rank, found in enumerate(every):
            same = found[scope, name]["results"]["prediction"]
            assert torch.equal(same, first["results"]["prediction"]), (scope, name, rank)
            sent = ClipExchange(dit.config, SequencePlan(ranks, scope), *sizes).total(rank)
            assert found[scope, name]["sent"] == (sent.forward, sent.backward), (scope, name, rank)
    guided = [torch.load(tmp_path / f"guided-{rank}.pt") for rank in range(ranks)]
    for found in guided:
        assert found["describe"] == DESCRIPTIONS[ranks]
        assert relative(found["latents"], alone["latents"]) <= TOLERANCE
        assert relative(found["cached"][0], alone["cached"][0]) <= TOLERANCE
        assert found["cached"][1] == alone["cached"][1]
        assert torch.equal(found["latents"], guided[0]["latents"])
        assert torch.equal(found["cached"][0], guided[0]["cached"][0])


def test_compiled_recomputed_and_on_spread_weights(alone, tmp_path):
    run_ranks(2, tmp_path, shared_clip.train_on_shared_weights, str(tmp_path))
    check(torch.load(tmp_path / "trained.pt"), alone["clips"]["five heads"])


@pytest.mark.parametrize("how", ["killed", "stopped", "killed later"])
def test_a_rank_that_is_lost_ends_the_others_in_a_sentence(how, tmp_path):
    ranks = RankProcesses(4, tmp_path, shared_clip.lose_a_rank, (how,))
    others = (0, 1, 3)
    for rank in others:
        ranks.processes[rank].join(20)
    assert [ranks.processes[rank].exitcode for rank in others] == [EXIT_USER_ERROR] * 3, ranks.printed()
    ranks.processes[2].kill()
    ranks.codes()
    for rank in others:
        printed = ranks.printed(rank)
        assert f"error: rank {rank} of 4 waits in vain for another rank (" in printed, printed
        assert "Traceback" not in printed
