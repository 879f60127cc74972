"""LoRA: training starts from the base, files are PEFT's and come back, merging is what training computed."""

import json
import os
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import noop_context_fn

from osp_fast.config import Recipe
from osp_fast.errors import UserError
from osp_fast.models.dit import DiT, DiTConfig
from osp_fast.models.lora import (
    add_lora,
    fused_state,
    load_lora,
    lora_state,
    merge_lora,
    restore_lora,
    save_lora,
)
from osp_fast.models.lora_files import agreed_recipe
from osp_fast.seeding import torch_generator

# Blocks of all three kinds of attention.
CONFIG = DiTConfig(
    num_layers=5, num_attention_heads=2, attention_head_dim=12, caption_channels=8, cross_attention_dim=24
)
RANK, ALPHA = 2, 6.0
RECIPE = Recipe("v_prediction", True, False, 24.0, 9, "32x32", 16)
Q0 = "base_model.model.transformer_blocks.0.attn1.to_q"


def draw(*shape, name=""):
    return torch.randn(shape, generator=torch_generator("test", name, *shape))


def make_dit():
    """A DiT whose output depends on all of its input, as a fresh one's does not."""
    dit = DiT.create(CONFIG, 0)
    with torch.no_grad():
        for name, parameter in dit.named_parameters():
            parameter += 0.05 * draw(*parameter.shape, name=name)
    return dit


def make_adapted(trained=True):
    dit = add_lora(make_dit(), RANK, ALPHA, seed=3)
    with torch.no_grad():
        for name, parameter in dit.named_parameters() if trained else ():
            if "lora_B" in name:
                parameter += 0.1 * draw(*parameter.shape, name=name)
    return dit


def predict(dit):
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    return dit(draw(2, 8, 2, 4, 6), torch.tensor([10, 900]), draw(2, 3, 8), mask)


def gradients(dit):
    dit.zero_grad()
    predict(dit).square().sum().backward()
    return {name: parameter.grad for name, parameter in dit.named_parameters() if parameter.requires_grad}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of trained adapters, as training saves it."""
    folder = tmp_path_factory.mktemp("run") / "lora"
    save_lora(folder, make_adapted(), RANK, ALPHA, RECIPE)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "lora"))


def test_training_starts_from_the_base_and_draws_nothing_global():
    before = torch.get_rng_state()
    dit, base = make_adapted(trained=False), make_dit()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(predict(dit), predict(base))
    trained = {name: parameter for name, parameter in dit.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 7 * CONFIG.num_layers and all(".lora_" in name for name in trained)
    assert all(parameter.dtype == torch.float32 for parameter in trained.values())
    for name, parameter in trained.items():
        if "lora_B" in name:
            assert not parameter.any()
        else:  # kaiming uniform with a = sqrt(5), as nn.Linear
            bound = parameter.shape[1] ** -0.5
            assert 0.8 * bound < parameter.abs().max() <= bound
    again, other = make_adapted(trained=False), add_lora(make_dit(), RANK, ALPHA, seed=4)
    name = "transformer_blocks.1.ff.0.lora_A.default.weight"
    assert torch.equal(again.get_parameter(name), trained[name])
    assert not torch.equal(other.get_parameter(name), trained[name])
    assert not torch.equal(trained[name], trained[name.replace(".1.", ".2.")])


def test_a_model_without_memory_gets_adapters_without_memory():
    with torch.device("meta"):
        dit = add_lora(DiT(CONFIG), RANK, ALPHA, 0)
    assert all(parameter.is_meta for parameter in dit.parameters())


def test_a_base_of_16_bits_trains_adapters_of_32():
    dit = add_lora(make_dit().bfloat16(), RANK, ALPHA, 0)
    assert {p.dtype for p in dit.parameters() if p.requires_grad} == {torch.float32}
    latents = draw(2, 8, 2, 4, 6).bfloat16()
    dit(latents, torch.tensor([10, 900]), draw(2, 3, 8).bfloat16()).float().sum().backward()
    assert dit.get_parameter("transformer_blocks.0.ff.0.lora_B.default.weight").grad.any()


def test_files_hold_an_adapter_for_each_product_of_a_released_checkpoint(saved):
    dit, tensors = make_adapted(), load_file(saved / "adapter_model.safetensors")
    assert sorted(path.name for path in saved.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "recipe.json",
    ]
    weights = {name.removesuffix(".weight") for name in make_dit().to_checkpoint(make_dit().state_dict())}
    products = {name.split(".lora_")[0].removeprefix("base_model.model.") for name in tensors}
    assert len(products) == 10 * CONFIG.num_layers and products <= weights
    qkv = dit.transformer_blocks[0].self_attention.qkv
    for part, rows in zip("qkv", qkv.lora_B["default"].weight.chunk(3), strict=True):
        assert torch.equal(tensors[f"{Q0[:-1]}{part}.lora_A.weight"], qkv.lora_A["default"].weight)
        assert torch.equal(tensors[f"{Q0[:-1]}{part}.lora_B.weight"], rows)
    config = json.loads((saved / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 6)


class Released(nn.Module):
    """The products of a released checkpoint, for PEFT to find by their names."""

    def __init__(self, weights):
        super().__init__()
        for name, weight in weights.items():
            if name.startswith("transformer_blocks") and name.endswith("weight") and weight.dim() == 2:
                module = self
                *parents, last = name.removesuffix(".weight").split(".")
                for parent in parents:
                    if parent not in module._modules:
                        module.add_module(parent, nn.Module())
                    module = module._modules[parent]
                linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
                linear.weight = nn.Parameter(weight.detach())
                module.add_module(last, linear)


def test_peft_itself_reads_our_files(saved):
    import peft

    dit = make_dit()
    model = peft.PeftModel.from_pretrained(Released(dit.to_checkpoint(dit.state_dict())), saved).merge_and_unload()
    merged = merge_lora(make_dit(), saved)
    expected = merged.to_checkpoint(merged.state_dict())
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6)
    base = make_dit().transformer_blocks[0].ff[2].weight
    assert not torch.equal(expected["transformer_blocks.0.ff.net.2.weight"], base)


def test_merged_weights_compute_what_training_computed(saved):
    torch.testing.assert_close(predict(merge_lora(make_dit(), saved)), predict(make_adapted()), rtol=0, atol=2e-5)
    assert torch.equal(predict(merge_lora(make_dit(), saved, scale=0.0)), predict(make_dit()))
    half = merge_lora(make_dit(), saved, scale=0.5).transformer_blocks[0].ff[0].weight
    whole, base = (dit.transformer_blocks[0].ff[0].weight for dit in (merge_lora(make_dit(), saved), make_dit()))
    torch.testing.assert_close(half, (whole + base) / 2, rtol=0, atol=1e-6)


def test_adapters_of_others_may_differ_in_a_and_leave_products_out(tmp_path):
    """diffusers' names, an A of its own for each of q, k, v, no configuration: alpha is the rank."""
    tensors = {}
    for part in "qv":
        tensors[f"transformer.transformer_blocks.2.attn1.to_{part}.lora_A.weight"] = draw(4, 24, name=part).half()
        tensors[f"transformer.transformer_blocks.2.attn1.to_{part}.lora_B.weight"] = draw(24, 4, name=part).half()
    tensors |= {"transformer.proj_out.lora_A.weight": draw(4, 24), "transformer.proj_out.lora_B.weight": draw(32, 4)}
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(tensors, file)
    base, dit = make_dit(), merge_lora(make_dit(), tmp_path, scale=0.5)
    q, k, v = (
        dit.transformer_blocks[2].self_attention.qkv.weight - base.transformer_blocks[2].self_attention.qkv.weight
    ).chunk(3)
    assert not k.any()
    for part, found in (("q", q), ("v", v)):
        a, b = draw(4, 24, name=part).half().float(), draw(24, 4, name=part).half().float()
        torch.testing.assert_close(found, 0.5 * b @ a, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        dit.proj_out.weight - base.proj_out.weight, 0.5 * draw(32, 4) @ draw(4, 24), rtol=0, atol=1e-5
    )
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 1.0})}
    save_file(tensors, file, metadata=metadata)
    lora = load_lora(file)
    assert (lora.rank, lora.alpha, lora.recipe) == (4, 1.0, None)
    for told, words in (('{"transformer.use_dora": true}', "use_dora is True"), ("[[1, 2]]", "not a JSON object")):
        save_file(tensors, file, metadata={"lora_adapter_metadata": told})
        with pytest.raises(UserError, match=words):
            load_lora(file)
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"no adapter of transformer_blocks.0.attn1.to_q: resume from another"):
        fused_state(add_lora(make_dit(), 4, 4.0, 0), tmp_path)


def test_training_goes_on_bit_for_bit(saved, folder):
    expected = make_adapted().state_dict()
    restored = restore_lora(add_lora(make_dit(), RANK, ALPHA, seed=99), saved).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in restored.items())
    average = {name: tensor + 1 for name, tensor in expected.items() if ".lora_" in name}
    save_lora(folder, lora_state(make_adapted(), average), RANK, ALPHA)
    found = fused_state(make_adapted(), folder)
    assert found.keys() == average.keys() and all(torch.equal(found[name], average[name]) for name in found)
    with pytest.raises(UserError, match=r"r is 2 and lora_alpha 6, but --lora_rank is 2 and --lora_alpha 5"):
        restore_lora(add_lora(make_dit(), RANK, 5.0, 0), saved)
    change(folder, lambda tensors: tensors.update({f"{Q0}.lora_A.weight": draw(2, 24)}))
    with pytest.raises(UserError, match=r"attn1.to_q and .*to_v differ in lora_A"):
        restore_lora(make_adapted(), folder)


def test_recomputing_and_compiling_change_nothing():
    expected = gradients(make_adapted())
    recomputed = gradients(make_adapted().recompute_blocks(noop_context_fn))
    assert recomputed.keys() == expected.keys()
    assert all(torch.equal(recomputed[name], expected[name]) for name in expected)
    compiled, graphs = make_adapted(), []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    for block in compiled.transformer_blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False, backend=count)
    found = gradients(compiled)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    # Of the first block, to which nothing is pending, and of each kind of attention; no layer's adapters ask for more.
    assert len(graphs) == 4
    torch._dynamo.reset()


@pytest.fixture
def one_rank():
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_sharded_with_the_frozen_base(one_rank, tmp_path):
    plain, sharded = make_adapted(), make_adapted().recompute_blocks(noop_context_fn)
    for block in sharded.transformer_blocks:
        fully_shard(block, mesh=one_rank)
    fully_shard(sharded, mesh=one_rank)
    expected, found = gradients(plain), gradients(sharded)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient.full_tensor(), expected[name])
    assert all(parameter.grad is None for parameter in sharded.parameters() if not parameter.requires_grad)
    save_lora(tmp_path, sharded, RANK, ALPHA)
    state = lora_state(plain)
    assert all(torch.equal(tensor, state[name]) for name, tensor in load_lora(tmp_path).tensors.items())


def change(folder, edit):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


def configure(**values):
    def damage(folder):
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return damage


def tensors_changed(**values):
    return lambda folder: change(folder, lambda tensors: tensors.update(values))


def without(*names):
    return lambda folder: change(folder, lambda tensors: [tensors.pop(name) for name in names])


def raw_file(content):
    return lambda folder: (folder / "adapter_model.safetensors").write_bytes(content)


def hostile_header(header):
    return raw_file(struct.pack("<Q", len(header)) + header)


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json is missing, which says alpha"),
        (lambda folder: os.truncate(folder / "adapter_model.safetensors", 5000), "not a complete safetensors file"),
        (raw_file(b""), "not a complete safetensors file"),
        (raw_file(b"\x80\x04cos\nsystem\n(S'true'\ntR."), "not a complete safetensors file"),
        (hostile_header(b'{"a":{"dtype":"F32","shape":[9,9],"data_offsets":[0,9999999999]}}'), "not a complete"),
        (hostile_header(b"{}"), "holds no tensors"),
        (lambda folder: (folder / "adapter_config.json").write_text("[" * 100_000), "cannot be read as JSON"),
        (lambda folder: (folder / "adapter_config.json").write_text("[]"), "does not hold a JSON object"),
        (configure(peft_type="LOHA"), "peft_type is 'LOHA'"),
        (configure(r=3), "r is 3, but the tensors' rank is 2"),
        (configure(lora_alpha=float("nan")), "lora_alpha is nan, not a number above 0"),
        (configure(lora_alpha=10**400), "lora_alpha is 10+, not a number above 0"),
        (configure(lora_alpha=True), "lora_alpha is True"),
        (configure(lora_alpha=None), "lora_alpha is None"),
        (configure(use_rslora=True), "use_rslora is True, but only plain LoRA"),
        (configure(rank_pattern={"to_q": 4}), "rank_pattern"),
        (configure(init_lora_weights="pissa"), "init_lora_weights 'pissa' goes with weights of the base"),
        (configure(bias="all"), "bias is 'all'"),
        (tensors_changed(**{"../../etc/passwd": draw(2, 2)}), "passwd' is not the name of a LoRA tensor"),
        (tensors_changed(**{f"{Q0}.lora_magnitude_vector": draw(2)}), "lora_magnitude_vector' is not the name"),
        (tensors_changed(**{f"{Q0[17:]}.lora_A.weight": draw(2, 24)}), "stands there twice"),
        (
            tensors_changed(**{f"{Q0}.lora_A.weight": draw(3, 24)}),
            "lora_A.weight has rank 3, others 2|has rank 2, others 3",
        ),
        (
            tensors_changed(**{f"{Q0}.lora_A.weight": draw(2, 23)}),
            "is for a weight of 24 x 23, but the DiT's has 24 x 24",
        ),
        (tensors_changed(**{f"{Q0}.lora_A.weight": draw(2, 24, 1)}), r"is float32 \(2, 24, 1\), not a matrix"),
        (tensors_changed(**{f"{Q0}.lora_A.weight": torch.zeros(2, 24, dtype=torch.int8)}), "is int8"),
        (tensors_changed(**{f"{Q0}.lora_A.weight": torch.full((2, 24), float("inf"))}), "not finite"),
        (without(f"{Q0}.lora_A.weight"), "to_q.lora_B.weight is there without its lora_A.weight"),
        (
            tensors_changed(
                **{"pos_embed.proj.lora_A.weight": draw(2, 32), "pos_embed.proj.lora_B.weight": draw(24, 2)}
            ),
            "pos_embed.proj is no product of this DiT",
        ),
        (
            tensors_changed(**{f"transformer_blocks.9.ff.lora_{k}.weight": draw(2, 2) for k in "AB"}),
            "transformer_blocks.9.ff is no product of this DiT",
        ),
        (lambda folder: (folder / "recipe.json").write_text("{}"), "recipe.json: hw_stride is missing"),
    ],
)
def test_damaged_files_are_refused_in_one_sentence(folder, damage, words):
    damage(folder)
    dit = make_dit()
    with pytest.raises(UserError, match=words):
        merge_lora(dit, folder)
    assert all(torch.equal(a, b) for a, b in zip(dit.parameters(), make_dit().parameters(), strict=True))


def test_other_files_are_refused(tmp_path, saved):
    for name in ("nothing", "adapter_model.bin"):
        (tmp_path / "adapter_model.bin").write_bytes(b"\x80")
        with pytest.raises(UserError, match="nothing does not exist|adapter_model.bin is not a .safetensors file"):
            load_lora(tmp_path / name)
    assert load_lora(saved / "adapter_model.safetensors").alpha == ALPHA


def test_base_and_adapters_must_predict_the_same(saved):
    lora, folder = load_lora(saved), Path("base")
    assert lora.recipe == RECIPE
    assert agreed_recipe(None, folder, lora) == RECIPE
    assert agreed_recipe(RECIPE, folder, lora._replace(recipe=None)) == RECIPE
    assert agreed_recipe(None, folder, lora._replace(recipe=None)) is None
    longer = replace(RECIPE, num_frames=93)
    assert agreed_recipe(longer, folder, lora) == RECIPE
    with pytest.raises(UserError, match=r"lora/recipe.json says prediction_type v_prediction, but base/recipe.json"):
        agreed_recipe(replace(RECIPE, prediction_type="epsilon"), folder, lora)
    with pytest.raises(UserError, match="says rectified_flow False"):
        agreed_recipe(replace(RECIPE, rectified_flow=True), folder, lora)
    flow = replace(RECIPE, rectified_flow=True)
    assert agreed_recipe(replace(flow, prediction_type="epsilon"), folder, lora._replace(recipe=flow)) == flow


def test_peft_is_needed_for_training_only(monkeypatch, saved):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(UserError, match="--lora_rank needs the package peft: install it .pip install peft."):
        add_lora(make_dit(), RANK, ALPHA, 0)
    merge_lora(make_dit(), saved)
