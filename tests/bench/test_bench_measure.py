"""Times in turns, ceilings, memory that is poisoned, and what a result says of where it was made."""

import functools
import math
from types import SimpleNamespace

import pytest
import torch

from bench import measure
from bench.measure import Contestant, Effort, Timing, environment, input_set_count, poisoned, time_in_turns
from bench.results import ENV_KEYS, SAME, Ceilings, Row, best_of, complete_case

CPU = torch.device("cpu")
BRIEF = Effort(rounds=4, seconds=0, fewest=8, warm_seconds=0)


def test_implementations_take_turns_in_both_orders_and_inputs_rotate():
    said = []

    def one(name):
        return Contestant(name, [functools.partial(said.append, f"{name}{place}") for place in (1, 2)])

    found = time_in_turns([one("a"), one("b")], CPU, BRIEF)
    assert [len(turn) for turn in found["a"].turns] == [2] * 4
    turns = said[-16:]
    assert "".join(turn[0] for turn in turns) == "aabbbbaaaabbbbaa"
    assert sorted(turns[:2]) == ["a1", "a2"] and sorted(turns[2:4]) == ["b1", "b2"]


def test_the_median_and_its_percentiles():
    timing = Timing([[3.0, 1.0], [2.0, 4.0, 100.0]], 5.0, [{"sm_clock_mhz": 10, "power_w": 1.0}, {"sm_clock_mhz": 20}])
    fields = timing.fields()
    assert fields["ms"] == 3.0 and fields["ms_p20"] == pytest.approx(1.8) and fields["ms_p80"] == pytest.approx(23.2)
    assert fields["peak_mib"] == 5.0 and fields["sm_mhz"] == 15 and fields["watts"] == 1.0
    assert Timing([[1.0]]).fields()["watts"] is None
    assert fields.keys() <= {name for name in Row.__dataclass_fields__}


def test_what_breaks_ends_its_own_turns_alone():
    left = iter(range(7))

    def breaks():
        if next(left, None) is None:
            raise torch.OutOfMemoryError("full")

    found = time_in_turns([Contestant("breaks", [breaks]), Contestant("works", [lambda: None])], CPU, BRIEF)
    assert isinstance(found["breaks"], torch.OutOfMemoryError)
    assert sum(map(len, found["works"].turns)) == 8


def test_each_turn_is_inside_of_its_own_setting():
    inside = []

    class Around:
        def __enter__(self):
            inside.append(1)

        def __exit__(self, *error):
            inside.pop()

    def call():
        assert inside == [1]

    found = time_in_turns([Contestant("a", [call], Around)], CPU, BRIEF)
    assert isinstance(found["a"], Timing) and inside == []


def test_long_calls_run_few_times():
    calls = []
    found = time_in_turns([Contestant("a", [lambda: calls.append(1)])], CPU, Effort(2, 0.0, 2, 0.0))
    assert len(calls) == 1 + 2 + 2 and len(found["a"].turns) == 2  # first, to know how long it takes, and turns


def test_short_calls_do_not_run_forever():
    calls = []
    found = time_in_turns([Contestant("a", [lambda: calls.append(1)])], CPU, Effort(2, 1e6, 2, 1e6, most=10))
    assert len(calls) == 1 + 2 + 10 + 10 and sum(map(len, found["a"].turns)) == 10


def test_ceilings_count_both_ways_of_a_copy(monkeypatch):
    monkeypatch.setattr(measure, "COPY_BYTES", {"cpu": 1 << 10})
    monkeypatch.setattr(measure, "MATMUL_SIZE", {"cpu": 8})
    limits = measure.ceilings(CPU, lambda contestants, device: {one.name: Timing([[1.0]]) for one in contestants})
    assert limits.copy_bytes == pytest.approx(2 * 2**10 / 1e-3) and limits.matmul_flops == pytest.approx(
        2 * 8**3 / 1e-3
    )
    with pytest.raises(MemoryError):
        measure.ceilings(CPU, lambda contestants, device: {one.name: MemoryError() for one in contestants})


def test_input_sets_exceed_the_cache_twice(monkeypatch):
    properties = SimpleNamespace(L2_cache_size=50 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    for size, count in ((40 << 20, 3), (1 << 30, 2), (1 << 10, 16)):
        assert input_set_count({"x": torch.empty(size, dtype=torch.int8, device="meta")}, torch.device("cuda")) == count


def test_poisoned_memory_is_no_number_and_back_to_normal_afterwards():
    makers = (torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty)
    with poisoned():
        x = torch.empty(3, 4)
        assert x.isnan().all() and torch.empty_like(x).isnan().all() and x.new_empty(2).isnan().all()
        assert torch.empty_strided((2, 2), (2, 1)).isnan().all()
        assert (torch.empty(3, dtype=torch.uint8) == 255).all() and torch.empty(2, dtype=torch.bool).shape == (2,)
    assert makers == (torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty)
    with pytest.raises(KeyError), poisoned():
        raise KeyError
    assert torch.empty is makers[0]


def test_an_environment_says_what_figures_depend_on():
    env = environment(CPU, Ceilings(2e12, 1e11))
    assert set(ENV_KEYS) <= env.keys() and set(SAME) <= env.keys()
    assert env["device"] == "cpu" and env["matmul_tflops"] == 2 and env["copy_tbps"] == 0.1 and env["threads"] >= 1
    assert env["torch"] == torch.__version__ and env["driver"] is None and env["cpu"]


def rows(**milliseconds):
    return [
        Row("s", "c", name, {"osp_fast": "ours"}.get(name, "peer"), "float32", ok=value is not None, ms=value)
        for name, value in milliseconds.items()
    ]


def test_ratios_are_of_what_is_right_and_has_a_time():
    found = rows(osp_fast=2.0, faster=1.0, slower=6.0, untimed=None)
    found[2].flops, found[2].moved = 6e9, 12e6
    wrong = Row("s", "c", "wrong", "peer", "float32", ok=False, ms=0.1)
    complete_case([*found, wrong], Ceilings(2e12, 1e12))
    assert found[0].vs == {"faster": 0.5, "slower": 3.0} and found[1].vs == {}
    assert found[2].tflops == 1.0 and found[2].tbps == 0.002 and found[2].of_peak == 0.5
    assert wrong.tflops is None and best_of([*found, wrong]) is found[1]
    found[0].ok = False
    complete_case(found, Ceilings(2e12, 1e12))
    assert found[0].vs == {}
    assert math.isclose(Ceilings(2e12, 1e12).seconds(6e9, 12e6), 3e-3)
