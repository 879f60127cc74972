"""Kernels and bytes of a DiT block: what is counted for an operation, and what the block's table says."""

import importlib.util
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from osp_fast.kernels.launch import forced_path

from bench import block, inductor
from bench.__main__ import main
from bench.counting import ATTENTION, LAUNCHES, MEMORY, PRODUCTS, Key, Traffic, launches
from osp_fast.errors import UserError
from osp_fast.models.dit import DIT_CONFIGS, DiT, DiTConfig

TINY = DIT_CONFIGS["tiny"]


def counted(function, *arguments):
    with Traffic() as traffic:
        function(*arguments)
    return traffic


@pytest.mark.parametrize(
    "function, kernels, moved",
    [
        (lambda x, y: x + y, 1, 3 * 96),
        (lambda x, y: x * x, 1, 2 * 96),  # one tensor, read once
        (lambda x, y: x.add_(y), 1, 3 * 96),
        (lambda x, y: x.copy_(y), 1, 2 * 96),
        (lambda x, y: x.zero_(), 1, 96),
        (lambda x, y: x[:, :3] + y[:, 3:], 1, 3 * 48),
        (lambda x, y: x + y[:1].expand(4, 6), 1, 2 * 96 + 24),
        (lambda x, y: x + 1 - 1, 2, 4 * 96),
        (lambda x, y: x.bfloat16(), 1, 96 + 48),
        (lambda x, y: torch.stack((x, y)), 1, 4 * 96),
        (lambda x, y: torch.zeros(4, 6), 1, 96),
    ],
)
def test_an_operation_moves_what_it_reads_and_writes(function, kernels, moved):
    traffic = counted(function, torch.ones(4, 6), torch.ones(4, 6))
    assert (sum(traffic.kernels.values()), sum(traffic.bytes.values())) == (kernels, moved)
    assert {key.kind for key in traffic.kernels} == {MEMORY}


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.view(6, 4).t()[1:].unsqueeze(0),
        lambda x: x.unbind(0),
        lambda x: x.detach(),
        lambda x: torch.empty_like(x).new_empty(3),
        lambda x: x.expand(2, 4, 6).shape,
    ],
)
def test_views_and_reservations_are_no_kernels(function):
    assert not counted(function, torch.ones(4, 6)).kernels


def test_products_are_apart():
    traffic = counted(torch.nn.functional.linear, torch.ones(2, 3), torch.ones(5, 3), torch.ones(5))
    assert dict(traffic.bytes) == {Key(PRODUCTS, "addmm"): 4 * (6 + 15 + 5 + 10)}


def test_an_unknown_operation_of_ours_is_no_guess():
    with pytest.raises(KeyError, match="novelty"):
        launches("osp_fast", "novelty")
    assert launches("aten", "novelty") == 1


def load_traffic():
    path = Path(__file__).parents[1] / "kernels/traffic.py"
    spec = importlib.util.spec_from_file_location("traffic", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.count_traffic


def test_our_operations_launch_what_the_table_says():
    """A small DiT in the interpreter, where attention runs other kernels than on a GPU and is left out."""
    config = DiTConfig(
        num_layers=3, num_attention_heads=1, attention_head_dim=24, caption_channels=8, cross_attention_dim=24
    )
    model = DiT.create(config, seed=0)
    latents, text = torch.randn(1, 8, 2, 4, 4), torch.randn(1, 3, 8)
    for backward in (False, True):
        with forced_path("triton"), Traffic() as traffic, load_traffic()() as moved:
            out = model(latents, torch.tensor([1]), text)
            if backward:
                torch.autograd.grad(out, list(model.parameters()), torch.randn_like(out))
        expected = Counter()
        for key, kernels in traffic.kernels.items():
            if key.op in LAUNCHES and key.kind != ATTENTION:
                expected[key.op.split("_")[0]] += kernels
        found = Counter(launch.kernel.split("_")[0] for launch in moved.launches)
        del found["skiparse"]
        assert found == expected and set(expected) == {"adaln", "rope3d"}


@pytest.fixture(scope="module")
def rows():
    latent_size = block.parse_clip("29x320x320", TINY)
    found = [row for name, path in block.PATHS.items() for row in block.block_rows(TINY, latent_size, name, path)]
    return found


def total(rows, figure, **wanted):
    return sum(row[figure] for row in rows if all(row[key] == value for key, value in wanted.items()))


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_our_block_launches_and_moves_less(rows, direction):
    for figure, factor in (("kernels", 3), ("bytes", 3)):
        eager, ours = (
            total(rows, figure, implementation=name, direction=direction, kind=MEMORY) for name in block.PATHS
        )
        assert 0 < factor * ours < eager
    for kind in (PRODUCTS, ATTENTION):  # the same on both paths
        for figure in ("kernels", "bytes"):
            eager, ours = (
                total(rows, figure, implementation=name, direction=direction, kind=kind) for name in block.PATHS
            )
            assert eager > 0 and abs(ours - eager) <= 0.02 * eager


def test_products_and_attention_of_a_block_are_those_of_its_mathematics(rows):
    """One self-attention and one cross-attention; 7 products forward, each with two gradients."""
    ours = dict(implementation=block.OURS)
    tokens, width = 8 * 20 * 20, TINY.width
    assert total(rows, "kernels", direction="forward", kind=PRODUCTS, **ours) == 7
    assert total(rows, "kernels", direction="backward", kind=PRODUCTS, **ours) == 14
    assert total(rows, "kernels", direction="forward", kind=ATTENTION, **ours) == 2
    heads, text = TINY.num_attention_heads, block.TEXT_TOKENS
    each = 2 * width * (4 * tokens + 2 * tokens + 2 * text) + 2 * 4 * heads * tokens
    found = total(rows, "bytes", direction="forward", kind=ATTENTION, **ours)
    assert each <= found <= 1.001 * each + 4 * text  # beside the mask


def test_bytes_grow_with_the_clip(rows):
    longer = block.block_rows(TINY, block.parse_clip("61x320x320", TINY), block.OURS, "triton")
    before, after = (total(found, "bytes", implementation=block.OURS, kind=MEMORY) for found in (rows, longer))
    assert after / before == pytest.approx(2, rel=0.02)


def test_the_command_prints_tables_and_writes_rows(tmp_path, capsys, monkeypatch):
    schedules = {"forward": inductor.Schedule(11, 36.0), "backward": inductor.Schedule(20, 61.0)}
    monkeypatch.setattr(block, "block_schedules", lambda config, layers: schedules)
    monkeypatch.setattr(block, "has_compiler", lambda: True)
    file = tmp_path / "block.json"
    assert main(["block", "--size", "tiny", "--clip", "1x64x64", "--json", str(file)]) == 0
    text = capsys.readouterr().out
    assert "one block of tiny at 1x64x64: 16 tokens of 144 channels, bfloat16" in text
    for words in ("eager references", "osp_fast", "adaln_backward", "forward kernels", "at 3.0 TB/s"):
        assert words in text
    result = json.loads(file.read_text())
    assert result["kind"] == "block" and result["tokens"] == 16
    (row,) = [
        row for row in result["rows"] if row["implementation"] == block.COMPILED and row["direction"] == "forward"
    ]
    assert row["kernels"] == 11 and row["bytes"] == 36 * 2 * 16 * 144
    monkeypatch.setattr(block, "has_compiler", lambda: False)
    assert main(["block", "--size", "tiny", "--clip", "1x64x64"]) == 0
    assert "needs a C++ compiler and there is none" in capsys.readouterr().out
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--size", "huge"], "--size 'huge' is not a known model: choose from OpenSoraT2V_v1_3-2B/122, tiny"),
        (["--clip", "92x640x640"], "--clip '92x640x640' must be FRAMESxHEIGHTxWIDTH, 4n\\+1 frames"),
        (["--clip", "93x640x648"], "sides multiples of 16"),
        (["--clip", "long"], "--clip 'long' must be"),
        (["--size", "tiny", "--clip", "1x64x64", "--no-inductor", "--json", "/dev/null/x.json"], "cannot be written"),
    ],
)
def test_bad_usage_is_one_sentence(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        main(["block", *arguments])


def test_inductor_says_what_it_has_fused():
    """Where there is a C++ compiler: what lies on either side of an operation of its own is one kernel each."""
    if inductor.has_compiler():
        q, k, v = (torch.randn(1, 8, 2, 16, requires_grad=True) for _ in range(3))

        def function(q, k, v):
            return inductor.attention(q * 2 + 1, k, v).sin() * v

        unit = q.numel() * q.element_size()
        forward, backward = inductor.graph_schedules(function, (q, k, v), (q, k, v), unit)
        assert forward == inductor.Schedule(2, 5.0)  # q twice; attention's result, v and the product
        # What goes into attention's backward, 4; what comes out of it for q, 2, and for v, 4; k's gradient is ready.
        assert backward == inductor.Schedule(3, 10.0)
