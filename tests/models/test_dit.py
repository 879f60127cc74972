"""The diffusion transformer against recorded numbers, and its loading and saving."""

import json
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import noop_context_fn

from osp_fast.config import Recipe
from osp_fast.errors import UserError
from osp_fast.models.dit import DIT_CONFIGS, DiT, DiTConfig
from osp_fast.models.weights import INDEX, WEIGHTS, read_recipe, write_tensors

GOLDEN = Path(__file__).parents[1] / "golden/dit"
SMALL = DiTConfig(
    num_layers=4, num_attention_heads=2, attention_head_dim=12, caption_channels=10, cross_attention_dim=24, sparse_n=2
)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module")
def io() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "io.safetensors")


@pytest.fixture
def dit() -> DiT:
    return DiT.from_pretrained(GOLDEN)


def run(dit: DiT, io: dict[str, torch.Tensor], latents: torch.Tensor) -> torch.Tensor:
    return dit(latents, io["timestep"], io["text"], io["text_mask"], io["latent_mask"])


@pytest.mark.parametrize("attention", ["auto", "sdpa", "reference"])
def test_golden_output(dit, io, attention):
    dit.use_attention(attention)
    with torch.no_grad():
        assert relative(run(dit, io, io["latents"]), io["output"]) < 2e-6


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_golden_gradients(dit, io, checkpointing, attention):
    dit.use_attention(attention)
    dit.recompute_blocks(noop_context_fn if checkpointing else None)
    latents = io["latents"].clone().requires_grad_()
    (run(dit, io, latents) * io["grad_output"]).sum().backward()
    assert relative(latents.grad, io["grad_latents"]) < 1e-5
    gradients = dit.to_checkpoint({name: parameter.grad for name, parameter in dit.named_parameters()})
    listed = [name for name in io if name.startswith("grad.")]
    assert len(listed) == 7
    for name in listed:
        assert relative(gradients[name.removeprefix("grad.")], io[name]) < 1e-5, name


def test_under_autocast_the_residual_stream_has_16_bits(dit, io):
    seen = []
    for block in dit.transformer_blocks:
        block.register_forward_hook(lambda block, arguments, outputs: seen.append(outputs))
    with torch.autocast("cpu", torch.bfloat16):
        output = run(dit, io, io["latents"])
    assert {x.dtype for x, pending in seen} == {pending.y.dtype for x, pending in seen} == {torch.bfloat16}
    assert relative(output, io["output"]) < 1e-2


def test_checkpointing_changes_no_bit_of_16_bit_models(dit, io):
    dit.bfloat16()
    outputs = []
    for checkpointing in (False, True):
        dit.recompute_blocks(noop_context_fn if checkpointing else None)
        latents = io["latents"].bfloat16().requires_grad_()
        outputs.append(dit(latents, io["timestep"], io["text"].bfloat16(), io["text_mask"], io["latent_mask"]))
    assert outputs[0].dtype == torch.bfloat16 and torch.equal(*outputs)


def test_without_latent_mask_equals_all_real(dit, io):
    with torch.no_grad():
        masked = run(dit, io, io["latents"])
        unmasked = dit(io["latents"], io["timestep"], io["text"], io["text_mask"])
    assert relative(unmasked, masked) < 1e-6


def test_padding_does_not_change_real_cells():
    dit = randomised(DiT.create(SMALL, seed=0))
    latents, text = torch.randn(1, 8, 3, 4, 6), torch.randn(1, 5, 10)
    padded = torch.nn.functional.pad(latents, (0, 0, 0, 0, 0, 2), value=7.0)
    mask = torch.zeros(1, 5, 4, 6)
    mask[:, :3] = 1
    with torch.no_grad():
        alone = dit(latents, torch.tensor([500]), text)
        together = dit(padded, torch.tensor([500]), text, latent_mask=mask)[:, :, :3]
    assert torch.allclose(alone, together, atol=1e-5)


def test_padded_text_is_not_seen():
    dit = randomised(DiT.create(SMALL, seed=0))
    latents, text = torch.randn(2, 8, 2, 4, 4), torch.randn(2, 5, 10)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    changed = text.clone()
    changed[0, 3:] = 9.0
    time_ = torch.tensor([3, 999])
    with torch.no_grad():
        assert torch.equal(dit(latents, time_, text, mask), dit(latents, time_, changed, mask))


def randomised(dit: DiT) -> DiT:
    """Fresh models start with zero output; give the zero weights values so that outputs say something."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return dit


def test_create_depends_on_the_seed_only():
    first, again, other = (DiT.create(SMALL, seed).state_dict() for seed in (0, 0, 1))
    torch.rand(3)  # the global random state plays no part
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["patch_embed.weight"], other["patch_embed.weight"])
    assert all(tensor.isfinite().all() for tensor in first.values())


def test_rounding_rope_angles_is_a_small_change(dit, io):
    with torch.no_grad():
        exact = run(dit, io, io["latents"])
        dit.rope_dtype = torch.bfloat16
        rounded = run(dit, io, io["latents"])
    assert 1e-6 < relative(rounded, exact) < 1e-2


def test_released_model_on_meta_in_under_a_second():
    start = time.perf_counter()
    with torch.device("meta"):
        dit = DiT(DIT_CONFIGS["OpenSoraT2V_v1_3-2B/122"])
    seconds = time.perf_counter() - start
    assert 2.6e9 < sum(p.numel() for p in dit.parameters()) < 2.9e9
    assert seconds < 1.0


def test_attention_modes_of_the_released_model():
    config = DIT_CONFIGS["OpenSoraT2V_v1_3-2B/122"]
    modes = [config.attention_mode(i) for i in range(32)]
    assert modes[:2] == ["full", "full"] and modes[30:] == ["full", "full"]
    assert modes[2:30] == ["single", "group"] * 14


@pytest.mark.parametrize("shards", [1, 3])
def test_save_and_load(tmp_path, dit, shards):
    if shards == 1:
        dit.save_pretrained(tmp_path)
    else:
        (tmp_path / "config.json").write_text((GOLDEN / "config.json").read_text())
        tensors = load_file(GOLDEN / WEIGHTS)
        write_tensors(tmp_path, tensors, shard_bytes=sum(t.nbytes for t in tensors.values()) // 3 + 60_000)
        assert (tmp_path / INDEX).exists() and len(list(tmp_path.glob("*.safetensors"))) == 3
    again = DiT.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(dit.state_dict().values(), again.state_dict().values(), strict=True))


def test_saved_folder_has_the_names_of_a_real_checkpoint(tmp_path, dit):
    dit.save_pretrained(tmp_path)
    saved, golden = load_file(tmp_path / WEIGHTS), load_file(GOLDEN / WEIGHTS)
    assert saved.keys() == golden.keys()
    assert all(torch.equal(saved[name], golden[name]) for name in golden)
    config = json.loads((tmp_path / "config.json").read_text())
    original = json.loads((GOLDEN / "config.json").read_text())
    assert all(config[name] == value for name, value in original.items() if not name.startswith("_d"))


def broken_folder(tmp_path: Path, change) -> Path:
    tensors = load_file(GOLDEN / WEIGHTS)
    change(tensors)
    save_file(tensors, tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text((GOLDEN / "config.json").read_text())
    return tmp_path


def test_loading_is_strict(tmp_path):
    def drop(tensors):
        del tensors["proj_out.bias"]

    def rename(tensors):
        tensors["stranger"] = torch.zeros(3)

    def reshape(tensors):
        tensors["proj_out.weight"] = tensors["proj_out.weight"].reshape(96, 32).contiguous()

    for change, words in ((drop, "proj_out.bias"), (rename, "stranger"), (reshape, r"proj_out.weight.*\(96, 32\)")):
        with pytest.raises(UserError, match=words):
            DiT.from_pretrained(broken_folder(tmp_path, change))


def test_broken_folders_end_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match="config.json is missing"):
        DiT.from_pretrained(tmp_path)
    folder = broken_folder(tmp_path, lambda tensors: None)
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="not a complete safetensors file"):
        DiT.from_pretrained(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(UserError, match="is missing"):
        DiT.from_pretrained(folder)
    (folder / "config.json").write_text('{"_class_name": "WFVAEModel"}')
    with pytest.raises(UserError, match="OpenSoraT2V_v1_3 is needed"):
        DiT.from_pretrained(folder)
    config = json.loads((GOLDEN / "config.json").read_text()) | {"attention_bias": False}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="attention_bias"):
        DiT.from_pretrained(folder)


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("num_layers", "6", "num_layers is '6', not a valid int"),
        ("num_layers", 10**5, "more than 1000"),
        ("norm_eps", -1, "norm_eps is -1"),
        ("sparse1d", "false", "not a valid bool"),
        ("interpolation_scale_t", 0, "interpolation_scale_t is 0"),
        ("attention_head_dim", 50, "multiple of 6"),
    ],
)
def test_wrong_values_in_config_json(tmp_path, key, value, words):
    folder = broken_folder(tmp_path, lambda tensors: None)
    config = json.loads((GOLDEN / "config.json").read_text()) | {key: value}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=words):
        DiT.from_pretrained(folder)


def test_integer_weights_are_refused(tmp_path):
    def quantise(tensors):
        tensors["proj_out.weight"] = tensors["proj_out.weight"].to(torch.int8)

    with pytest.raises(UserError, match=r"proj_out\.weight holds torch\.int8"):
        DiT.from_pretrained(broken_folder(tmp_path, quantise))


def test_saving_over_shards_leaves_none_of_them(tmp_path, dit):
    tensors = dit.to_checkpoint(dit.state_dict())
    write_tensors(tmp_path, tensors, shard_bytes=1 << 18)
    other = DiT.create(dit.config, seed=3)
    other.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", WEIGHTS]
    again = DiT.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in other.state_dict().items())
    write_tensors(tmp_path, tensors, shard_bytes=1 << 18)
    assert not (tmp_path / WEIGHTS).exists()
    assert torch.equal(DiT.from_pretrained(tmp_path).state_dict()["proj_out.bias"], dit.state_dict()["proj_out.bias"])


@pytest.mark.parametrize(
    "change, words",
    [
        ({"size": 5}, "size is 5, not a valid str"),
        ({"train_fps": -1}, "train_fps is -1"),
        ({"rectified_flow": "no"}, "not a valid bool"),
        ({"num_frames": None}, "num_frames is None"),
        ({"colour": "red"}, "colour is unknown"),
    ],
)
def test_a_broken_recipe_ends_in_one_sentence(tmp_path, change, words):
    recipe = Recipe("epsilon", False, False, 24.0, 17, "64x64", 16)
    (tmp_path / "recipe.json").write_text(json.dumps(asdict(recipe)))
    assert read_recipe(tmp_path) == recipe
    (tmp_path / "recipe.json").write_text(json.dumps(asdict(recipe) | change))
    with pytest.raises(UserError, match=f"recipe.json: .*{words}"):
        read_recipe(tmp_path)
