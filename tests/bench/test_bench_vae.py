"""The suite `vae`: the tiny VAE on the CPU in the place of the released one on a GPU."""

import pytest
import torch

from bench.measure import Timing
from bench.results import Ceilings, complete_case
from bench.suites import Options, Setting
from bench.suites import vae as suite
from bench.suites.stock_vae import StockEncoder
from bench.suites.vae import Case, errors, implementations, jobs, make_vae, measure_case, time_and_peak
from osp_fast.data.buckets import Bucket
from osp_fast.errors import UserError
from osp_fast.models.wfvae import WFVAE

CPU = torch.device("cpu")
SMALL = Bucket(5, 32, 48)
IMPLEMENTATIONS = ["osp_fast", "reference", "strong"]


@pytest.fixture(autouse=True)
def _checks_are_quick(monkeypatch):
    monkeypatch.setattr(suite, "CHECKED", Bucket(5, 32, 32))


def setting(timer=None, lines=None) -> Setting:
    given = {} if timer is None else {"timer": timer}
    return Setting(CPU, Ceilings(1e12, 1e10), say=(lines if lines is not None else []).append, **given)


def one_millisecond(contestants, device, effort):
    """A timer that runs each once, and says that the first took a millisecond, the second two, and so on."""
    for one in contestants:
        one.calls[0]()
    return {one.name: Timing([[float(place)]]) for place, one in enumerate(contestants, 1)}


def measured(direction: str, timer=one_millisecond, budget: int | None = None) -> list:
    rows = measure_case(Case(direction, SMALL), "tiny", budget, setting(timer))
    complete_case(rows, Ceilings(1e12, 1e10))
    return rows


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_all_implementations_compute_the_same(direction):
    found = errors("tiny", direction, CPU, torch.float32)
    assert list(found) == IMPLEMENTATIONS
    assert max(found.values()) < 1e-5
    rounded = errors("tiny", direction, CPU, torch.bfloat16)
    tolerance = suite.TOLERANCE[torch.bfloat16]
    assert min(rounded.values()) > 1e-4 and max(rounded.values()) < tolerance


def test_jobs():
    on_cpu, on_gpu = (jobs(Options(device)) for device in ("cpu", "cuda"))
    assert [job.case for job in on_cpu] == list(suite.CASES["cpu"]) and all(job.suite == "vae" for job in on_cpu)
    assert {job.case for job in on_gpu} == {
        *(f"encode {size}" for size in ("93x352x640", "93x480x640", "93x640x640", "93x768x768", "29x352x640")),
        *(f"decode {size}" for size in ("93x352x640", "93x480x640", "93x640x640", "93x720x1280")),
        "encode 1x640x640",
    }
    seconds = {job.case: job.seconds for job in on_gpu}
    assert seconds["decode 93x720x1280"] > seconds["decode 93x352x640"] > suite.COMPILE_SECONDS
    chosen = jobs(Options("cuda", sizes=(SMALL,)))
    assert [job.case for job in chosen] == ["encode 5x32x48", "decode 5x32x48"]
    for size in ("4x32x32", "5x30x32"):
        with pytest.raises(UserError, match=f"--size {size}"):
            jobs(Options("cpu", sizes=(Bucket.parse(size),)))


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_a_row_for_each_implementation(direction):
    before = torch.backends.cudnn.benchmark
    rows = measured(direction)
    assert torch.backends.cudnn.benchmark == before
    assert [(row.impl, row.role) for row in rows] == list(
        zip(IMPLEMENTATIONS, ["ours", "reference", "strong"], strict=True)
    )
    ours = rows[0]
    assert [row.ok for row in rows] == [True] * 3 and [row.ms for row in rows] == [1, 2, 3]
    assert ours.vs == {"reference": 2, "strong": 3} and ours.case == f"{direction} {SMALL}"
    assert "latent frames at once" in ours.note and ours.shape == {"frames": 5, "height": 32, "width": 48}
    assert len({(row.flops, row.moved) for row in rows}) == 1 and ours.flops > 1e7 and ours.moved > 1e6


def test_flops_are_those_of_the_convolutions():
    """Of the released decoder: those that kernels/README.md has, and attention's."""
    work = suite._work("WFVAEModel_D8_4x8x8", Case("decode", Bucket(93, 640, 640)), torch.bfloat16)
    assert work.flops == pytest.approx(173e12, rel=0.01) and 50e9 < work.moved < 300e9


def test_what_is_wrong_is_not_timed(monkeypatch):
    decode = WFVAE.decode
    monkeypatch.setattr(WFVAE, "decode", lambda vae, *given: 1.01 * decode(vae, *given))
    ours, *stock = measured("decode")
    assert (
        not ours.ok and ours.ms is None and ours.vs == {} and ours.note.startswith("WRONG, not timed: off by 1.0e-02")
    )
    assert [row.ms for row in stock] == [1, 2]


def test_what_is_wrong_at_the_timed_size_alone_is_not_timed(monkeypatch):
    decode = WFVAE.decode
    assert suite.CHECKED != SMALL

    def off_there(vae, latents, *more):
        return decode(vae, latents, *more) * (1.01 if latents.shape[-2:] == (4, 6) else 1.0)

    monkeypatch.setattr(WFVAE, "decode", off_there)
    ours, *stock = measured("decode")
    assert ours.note.startswith("WRONG") and ours.ms is None and [row.ms for row in stock] == [1, 2]


def test_no_memory_is_a_result_and_a_breakage_a_failure(monkeypatch):
    def out_of_memory(contestants, device, effort):
        return {one.name: torch.OutOfMemoryError("CUDA out of memory") for one in contestants}

    rows = measured("encode", out_of_memory)
    assert all(row.note.endswith("out of memory") and row.ms is None for row in rows)
    ours, *stock = measured("encode", budget=1000)
    assert not ours.ok and ours.note.startswith("VAE encode") and "needs at least" in ours.note
    assert [row.ms for row in stock] == [1, 2]

    def broken(*given):
        raise RuntimeError("illegal access")

    monkeypatch.setattr(WFVAE, "encode", broken)
    ours, *stock = measured("encode")
    assert not ours.ok and ours.note.startswith("FAILED: illegal access") and [row.ms for row in stock] == [1, 2]


def test_what_nothing_checks_is_not_timed(monkeypatch):
    """The compiled network is held against an eager one at the size that is timed; ours has the small clip, too."""
    monkeypatch.setattr(suite, "errors", lambda *given: {"osp_fast": 1e-6, "reference": RuntimeError("no kernel")})
    ours, reference, strong = measured("encode")
    assert ours.ok and ours.ms == 1 and ours.note.endswith("as no stock network takes this one")
    assert reference.note == "no kernel" and strong.note.startswith("not measured: no stock network")
    assert not strong.ok and strong.rel_err is None and strong.ms is None


def test_the_compiled_implementation_is_one_graph():
    """What Dynamo makes of a stock network, without Inductor, whose minutes a test has not."""
    vae = make_vae("tiny", CPU, torch.float32)
    network, x = StockEncoder(vae, channels_last=True), Case("encode", SMALL).make_input(next(vae.parameters()))
    compiled = torch.compile(network.__call__, fullgraph=True, dynamic=False, backend="eager")
    torch.testing.assert_close(compiled(x), network(x))
    torch.compiler.reset()


def test_whole_clips_for_other_suites():
    vae = make_vae("tiny", CPU, torch.float32)
    case = Case("decode", SMALL)
    lines = []
    name, make = next(implementations(vae, case, 1 << 40, lines.append))
    with torch.no_grad():
        seconds, peak = time_and_peak(make(), case.make_input(next(vae.parameters())), CPU)
    assert name == "osp_fast" and seconds > 0 and peak is None and len(lines) == 1


def test_weights_are_the_same_in_every_type():
    one, other = (make_vae("tiny", CPU, dtype) for dtype in (torch.float32, torch.bfloat16))
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a.bfloat16(), b)
