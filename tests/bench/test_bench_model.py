"""The suite `model`, and the original's blocks: small DiTs on the CPU in the place of the released one on a GPU."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import noop_context_fn

from bench.accuracy import relative_error
from bench.measure import Effort, Timing, time_in_turns
from bench.results import Ceilings, cases_of, complete_case
from bench.suites import Options, Setting, dits, model, upstream_blocks
from bench.suites.dits import Case, exactly, make_dit, same_dit
from bench.suites.model import DIRECTIONS, IMAGES, KINDS, Subject, jobs, measure_subject
from bench.suites.upstream_blocks import use_upstream_blocks
from osp_fast.data.buckets import Bucket
from osp_fast.errors import UserError
from osp_fast.models.dit import DIT_CONFIGS, DiTConfig

CPU = torch.device("cpu")
SMALL = DiTConfig(
    num_layers=4, num_attention_heads=2, attention_head_dim=24, caption_channels=8, cross_attention_dim=48, sparse_n=2
)
CASE = Case(Bucket(5, 48, 64), text_tokens=8)  # 24 tokens
RELEASED = DIT_CONFIGS["OpenSoraT2V_v1_3-2B/122"]
LIMITS = Ceilings(1e12, 1e10)
NAMES = ["osp_fast", "reference", "strong"]


def one_millisecond(contestants, device, effort):
    """A timer that runs each once, and says that the first took a millisecond, the second two, and so on."""
    for one in contestants:
        with one.around():
            one.calls[0]()
    return {one.name: Timing([[float(place)]]) for place, one in enumerate(contestants, 1)}


def measured(kind, timer=one_millisecond):
    rows = list(measure_subject(Subject(kind, SMALL, CASE), Setting(CPU, LIMITS, print, timer)))
    for of_case in cases_of(rows).values():
        complete_case(of_case, LIMITS)
    return rows


def traced(graphs):
    """A backend that runs graphs as they are traced; the list gets what calls each of them has."""

    def backend(graph, inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    return backend


@pytest.mark.parametrize("frames, height, padded", [(5, 48, False), (1, 80, True)])
def test_the_originals_blocks_compute_the_dit(frames, height, padded):
    """Also of clips that do not divide into sets, of padded ones, and all gradients with blocks computed once more."""
    case = Case(Bucket(frames, height, 48), 2, 7)
    dit = make_dit(SMALL, CPU).double()
    other = use_upstream_blocks(same_dit(dit, gradients=True)).recompute_blocks(noop_context_fn)
    batch = case.make_batch(SMALL, CPU)
    mask = None
    if padded:
        mask = torch.ones(2, *case.latent_size)
        mask[0, :, -4:], mask[0, :, :, -2:] = 0, 0
    results = []
    for one in (dit, other):
        out = one(batch.latents.double(), batch.timesteps, batch.text.double(), batch.text_mask, mask)
        if padded:  # what is not real is nobody's concern
            out = out * mask[:, None]
        results.append((out, torch.autograd.grad(out.square().mean(), list(one.parameters()))))
    (out, gradients), (found, others) = results
    assert relative_error(found, out) < 1e-7  # the tables of angles are float32
    assert max(map(relative_error, others, gradients)) < 1e-6


def test_the_originals_masks_are_of_keys_alone_and_made_once(monkeypatch):
    """In the computing type, (B, sets x heads, 1, keys), of memory for the keys; padding is masked."""
    masks = []
    attend = F.scaled_dot_product_attention

    def watched(q, k, v, attn_mask):
        masks.append(attn_mask)
        return attend(q, k, v, attn_mask)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    dit = use_upstream_blocks(dits.fresh_dit(SMALL, CPU, torch.bfloat16))
    batch = Case(Bucket(1, 48, 48), text_tokens=8).make_batch(SMALL, CPU)  # 9 tokens, padded to 12 for sets
    with torch.no_grad():
        dit(batch.latents.bfloat16(), batch.timesteps, batch.text.bfloat16(), batch.text_mask)
    full, text, _, _, single, text_of_sets, group, _ = masks
    assert [tuple(mask.shape) for mask in masks[::2]] == [(1, 2, 1, 9)] * 2 + [(1, 4, 1, 6)] * 2
    assert masks[2] is full and {mask.dtype for mask in masks} == {torch.bfloat16}
    assert text.shape == (1, 2, 1, 8) and text_of_sets.shape == (1, 4, 1, 8)
    assert full.eq(0).all() and text[0, 0, 0].lt(-9000).tolist() == [False] * 6 + [True] * 2
    # Of the tokens 9 to 11, which are padding, single skip has 10 in its first set, group skip 9.
    assert [single[0, head, 0].ne(0).sum().item() for head in range(4)] == [1, 1, 2, 2]
    assert [group[0, head, 0].ne(0).sum().item() for head in range(4)] == [1, 1, 2, 2]
    # Single skip copies nothing on its way in: a set is a view.
    x = torch.zeros(1, 12, 2, 4)
    assert upstream_blocks._sets(x, "single", 2).data_ptr() == x.data_ptr()


@pytest.mark.parametrize("kind", ["DiT", *KINDS])
def test_rows_of_both_directions(kind):
    rows = measured(kind)
    forward, both = cases_of(rows).values()
    name = "DiT 5x48x64" if kind == "DiT" else f"block {kind} 5x48x64"
    assert [row.case for row in (forward[0], both[0])] == [f"{name} {direction}" for direction in DIRECTIONS]
    for of_case in (forward, both):
        assert [(row.impl, row.role) for row in of_case] == [(one, one.replace("osp_fast", "ours")) for one in NAMES]
        assert all(row.ok and 0 < row.rel_err < 1e-4 for row in of_case) and [row.ms for row in of_case] == [1, 2, 3]
        assert of_case[0].vs == {"reference": 2, "strong": 3} and of_case[0].of_peak > 0
        assert len({(row.flops, row.moved) for row in of_case}) == 1 and of_case[0].shape["text_tokens"] == 8
    assert both[0].flops == 3 * forward[0].flops and both[0].moved > 2 * forward[0].moved


def test_what_is_wrong_is_not_timed_and_what_breaks_says_so(monkeypatch):
    attend = upstream_blocks._attend
    monkeypatch.setattr(upstream_blocks, "_attend", lambda q, k, *more: attend(q, k.roll(1, 1), *more))

    def broken(*given):
        raise RuntimeError("no kernel")

    monkeypatch.setattr("osp_fast.models.attention_backends.split_sets", broken)  # of sdpa
    rows = measured("group")
    assert [row.ok for row in rows] == [True, False, False] * 2 and rows[0].vs == {}
    assert rows[1].note.startswith("WRONG, not timed: off by") and rows[1].ms is None and rows[1].rel_err > 0.01
    assert rows[2].note == "no kernel"


def test_a_slow_one_is_slower(monkeypatch):
    """With the real clock, if only for a moment."""
    monkeypatch.setitem(model.EFFORT, ("cpu", False), Effort(2, 0.0, 4, 0.0))
    rotated = upstream_blocks._rotated

    def slow(*given):
        for _ in range(60):
            rotated(*given)
        return rotated(*given)

    monkeypatch.setattr(upstream_blocks, "_rotated", slow)
    ours, reference, _ = measured("group", time_in_turns)[:3]
    assert ours.ok and ours.vs["reference"] > 2 and reference.ms > 2 * ours.ms


def test_implementations_of_a_gpu(monkeypatch):
    """Compiled, each direction a graph of its own operations: in ours all are ours, in the other none is."""
    graphs = []
    compile_function = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_function(f, **options | {"backend": backend}))
    backend = traced(graphs)
    monkeypatch.setattr(model, "ON_CPU", model.ON_GPU)

    def other_runs(contestants, device, effort):
        return {one.name: Timing([[1.0]]) for one in contestants} | one_millisecond(contestants[1:], device, effort)

    tiny = replace(SMALL, num_attention_heads=1, cross_attention_dim=24)
    subject = Subject("group", tiny, Case(Bucket(1, 32, 48), text_tokens=4))
    rows = list(measure_subject(subject, Setting(CPU, LIMITS, print, other_runs)))
    assert all(row.ok and row.rel_err < 1e-4 for row in rows)
    ours, theirs = (
        [any(name in call for call in calls) for calls in graphs] for name in ("osp_fast", "scaled_dot_product")
    )
    # Two directions; the second set of inputs meets no new graph.
    assert ours == [True, False] * 2 and theirs == [False, True] * 2


def test_what_does_not_fit_in_float32_is_checked_shorter(monkeypatch):
    computed = []

    def exact(subject, *given):
        computed.append(str(subject.case))
        if subject.case.size.frames > 1:
            raise torch.OutOfMemoryError("no")
        return original(subject, *given)

    original = model._exact
    monkeypatch.setattr(model, "_exact", exact)
    rows = measured("single")
    assert computed == ["5x48x64", "1x48x64"] * 2 and all(row.ok and row.ms for row in rows)
    assert rows[0].note == "checked at 1x48x64, as float32 takes too much memory here"
    computed.clear()

    def never(case):
        computed.append(case.size.frames)
        raise torch.OutOfMemoryError("no")

    with pytest.raises(UserError, match="--size 93x48x64: in float32, .* not even an image of it fits"):
        exactly(Case(Bucket(93, 48, 64)), never, CPU)
    assert computed == [93, 45, 21, 9, 5, 1]


def test_jobs_without_a_gpu():
    found = {job.case: job for job in jobs(Options("cuda"))}
    assert len(found) == 23 and {job.parts for job in found.values()} == {DIRECTIONS}
    assert found["DiT 93x640x640"].cases[1] == "DiT 93x640x640 forward + backward"
    # Of a block most is compiling; of the largest DiT most is float32.
    assert 30 < found["block group 29x352x640"].seconds < found["block full 93x720x1280"].seconds < 200
    assert 120 < found["DiT 29x352x640"].seconds < found["DiT 93x640x640"].seconds < 400
    assert f"block full {IMAGES}" in found and str(IMAGES) == "16 x 1x640x640"
    assert jobs(Options("cpu"))[0].case == "DiT 17x64x64"
    size = Bucket(5, 32, 48)
    for device in ("cpu", "cuda"):
        chosen = jobs(Options(device, sizes=(size,)))
        assert [job.case for job in chosen] == ["DiT 5x32x48", *(f"block {kind} 5x32x48" for kind in KINDS)]
        for wrong in ("4x32x32", "5x30x32", "5x32x40"):
            with pytest.raises(UserError, match=f"--size {wrong} must be TxHxW with T = 4n\\+1"):
                jobs(Options(device, sizes=(Bucket.parse(wrong),)))


def test_flops_and_predictions():
    """performance.md's table: 338 TFLOP of a forward of 93x640x640; a block is a part of it."""
    case = Case(Bucket(93, 640, 640))
    dit, blocks = (
        Subject("DiT", RELEASED, case),
        [Subject(kind, RELEASED, case) for kind in ("full", "single", "group")],
    )
    assert dit.flops(DIRECTIONS[0]) == pytest.approx(338e12, rel=0.02)
    full, single, group = (one.flops(DIRECTIONS[0]) for one in blocks)
    assert 4 * full + 14 * (single + group) == pytest.approx(dit.flops(DIRECTIONS[0]), rel=0.01)
    seconds = dit.predicted(DIRECTIONS[0], dits.H100)
    assert 338e12 / 800e12 < seconds < 338e12 / 400e12 < dit.predicted(DIRECTIONS[1], dits.H100)
    assert 16 * sum(one.predicted(DIRECTIONS[0], dits.H100) for one in blocks[1:]) == pytest.approx(seconds, rel=0.3)
