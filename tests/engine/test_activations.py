"""What blocks keep for backward: the same gradients at every level, and as many bytes as were predicted."""

import pickle
from dataclasses import replace

import pytest
import torch
from osp_fast.kernels.launch import forced_path
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import CheckpointPolicy
from torch.utils.flop_counter import FlopCounterMode

from osp_fast.engine.activation_trace import measure
from osp_fast.engine.activations import ActivationPlan, PlanCost, most_demanding, plan_activations
from osp_fast.engine.cost import Workload
from osp_fast.engine.levels import Level, keep_attention, keep_products
from osp_fast.errors import UserError
from osp_fast.models.dit import DIT_CONFIGS, DiT, DiTConfig
from osp_fast.models.lora import add_lora
from osp_fast.models.wfvae_trace import LiveBytes
from osp_fast.seeding import torch_generator

GIB = 2**30
BIG = DIT_CONFIGS["OpenSoraT2V_v1_3-2B/122"]
SMALL = replace(DIT_CONFIGS["tiny"], num_layers=3, caption_channels=16)  # full, full, single
LATENT, TEXT = (3, 16, 18), 8
MIXED = [Level.NOTHING, Level.PRODUCTS, Level.NARROW]
CLIP = Workload(1, (24, 80, 80), 512)  # 93x640x640


def make_dit(config: DiTConfig = SMALL, attention: str = "reference") -> DiT:
    dit = DiT.create(config, 0)
    for name, parameter in dit.named_parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch_generator("weights", name))
    return dit.use_attention(attention)


def make_inputs(config: DiTConfig, latent: tuple[int, ...] = LATENT, text: int = TEXT, clips: int = 1) -> list[Tensor]:
    shapes = (clips, config.in_channels, *latent), (clips, text, config.caption_channels)
    latents, states = (torch.randn(shape, generator=torch_generator("input", *shape)) for shape in shapes)
    mask = torch.ones(clips, text)
    mask[:, -2:] = 0
    return [latents, torch.arange(clips) * 300 + 7, states, mask]


def small_workload(bf16: bool, attention: str = "reference") -> Workload:
    dtype = torch.bfloat16 if bf16 else torch.float32
    return Workload(1, LATENT, TEXT, dtype, torch.float32, attention, "reference", compiled=False)


def run(dit: DiT, inputs: list[Tensor], bf16: bool) -> tuple[list[Tensor], int, int]:
    """Gradients; bytes alive between forward and backward; the most at any time."""
    trained = [parameter for parameter in dit.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    with LiveBytes() as trace:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            prediction = dit(*inputs)
        loss = (prediction.float() - inputs[0]).square().mean()
        live = trace.live
        loss.backward()
    return [parameter.grad for parameter in trained], live, trace.peak


def test_levels_change_no_bit_and_keep_what_is_predicted():
    dit, inputs = make_dit(), make_inputs(SMALL)
    cost = PlanCost(SMALL, small_workload(bf16=False))
    expected, *_ = run(dit, inputs, bf16=False)
    kept, peaks = [], []
    for level in Level:
        plan = cost.plan([level] * 3, None)
        gradients, live, peak = run(plan.apply(dit), inputs, bf16=False)
        assert all(map(torch.equal, gradients, expected)), level
        assert plan.kept == pytest.approx(live, rel=0.02), level
        assert plan.peak == pytest.approx(peak, rel=0.05), level
        kept.append(live)
        peaks.append(peak)
    assert kept == sorted(kept) and kept[0] < 0.1 * kept[-1]
    assert peaks == sorted(peaks) and peaks[0] < 0.6 * peaks[-1]


def test_mixed_levels_of_autocast_and_fused_attention():
    dit, inputs = make_dit(attention="sdpa"), make_inputs(SMALL)
    plan = PlanCost(SMALL, small_workload(True, "sdpa")).plan(MIXED, None)
    expected, *_ = run(dit, inputs, bf16=True)
    gradients, live, peak = run(plan.apply(dit), inputs, bf16=True)
    assert all(map(torch.equal, gradients, expected))
    assert plan.kept == pytest.approx(live, rel=0.02) and plan.peak == pytest.approx(peak, rel=0.05)


def count_flops(config: DiTConfig, level: Level) -> int:
    """Of backward on the Triton path, by PyTorch's counter, on fake tensors."""
    with FakeTensorMode(), forced_path("triton"):
        dit = DiT(config).recompute_blocks(level.recompute())
        latents, text = torch.empty(2, 8, *LATENT), torch.empty(2, TEXT, config.caption_channels)
        prediction = dit(latents, torch.empty(2, dtype=torch.long), text)
        with FlopCounterMode(display=False) as backward:
            prediction.sum().backward()
    return backward.get_total_flops()


def test_what_is_recomputed_is_counted_exactly():
    cost = PlanCost(SMALL, Workload(2, LATENT, TEXT, torch.float32))
    once = count_flops(SMALL, Level.EVERYTHING)
    for level in (Level.NOTHING, Level.ATTENTION, Level.NARROW, Level.PRODUCTS):
        predicted = sum(cost.recompute(mode, level)[0] for mode in cost.modes)
        assert count_flops(SMALL, level) - once == predicted
        assert (predicted == 0) == (level == Level.PRODUCTS)


def test_compiled_blocks_have_the_same_gradients():
    """The backend is Inductor's without its code: its partition into forward and backward."""
    levels = [Level.EVERYTHING, Level.NOTHING, Level.PRODUCTS]
    dit, inputs = make_dit(), make_inputs(SMALL, (1, 4, 4))
    expected, *_ = run(dit, inputs, bf16=False)
    for block, level in zip(dit.transformer_blocks, levels, strict=True):
        if level != Level.EVERYTHING:
            block.recompute = level.recompute()
            block.forward = torch.compile(block.forward, fullgraph=True, backend="aot_eager_decomp_partition")
    for parameter in dit.parameters():
        parameter.grad = None
    (dit(*inputs) - inputs[0]).square().mean().backward()
    for parameter, gradient in zip(dit.parameters(), expected, strict=True):
        assert (parameter.grad - gradient).norm() <= 1e-5 * gradient.norm()


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_products_that_are_rotated_in_place(monkeypatch, lora_rank):
    """The Triton path overwrites q and k in the product that `Level.PRODUCTS` keeps; with adapters, in a sum."""
    monkeypatch.setenv("OSP_FAST_KERNELS", "triton")
    config = DiTConfig(
        num_layers=1, num_attention_heads=1, attention_head_dim=24, caption_channels=8, cross_attention_dim=24
    )
    dit, inputs = make_dit(config, "triton"), make_inputs(config, (1, 2, 6), text=3)
    if lora_rank is not None:
        add_lora(dit, lora_rank, 1.0, 0)
        for name, parameter in dit.named_parameters():
            if ".lora_B." in name:
                parameter.data += torch.randn(parameter.shape, generator=torch_generator(name))
    expected, *_ = run(dit, inputs, bf16=False)
    assert all(gradient.any() for gradient in expected)
    plan = PlanCost(config, CLIP).plan([Level.PRODUCTS], None)
    gradients, *_ = run(plan.apply(dit), inputs, bf16=False)
    assert all(map(torch.equal, gradients, expected))


def test_a_budget_goes_first_to_what_saves_most():
    plans = [plan_activations(BIG, CLIP, gib * GIB) for gib in (10, 12, 16, 20, 40, 130)]
    assert all(plan.peak <= plan.budget for plan in plans)
    seconds = [plan.recompute_seconds for plan in plans]
    assert seconds == sorted(seconds, reverse=True) and seconds[-1] == 0
    # Attention of the full blocks takes four times as long as that of the others.
    assert plans[1].levels[:2] == plans[1].levels[30:31] * 2 == [Level.ATTENTION] * 2
    assert {Level.NOTHING, Level.ATTENTION} == set(plans[1].levels[2:30])
    assert set(plans[3].levels[:31]) == {Level.ATTENTION, Level.NARROW}
    assert plans[5].levels == [Level.EVERYTHING] * 32
    assert plan_activations(BIG, CLIP, None).levels == plans[5].levels
    text = str(plans[2])
    assert text.startswith("activations: 15.9") and " of 16.00 GiB, " in text and "keep attention" in text
    assert "1 block keeps attention and products, " in text and "TFLOP of each micro-batch are recomputed" in text
    with pytest.raises(UserError, match=r"--activation_memory 4.00 GiB .* 9.70 GiB are needed"):
        plan_activations(BIG, CLIP, 4 * GIB)


def test_a_plan_can_be_sent_to_another_process():
    plan: ActivationPlan = PlanCost(SMALL, small_workload(False)).plan(MIXED, 5)
    assert pickle.loads(pickle.dumps(plan)) == plan
    for level in Level:
        for recompute in (level.recompute(), level.recompute(adapters=True)):
            copy = pickle.loads(pickle.dumps(recompute))
            assert (copy is None) == (level == Level.EVERYTHING) and (copy is None or copy.args == recompute.args)


class FlashOperation:
    """As the flash-attn package's operations look to a policy."""

    namespace = "flash_attn"

    def name(self) -> str:
        return "flash_attn::_flash_attn_forward"


def test_attention_to_text_is_kept_with_the_products():
    video, text = torch.empty(1, 3, 40, 8), torch.empty(1, 3, 6, 8)
    cuda = torch.ops.aten._scaled_dot_product_cudnn_attention.default
    for op, q, k in ((cuda, video, text), (FlashOperation(), video.transpose(1, 2), text.transpose(1, 2))):
        assert keep_attention(None, op, q, q, q) == CheckpointPolicy.MUST_SAVE
        assert keep_attention(None, op, q, k, k) == CheckpointPolicy.PREFER_RECOMPUTE
        assert keep_products(None, op, q, k, k) == CheckpointPolicy.MUST_SAVE


def test_the_most_demanding_micro_batch():
    image, clip = Workload(16, (1, 80, 80), 512), Workload(1, (24, 60, 80), 512)
    assert most_demanding(BIG, [clip, image]) == image
    assert most_demanding(BIG, [replace(image, clips=10), clip]) == clip


def test_adapters_keep_little_more():
    workloads = CLIP, replace(CLIP, lora_rank=16)
    plain, adapted = (measure(BIG, workload, Level.PRODUCTS).blocks["full"].kept for workload in workloads)
    assert plain < adapted < 1.05 * plain
