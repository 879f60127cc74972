"""The diffusion transformer through all Triton kernels, in the interpreter, against the recorded numbers."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import noop_context_fn

from osp_fast.models.dit import DiT, DiTConfig

GOLDEN = Path(__file__).parents[1] / "golden/dit"
SMALL = DiTConfig(
    num_layers=4, num_attention_heads=1, attention_head_dim=24, caption_channels=8, cross_attention_dim=24, sparse_n=2
)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


class Ours(TorchDispatchMode):
    """The names of our operations that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.namespace == "osp_fast":
            self.names.add(function.name().removeprefix("osp_fast::"))
        return function(*arguments, **(options or {}))


@pytest.fixture(autouse=True)
def triton_path(monkeypatch):
    monkeypatch.setenv("OSP_FAST_KERNELS", "triton")


def test_golden_output_and_gradients():
    dit = DiT.from_pretrained(GOLDEN).use_attention("triton")
    assert dit.attention_summary().startswith("triton (") and ";" not in dit.attention_summary()
    io = load_file(GOLDEN / "io.safetensors")
    latents = io["latents"].requires_grad_()
    with Ours() as ours:
        output = dit(latents, io["timestep"], io["text"], io["text_mask"], io["latent_mask"])
        (output * io["grad_output"]).sum().backward()
    forward = {name.removesuffix("_backward").removesuffix("_") for name in ours.names}
    assert forward == {"adaln", "rope3d", "skiparse_attention"} and len(ours.names) == 6
    assert relative(output, io["output"]) < 2e-6
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
    dit.recompute_blocks(noop_context_fn if checkpointing else None)
    generator = torch.Generator().manual_seed(2)
    latents, text = (torch.randn(shape, generator=generator) for shape in ((2, 8, 1, 4, 10), (2, 3, 8)))
    latent_mask = torch.ones(2, 1, 4, 10)
    latent_mask[0, :, 2:] = 0
    output = dit(latents, torch.tensor([3, 900]), text, torch.tensor([[1, 1, 1], [1, 0, 0]]), latent_mask)
    return list(torch.autograd.grad(output.square().mean(), list(dit.parameters())))


def test_gradient_checkpointing_changes_nothing(small, monkeypatch):
    plain, recomputed = (gradients(small, "triton", checkpointing) for checkpointing in (False, True))
    assert all(torch.equal(*pair) for pair in zip(plain, recomputed, strict=True))
    monkeypatch.setenv("OSP_FAST_KERNELS", "reference")
    for found, expected in zip(plain, gradients(small, "reference", False), strict=True):
        assert (found - expected).norm() <= 1e-5 * expected.norm() + 1e-9
