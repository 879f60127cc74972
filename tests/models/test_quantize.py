"""Weights in 8 bits."""

import copy
import sys

import pytest
import torch
from torch import nn

from osp_fast.errors import UserError
from osp_fast.models.quantize import Int8Linear, quantize_linear_weights


def random_mt5(layers):
    from transformers import MT5Config, MT5EncoderModel

    config = MT5Config(vocab_size=64, d_model=128, d_kv=16, d_ff=320, num_layers=layers, num_heads=8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MT5EncoderModel(config).eval().requires_grad_(False)


def size(module):
    return sum(tensor.numel() * tensor.element_size() for tensor in [*module.parameters(), *module.buffers()])


def error(states, exact):
    return ((states.float() - exact).norm() / exact.norm()).item()


def test_states_stay_close_in_half_the_memory():
    network = random_mt5(4)
    ids = torch.arange(60).reshape(2, 30)
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0

    def states(network):
        return network(input_ids=ids, attention_mask=mask).last_hidden_state

    exact, errors = states(network), {}
    for dtype, less in ((torch.float32, 3.8), (torch.bfloat16, 1.9)):
        plain = copy.deepcopy(network).to(dtype)
        small = copy.deepcopy(plain)
        quantize_linear_weights(small.encoder.block)
        assert size(plain.encoder.block) > less * size(small.encoder.block)
        assert states(small).dtype == dtype
        errors[dtype] = error(states(plain), exact), error(states(small), exact)
    assert errors[torch.float32][0] == 0 and 0.001 < errors[torch.float32][1] < 0.03
    assert errors[torch.bfloat16][1] < errors[torch.bfloat16][0] + 0.03
    # `wo`, to whose type T5 converts what comes into it, is in 8 bits too; norms and position biases are not.
    kinds = {name.split(".")[-1]: type(module) for name, module in small.encoder.block.named_modules()}
    assert all(kinds[name] is Int8Linear for name in ("q", "k", "v", "o", "wi_0", "wi_1", "wo"))
    assert kinds["relative_attention_bias"] is nn.Embedding
    assert sum(p.dtype == torch.int8 for p in small.parameters()) == 4 * 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_computes_what_torchaos_does(dtype, bias):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        layer = nn.Linear(48, 20, bias=bias, dtype=dtype)
        x = torch.randn(3, 5, 48, dtype=dtype)
    with torch.no_grad():
        layer.weight[7] = 0
    ours, theirs = nn.Sequential(copy.deepcopy(layer)), copy.deepcopy(layer)
    quantize_linear_weights(ours)
    quantize_(theirs, Int8WeightOnlyConfig(set_inductor_config=False))
    assert torch.equal(ours(x), theirs(x)) and ours(x).dtype == dtype
    (ours,) = ours
    assert ours.weight.dtype == torch.int8 and ours.scale.dtype == torch.float32
    # To the nearest step: no weight is off by more than half of one.
    steps = layer.weight.detach().float() / ours.scale[:, None] - ours.weight
    assert steps.abs().max() <= 0.51 and ours.weight.abs().max() >= 126


def test_on_meta_and_plain_tensors():
    network = random_mt5(1).to("meta")
    quantize_linear_weights(network.encoder.block)
    assert all(p.is_meta for p in network.parameters())
    real = random_mt5(1)
    quantize_linear_weights(real.encoder.block)
    assert size(network.encoder.block) == size(real.encoder.block)
    assert all(type(p.data) is torch.Tensor for p in real.parameters())
    restored = random_mt5(1)
    quantize_linear_weights(restored.encoder.block)
    restored.load_state_dict(real.state_dict())


def test_without_torchao(monkeypatch):
    layer = nn.Sequential(nn.Linear(2, 2))
    for missing in ("torchao", "torchao.quantization"):
        monkeypatch.setitem(sys.modules, missing, None)
        with pytest.raises(UserError, match=r"^--text_8bit needs the package torchao \(.*\): pip install torchao"):
            quantize_linear_weights(layer)
    assert type(layer[0]) is nn.Linear
