"""The diffusion transformer through the Triton attention, in the interpreter, against the recorded numbers."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from osp_fast.models.dit import DiT, DiTConfig

GOLDEN = Path(__file__).parents[1] / "golden/dit"
SMALL = DiTConfig(
    num_layers=4, num_attention_heads=1, attention_head_dim=24, caption_channels=8, cross_attention_dim=24, sparse_n=2
)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def test_golden_output_and_gradients():
    dit = DiT.from_pretrained(GOLDEN).use_attention("triton")
    assert dit.attention_summary().startswith("triton (") and ";" not in dit.attention_summary()
    io = load_file(GOLDEN / "io.safetensors")
    latents = io["latents"].requires_grad_()
    output = dit(latents, io["timestep"], io["text"], io["text_mask"], io["latent_mask"])
    assert relative(output, io["output"]) < 2e-6
    (output * io["grad_output"]).sum().backward()
    assert relative(latents.grad, io["grad_latents"]) < 1e-5
    gradients = dit.to_checkpoint({name: parameter.grad for name, parameter in dit.named_parameters()})
    listed = [name for name in io if name.startswith("grad.")]
    assert len(listed) == 7
    for name in listed:
        assert relative(gradients[name.removeprefix("grad.")], io[name]) < 1e-5, name


@pytest.fixture(scope="module")
def small() -> DiT:
    """All three modes in four blocks, with weights that let the output depend on everything."""
    dit = DiT.create(SMALL, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return dit


def gradients(dit: DiT, attention: str, checkpointing: bool) -> list[torch.Tensor]:
    """Of the weights, for clips and texts of which one is shorter."""
    dit.use_attention(attention)
    dit.gradient_checkpointing = checkpointing
    generator = torch.Generator().manual_seed(2)
    latents, text = (torch.randn(shape, generator=generator) for shape in ((2, 8, 1, 4, 10), (2, 3, 8)))
    latent_mask = torch.ones(2, 1, 4, 10)
    latent_mask[0, :, 2:] = 0
    output = dit(latents, torch.tensor([3, 900]), text, torch.tensor([[1, 1, 1], [1, 0, 0]]), latent_mask)
    return list(torch.autograd.grad(output.square().mean(), list(dit.parameters())))


def test_gradient_checkpointing_changes_nothing(small):
    plain, recomputed = (gradients(small, "triton", checkpointing) for checkpointing in (False, True))
    assert all(torch.equal(*pair) for pair in zip(plain, recomputed, strict=True))
    for found, expected in zip(plain, gradients(small, "reference", False), strict=True):
        assert (found - expected).norm() <= 1e-5 * expected.norm() + 1e-9
