"""Bytes as the exchange really sends them, and predictions that follow from bytes, FLOPs and rates."""

from dataclasses import replace

import pytest
import torch
from osp_fast.kernels.launch import forced_path
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from osp_fast.engine.cost import Sharding, Workload, block_flops, step_flops, tokens_of
from osp_fast.engine.devices import A100_80, H100
from osp_fast.engine.exchange_cost import (
    LATENCY_S,
    SharedWork,
    choose_plan,
    collective_seconds,
    describe_choice,
    predict_plans,
    predict_step,
)
from osp_fast.engine.levels import Level
from osp_fast.engine.sampling_cost import Streaming, step_seconds
from osp_fast.models.dit import DIT_CONFIGS, DiT, DiTConfig
from osp_fast.parallel.exchange_bytes import ClipExchange
from osp_fast.parallel.links import Link
from osp_fast.parallel.sequence import SequenceExchange
from osp_fast.parallel.sequence_plan import SequencePlan, sequence_plans

BIG = DIT_CONFIGS["OpenSoraT2V_v1_3-2B/122"]
FIVE_HEADS = DiTConfig(  # two blocks of full attention, one that skips singly, one by groups
    num_layers=4, num_attention_heads=5, attention_head_dim=12, caption_channels=16, cross_attention_dim=60
)
TOKENS = (21_120, 28_800, 38_400, 86_400)
CLIP = Workload(1, (24, 80, 80), 512, weight_dtype=torch.bfloat16)  # 93x640x640
WEIGHTS = 2_772_000_000


def shared(plan: SequencePlan, workload: Workload = CLIP, **changed) -> SharedWork:
    return SharedWork(BIG, replace(workload, sequence=plan, **changed))


class Counted(TorchDispatchMode):
    """Adds up the bytes that leave a rank; places: which one it is in each group."""

    def __init__(self, places: dict[str, int]):
        super().__init__()
        self.places, self.bytes = places, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops._c10d_functional.all_to_all_single.default:
            x, _, sent, group = args
            self.bytes += (sum(sent) - sent[self.places[group]]) * x.element_size()
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "ranks, scope, rank",
    [(3, 1, 2), (4, 4, 3), (8, 1, 3), (8, 2, 5)],
)
def test_bytes_are_those_that_are_sent(ranks, scope, rank):
    """Of 300 tokens and 5 heads, forward, backward, and what recomputing all blocks adds."""
    plan, size = SequencePlan(ranks, scope), (5, 12, 20)
    places = {"everyone": rank, "scope": rank % plan.heads, "others": rank // plan.heads}
    found = []
    with FakeTensorMode(), forced_path("reference"):
        dit = DiT(FIVE_HEADS)
        dit.share_tokens(SequenceExchange(plan, rank, 4, *(Link(*place) for place in places.items())))
        latents, text = torch.empty(2, 8, *size), torch.empty(2, 7, 16)
        for recompute in (None, Level.NOTHING.recompute(False)):
            dit.recompute_blocks(recompute)
            with Counted(places) as forward:
                prediction = dit(latents, torch.empty(2, dtype=torch.long), text)
            with Counted(places) as backward:
                prediction.sum().backward()
            found += [forward.bytes, backward.bytes]
    sent = ClipExchange(FIVE_HEADS, plan, tokens_of(FIVE_HEADS, size), 2, torch.float32.itemsize).total(rank)
    assert found == [sent.forward, sent.backward, sent.forward, sent.backward + sent.recomputed]
    assert sent.forward > 0


def skipping_blocks(exchange: ClipExchange) -> float:
    """Bytes of the blocks that skip, with the tokens that move between them, over upstream's."""
    sent = [attention.forward + moved for attention, moved in exchange.blocks(0)]
    skips = [index for index in range(BIG.num_layers) if BIG.attention_mode(index) != "full"]
    return sum(sent[index] for index in skips) / len(skips) / exchange.upstream()


@pytest.mark.parametrize("tokens", TOKENS)
def test_scopes_send_a_quarter(tokens):
    assert skipping_blocks(ClipExchange(BIG, SequencePlan(4, 4), tokens)) <= 0.3
    assert skipping_blocks(ClipExchange(BIG, SequencePlan(2, 2), tokens)) <= 0.3
    # Four groups of two exchange half of the heads besides.
    assert 0.5 < skipping_blocks(ClipExchange(BIG, SequencePlan(8, 4), tokens)) < 0.85


def test_equal_shares_send_what_the_short_formulas_say():
    ulysses, tokens = ClipExchange(BIG, SequencePlan(8), 38_400), 38_400 // 8
    for mode in ("full", "single", "group"):
        sent = ulysses.attention(mode, 5)
        assert sent.forward == sent.backward == ulysses.upstream() == 4 * tokens * 2304 * 2 * 7 // 8
    assert sum(ulysses.moves()) == 0
    scopes = ClipExchange(BIG, SequencePlan(8, 4), 38_400)
    assert sum(scopes.moves()) == 27 and scopes.moves()[2] and not scopes.moves()[1]
    assert scopes.move(tokens) == tokens * 2304 * 2 * 3 // 4
    assert scopes.attention("group", 7).forward == 4 * tokens * 2304 * 2 // 2
    assert scopes.gather(0) == tokens * 32 * 2 * 7
    assert ClipExchange(BIG, SequencePlan(4, 4), 38_400).attention("single", 0).forward == 0


def test_a_call_on_one_gpu():
    """Products + attention + passes, without the text's own products."""
    workload = replace(CLIP, clips=2)
    call = SharedWork(BIG, workload, prepared=True).forward()
    blocks = [block_flops(BIG, BIG.attention_mode(index), workload) for index in range(32)]
    assert call.products == pytest.approx(step_flops(BIG, replace(workload, text_tokens=0)).products / 798e12, rel=1e-6)
    assert call.attention == pytest.approx(sum(block.attention for block in blocks) / 600e12)
    assert call.memory_bound == pytest.approx(32 * 23 * 2 * 38_400 * 2304 * 2 / 3e12)
    assert call.total == pytest.approx(step_seconds(BIG, workload, 1, Streaming(), H100))
    assert call.exposed == call.exchange == 0


def test_links():
    assert collective_seconds(37e9, range(8)) == pytest.approx(LATENCY_S + 0.1)
    # Of 16 GPUs on two machines each sends eight fifteenths to the other machine, through its own port.
    assert collective_seconds(45e9, range(16)) == pytest.approx(LATENCY_S + 8 / 15)
    assert collective_seconds(45e9, range(0, 64, 8)) == pytest.approx(LATENCY_S + 1.0)
    assert collective_seconds(37e9, range(0, 8, 4)) == pytest.approx(LATENCY_S + 0.1)
    assert collective_seconds(0, range(2)) == LATENCY_S


def test_two_rounds_of_heads_hide_half_and_units_hide_nothing():
    def full_block(ranks: int, **changed) -> tuple[float, float]:
        block = next(iter(shared(SequencePlan(ranks), replace(CLIP, latent_size=(24, 90, 160)), **changed).blocks()))
        return block.exposed, block.exchange

    exposed, exchange = full_block(2)
    assert exposed == pytest.approx(exchange / 2)
    exposed, exchange = full_block(24)  # a head on each rank
    assert exposed == pytest.approx(exchange)
    skips = list(shared(SequencePlan(5)).blocks())[2]  # 24 heads of 4 sets on 5 ranks
    assert skips.exposed == pytest.approx(skips.exchange) and skips.exchange > 0


def test_tokens_move_behind_the_feed_forward():
    blocks = list(shared(SequencePlan(4, 4)).blocks())
    moves, still = blocks[3], blocks[29]
    assert still.exposed == still.exchange == 0
    assert moves.memory_bound > still.memory_bound and moves.products == still.products
    assert 0 < moves.exposed < 0.4 * moves.exchange
    # Over slow links the first part outlasts the rest of the feed-forward.
    slow = SharedWork(
        BIG, replace(CLIP, sequence=SequencePlan(4, 4)), replace(H100, nvlink_bytes=H100.nvlink_bytes / 20)
    )
    assert list(slow.blocks())[3].exposed > 0.8 * list(slow.blocks())[3].exchange


def test_what_does_not_shrink_with_more_gpus():
    """Texts, and the rank with the most heads: 64 ranks have 24 of them."""
    alone, many = (shared(SequencePlan(ranks)).training() for ranks in (1, 64))
    assert many.products > 1.1 * alone.products / 64
    assert many.attention > 1.5 * alone.attention / 64
    prepared = [replace(shared(SequencePlan(ranks)), prepared=True).forward() for ranks in (1, 8)]
    assert prepared[1].products == pytest.approx(prepared[0].products / 8)


def test_recomputing_exchanges_once_more():
    usual, again = (shared(SequencePlan(4)).training(recompute_all=each) for each in (False, True))
    assert again.exchange / usual.exchange == pytest.approx(1.5, rel=0.01)
    assert again.exposed > 1.3 * usual.exposed and again.computing > 1.25 * usual.computing
    every = shared(SequencePlan(4)).exposed_again(range(32))
    assert again.exposed - usual.exposed == pytest.approx(every)
    sharding = Sharding(4, 4, WEIGHTS, WEIGHTS, WEIGHTS // 4, optimizer_bytes=40)
    workload = replace(CLIP, sequence=SequencePlan(4))
    steps = [predict_step(BIG, workload, sharding, 0.1, H100, blocks) for blocks in ((), (0, 1, 2))]
    exposed = steps[1].communication - steps[0].communication
    assert exposed == pytest.approx(every * 3 / 32, rel=0.2) and steps[1].recompute == 0.1
    moved = [shared(SequencePlan(4, 4)).training(recompute_all=each).exchange for each in (False, True)]
    assert moved[1] / moved[0] == pytest.approx(1.5, rel=0.01)


def test_the_plan_that_is_chosen_is_the_fastest():
    for ranks in (1, 3, 4, 8, 32):
        predicted = predict_plans(BIG, ranks, 38_400, device=H100)
        assert list(predicted) == sequence_plans(ranks, 4)
        assert choose_plan(BIG, ranks, 38_400, device=H100) == min(predicted, key=lambda plan: predicted[plan].total)
    assert choose_plan(BIG, 4, 38_400, device=H100) == SequencePlan(4, 4)
    # Where links are slow, what sends less wins.
    slow = replace(H100, nvlink_bytes=H100.nvlink_bytes / 10)
    assert choose_plan(BIG, 8, 38_400, device=slow) == SequencePlan(8, 4)
    assert choose_plan(replace(BIG, sparse1d=False), 4, 38_400, device=H100) == SequencePlan(4)


def test_the_choice_is_told():
    chosen, candidates = describe_choice(BIG, SequencePlan(4, 4), 38_400, training=True, device=H100)
    assert chosen == "4 GPUs hold skip sets (the fastest by prediction)"
    assert candidates.startswith("groups x GPUs, forward and backward at the rates of H100 SXM: 1x4 0.4")
    assert candidates.count("from each GPU") == 3 and "8,49" in candidates and "MB" in candidates
    forced = describe_choice(BIG, SequencePlan(4), 38_400, device=A100_80)
    assert "(predicted to take " in forced[0] and "longer than 4x1)" in forced[0] and "A100" in forced[1]
    assert describe_choice(BIG, SequencePlan(3), 38_400, device=H100)[0] == "Ulysses over 3 GPUs (the only way)"
