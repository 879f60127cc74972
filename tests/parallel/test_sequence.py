"""A clip that several ranks share: the same as on one, whatever does not divide."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import shared_clip
from ranks import RankProcesses, run_ranks

from osp_fast.errors import EXIT_USER_ERROR
from osp_fast.models.dit import DiT
from osp_fast.parallel.guidance import SamplingMesh
from osp_fast.parallel.world import Ranks, World

TOLERANCE = 1e-5


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module")
def golden() -> DiT:
    return DiT.from_pretrained(shared_clip.GOLDEN).requires_grad_(False)


@pytest.fixture(scope="module")
def alone(golden) -> dict:
    """What one rank finds."""
    mesh = SamplingMesh.of(World(Ranks(), torch.device("cpu")), guided=True, timeout_s=1.0)
    mesh.share(golden)
    cached = shared_clip.denoised(golden, mesh, shared_clip.CACHED_STEPS, shared_clip.THRESHOLD)
    assert 0 < cached[1] < shared_clip.CACHED_STEPS - 1
    return dict(
        predictions=shared_clip.predictions(golden, shared_clip.five_heads()),
        latents=shared_clip.denoised(golden, mesh, shared_clip.STEPS)[0],
        cached=cached,
        describe=(mesh.describe(),) * 2,
    )


def shares(total: int, ranks: int) -> list[int]:
    return [len(range(rank, total, ranks)) for rank in range(ranks)]


def exchanged(rank: int, ranks: int, batch: int, tokens: int, heads: int, head_dim: int, blocks: int) -> int:
    """The formula in `sequence.py`, float32, for `blocks` and the prediction of 32 numbers for each token."""
    own, held = shares(tokens, ranks)[rank], shares(heads, ranks)[rank]
    block = batch * head_dim * 4 * (3 * own * (heads - held) + (tokens - own) * held)
    return blocks * block + batch * own * 32 * 4 * (ranks - 1)


DESCRIPTIONS = {
    2: "2 GPUs share each clip: one for the prompt, one for the negative prompt",
    3: "3 GPUs share each clip's tokens",
    4: "4 GPUs share each clip: 2 for the prompt and 2 for the negative prompt, each with a part of the tokens",
}


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_compute_what_one_does(alone, ranks, tmp_path):
    run_ranks(ranks, tmp_path, shared_clip.share_clips, str(tmp_path))
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks)]
    for rank in range(ranks):
        for name, expected in alone["predictions"].items():
            assert relative(found[rank]["predictions"][name], expected) <= TOLERANCE, (rank, name)
            assert torch.equal(found[rank]["predictions"][name], found[0]["predictions"][name]), (rank, name)
        assert relative(found[rank]["latents"], alone["latents"]) <= TOLERANCE
        assert torch.equal(found[rank]["latents"], found[0]["latents"])
        latents, skipped = found[rank]["cached"]
        assert skipped == alone["cached"][1]
        assert relative(latents, alone["cached"][0]) <= TOLERANCE
        assert torch.equal(latents, found[0]["cached"][0])
        assert found[rank]["describe"] == (f"{ranks} GPUs share each clip's tokens", DESCRIPTIONS[ranks])
        # Guidance on an even number of ranks: groups of half the size, one clip each, and the predictions.
        group, batch = (ranks, 2) if ranks % 2 else (ranks // 2, 1)
        prediction = 8 * 3 * 10 * 14 * 4
        assert found[rank]["bytes"] == (
            exchanged(rank, ranks, 2, tokens=45, heads=5, head_dim=12, blocks=4),
            0,
            shared_clip.STEPS * exchanged(rank % group, group, batch, tokens=105, heads=2, head_dim=48, blocks=6),
            0 if ranks % 2 else shared_clip.STEPS * prediction,
        )
    if ranks == 2:
        assert relative(found[0]["compiled"], alone["predictions"]["five heads"]) <= TOLERANCE
        assert "autograd" in found[0]["backward"] and "all_to_all" in found[0]["backward"]


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
