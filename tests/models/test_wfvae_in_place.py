"""The WF-VAE's chunks where the Triton convolution reads the frames of the chunk before in place."""

import pytest
import torch
from osp_fast.kernels import causal_conv3d, tuning
from osp_fast.kernels.causal_conv3d_launch import FORWARD, ConvConfig
from osp_fast.kernels.launch import forced_path
from torch.utils._python_dispatch import TorchDispatchMode

from osp_fast.models.wfvae import WFVAE, WFVAE_CONFIGS, WFVAEConfig
from osp_fast.models.wfvae_layers import CausalConv3d, ChunkState, ResidualBlock, run
from osp_fast.models.wfvae_resample import Downsample3d, Upsample3d
from osp_fast.models.wfvae_stream import Plan

WIDE = ConvConfig(16, 32, 64, 64, 4, 1)  # blocks that the interpreter needs few of


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.fixture
def triton(monkeypatch):
    """Call it to turn to Triton; it returns a list that gets the older cached frame, or None, of every launch."""

    def turn():
        launches, launch = [], causal_conv3d.conv_forward
        monkeypatch.setattr(causal_conv3d, "conv_forward", lambda *given: launches.append(given[3]) or launch(*given))
        monkeypatch.setenv("OSP_FAST_KERNELS", "triton")
        return launches

    with tuning.forced(FORWARD, WIDE):
        yield turn


def test_the_whole_model_in_chunks(triton):
    config = dict(latent_dim=4, base_channels=4, encoder_num_resblocks=1, decoder_num_resblocks=1)
    config |= dict(encoder_energy_flow_hidden_size=12, decoder_energy_flow_hidden_size=12, use_attention=False)
    torch.manual_seed(0)
    vae = WFVAE(WFVAEConfig(**config, scale=(1.0,) * 4, shift=(0.0,) * 4)).requires_grad_(False)
    video = torch.randn(1, 3, 5, 8, 16)
    posterior = vae.encode(video)
    decoded = vae.decode(posterior.mean)
    launches = triton()
    found = vae.encode(video, (1, None, None))
    assert relative(found.mean, posterior.mean) < 2e-6 and relative(found.logvar, posterior.logvar) < 2e-6
    assert relative(vae.decode(posterior.mean, (1, None, None)), decoded) < 4e-6
    assert sum(earlier is not None for earlier in launches) >= 20


@pytest.mark.parametrize(
    "layer, lengths",
    [("trilinear", (1, 1, 1)), ("trilinear", (3, 2)), ("nearest", (2, 1)), ("residual", (3, 1)), ("halved", (2, 1, 1))],
)
def test_layers_in_chunks(layer, lengths, triton):
    torch.manual_seed(0)
    if layer == "residual":
        layers = [ResidualBlock(6, 8), ResidualBlock(8, 8)]
    elif layer == "halved":
        layers, lengths = [ResidualBlock(6, 6), Downsample3d(6)], (2 * lengths[0] - 1, *(2 * n for n in lengths[1:]))
    else:
        layers = [Upsample3d(6, layer), ResidualBlock(6, 6)]
    layers = torch.nn.ModuleList(layers).requires_grad_(False)
    x = torch.randn(1, 6, sum(lengths), 4, 2)
    expected = run(layers, x, ChunkState(last=True))
    launches = triton()
    state, found = ChunkState(), []
    for number, part in enumerate(x.split(lengths, dim=2)):
        state.last = number == len(lengths) - 1
        found.append(run(layers, part, state))
        state.first = False
    assert relative(torch.cat(found, dim=2), expected) < 2e-6
    assert launches and not state.kept


@pytest.mark.parametrize("trained", ["all", "bias", "norm", "input"])
def test_gradients_through_chunks(trained, triton):
    """Whatever is trained: autograd knows no output that is written in parts."""
    torch.manual_seed(0)
    block = ResidualBlock(6, 6)
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(trained == "all" or (trained in name and trained != "input"))
    x = torch.randn(1, 6, 6, 3, 4)

    def gradients():
        leaf, state, outs = x.clone().requires_grad_(trained in ("all", "input")), ChunkState(), []
        for number, part in enumerate(leaf.split(3, dim=2)):
            state.last = number == 1
            outs.append(block(part, state))
            state.first = False
        leaves = [one for one in (leaf, *block.parameters()) if one.requires_grad]
        return torch.autograd.grad(torch.cat(outs, dim=2).square().sum(), leaves)

    expected = gradients()
    triton()
    for a, b in zip(gradients(), expected, strict=True):
        assert relative(a, b) < 1e-4


class Copies(TorchDispatchMode):
    """Operations that copy, pad or join, and the shapes of their results."""

    NAMES = ("cat", "clone", "copy_", "_to_copy", "constant_pad_nd", "stack", "index_put_", "expand_copy")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ in self.NAMES:
            self.found.append((function.overloadpacket.__name__, tuple(result.shape)))
        return result


def test_nothing_is_copied_or_held_on_to():
    """The released decoder in bfloat16, as on Hopper; what is kept of each layer is two frames in their own memory."""
    with torch.device("meta"):
        vae = WFVAE(WFVAE_CONFIGS["WFVAEModel_D8_4x8x8"]).to(torch.bfloat16).requires_grad_(False)
        latents = torch.empty((1, 8, 9, 16, 24), dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last_3d)
    pieces, kept = [], {}
    forward = CausalConv3d.forward

    def watched(layer, x, state, *arguments, **options):
        out = forward(layer, x, state, *arguments, **options)
        if layer in state.kept:
            kept.setdefault(layer, []).append(state.kept[layer])
        return out

    with forced_path("triton"), Copies() as copies, pytest.MonkeyPatch.context() as patch:
        patch.setattr(CausalConv3d, "forward", watched)
        for piece in vae.decode_stream((latents,), Plan(3)):
            pieces.append(tuple(piece.shape[2:]))
            del piece
    assert sum(frames for frames, *_ in pieces) == 33 and len(pieces) == 3
    assert len(kept) > 20
    layers = set(kept) - {vae.decoder.conv_in}  # its frames are the given latents
    for layer in layers:
        for frames in kept[layer]:
            assert len(frames) == 2
            sizes = {frame.untyped_storage().data_ptr(): frame for frame in frames}
            assert all(frame.untyped_storage().nbytes() <= 2 * 2 * frame.numel() for frame in sizes.values())
    # Three channels of the wavelet pyramid are converted to float32; no activation of the network is copied.
    assert all(len(shape) < 4 or shape[1] == 3 for _, shape in copies.found), copies.found


def test_a_layer_of_the_vae_asks_the_table(monkeypatch):
    asked = []

    def serving_path(*call):
        asked.append(call[1:])
        return "library"

    monkeypatch.setattr("osp_fast.models.wfvae_layers.serving_path", serving_path)
    monkeypatch.setattr(causal_conv3d, "serving_path", serving_path)
    layer = CausalConv3d(4, 6, 3).requires_grad_(False)
    layer(torch.randn(1, 4, 1, 2, 2), ChunkState(last=True))
    assert set(asked) == {(torch.float32, 4, 6, (3, 3, 3))}
