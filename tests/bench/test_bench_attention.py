"""The attention baselines and the sampled float64 check, against the operation's reference."""

import functools

import pytest
import torch
from osp_fast.kernels.skiparse_attention import skiparse_attention_ref
from torch.nn.attention import SDPBackend
from torch.nn.attention.flex_attention import flex_attention

from bench import attention_check
from bench.accuracy import in_float64, relative_error, results
from bench.baselines import Unavailable, baselines_of
from bench.baselines import skiparse_attention as others
from bench.baselines.skiparse_attention import (
    as_written,
    flex,
    gather,
    gathered,
    scatter,
    sdpa,
    visible_keys,
    with_additive_mask,
)

MATH = functools.partial(sdpa, SDPBackend.MATH)
CALLS = {
    "full": dict(tokens=20),
    "cross": dict(tokens=20, keys=13),
    "cross masked": dict(tokens=20, keys=13, masked=True),
    "single": dict(tokens=24, mode="single", sparse_n=4),
    "single with a tail": dict(tokens=26, mode="single", sparse_n=4),
    "group": dict(tokens=32, mode="group", sparse_n=4),
    "group with a tail": dict(tokens=39, mode="group", sparse_n=3),
    "group masked": dict(tokens=39, mode="group", sparse_n=3, masked=True),
    "one set": dict(tokens=7, mode="single", sparse_n=1),
}


def make_inputs(tokens, keys=None, mode="full", sparse_n=4, masked=False, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    keys = keys or tokens

    def draw(length):
        return torch.randn(2, length, 3, 6, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    inputs = {"q": draw(tokens), "k": draw(keys), "v": draw(keys), "mode": mode, "sparse_n": sparse_n}
    if masked:  # at least one key of every set stays: dense kernels give NaN without
        inputs["key_mask"] = (torch.rand(2, keys, generator=generator) < 0.7) | (torch.arange(keys) < sparse_n**2)
    return inputs


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("make_baseline", [as_written, gathered])
def test_baselines_and_their_gradients(name, make_baseline):
    inputs = make_inputs(**CALLS[name])
    baseline = make_baseline("SDPA", MATH)
    call, leaves = baseline.bind(inputs)
    out = baseline.restore(call(), inputs)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = results(skiparse_attention_ref, inputs, {"out": cotangent})
    assert relative_error(out, expected["out"]) < 1e-12
    skip = () if make_baseline is as_written else (inputs["mode"] if inputs["sparse_n"] > 1 else "full",)
    for x, gradient in zip("qkv", torch.autograd.grad(out, leaves, cotangent), strict=True):
        if skip:
            gradient = scatter(gradient, *skip, inputs["sparse_n"], 2, inputs[x].shape[1])
        assert relative_error(gradient, expected[f"d{x}"]) < 1e-12


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_sees_the_same_keys(name):
    inputs = {key: x.detach() if key in "qkv" else x for key, x in make_inputs(**CALLS[name]).items()}
    baseline = as_written("flex", functools.partial(flex, flex_attention))  # no backward on the CPU
    call, _ = baseline.bind(inputs)
    assert relative_error(call(), skiparse_attention_ref(**inputs)) < 1e-6


@pytest.mark.parametrize("mode", ["full", "single", "group"])
@pytest.mark.parametrize("tokens", [1, 8, 9, 30])
def test_scatter_undoes_gather(mode, tokens):
    x = torch.arange(2 * tokens * 3).view(2, tokens, 3)
    sets = gather(x, mode, 3)
    assert torch.equal(scatter(sets, mode, 3, 2, tokens), x)
    if mode == "single":
        assert torch.equal(sets[1, : len(range(1, tokens, 3))], x[0, 1::3])


def test_lengths_are_a_mask():
    inputs = make_inputs(tokens=5, keys=6)
    inputs["key_lengths"] = torch.tensor([2, 6])
    assert visible_keys(inputs).sum(1).tolist() == [2, 6]
    assert visible_keys(make_inputs(tokens=5, keys=6)) is None


def test_the_original_the_compiled_and_every_kernel_twice(monkeypatch):
    def names():
        return [(baseline.name, baseline.role) for baseline in baselines_of("skiparse_attention")]

    kernels = ["cuDNN SDPA", "flash SDPA", "efficient SDPA", "flex_attention"]
    twice = [
        (title, "peer") for name in kernels for title in (f"gather + {name} + scatter", f"{name}, gathered before")
    ]
    assert names() == [("reference", "reference"), ("strong", "strong"), *twice]
    monkeypatch.setattr(others, "installed", lambda name: print if name == "FlashAttention-3" else None)
    assert ("FlashAttention-3, gathered before", "peer") in names() and len(names()) == 12


@pytest.mark.parametrize("name", CALLS)
def test_the_mask_of_the_original_hides_what_it_should(name):
    inputs = make_inputs(**CALLS[name])
    baseline = as_written("reference", with_additive_mask, "reference")
    call, _ = baseline.bind(inputs)
    assert relative_error(call(), skiparse_attention_ref(**inputs)) < 1e-12
    assert torch.equal(call(), call())


def test_compiled_around_the_best_backend(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setitem(others.BACKENDS, "math", SDPBackend.MATH)
    for name in ("full", "group masked"):
        inputs = make_inputs(**CALLS[name], dtype=torch.float32)
        call, leaves = others.compiled_best().bind(inputs)
        out = call()
        assert relative_error(out, skiparse_attention_ref(**inputs)) < 1e-5
        assert all(x is not None for x in torch.autograd.grad(out.sum(), leaves))


def test_flash_attention_gets_tokens_before_heads_and_no_masks():
    def function(q, k, v):
        assert q.shape == (2 * 3, 13, 3, 6)  # sets, tokens, heads, channels
        found = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
        return found.transpose(1, 2), "log-sum-exp"

    make_attend = functools.partial(others.flash_attention, "FlashAttention-3", function)
    inputs = make_inputs(tokens=39, mode="single", sparse_n=3)
    call, _ = as_written("x", make_attend).bind(inputs)
    assert relative_error(call(), skiparse_attention_ref(**inputs)) < 1e-12
    with pytest.raises(Unavailable, match="FlashAttention-3 takes no mask"):
        as_written("x", make_attend).bind(make_inputs(tokens=39, mode="group", sparse_n=3))


def test_a_kernel_that_the_device_lacks_says_why():
    inputs = make_inputs(tokens=8)
    (cudnn,) = [one for one in baselines_of("skiparse_attention") if one.name == "cuDNN SDPA, gathered before"]
    call, _ = cudnn.bind(inputs)
    with pytest.raises(Unavailable, match="."):
        call()
    with pytest.raises(Unavailable, match="novelty"):
        cudnn.bind({**inputs, "novelty": 1})


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("samples", [6, 1000])
def test_the_sampled_check_is_the_float64_reference(name, samples, monkeypatch):
    monkeypatch.setattr(attention_check, "CHUNK_ELEMENTS", 100)  # several chunks of queries
    inputs = make_inputs(**CALLS[name], dtype=torch.float32)
    cotangent = torch.randn(inputs["q"].shape, generator=torch.Generator().manual_seed(1))
    expected = results(skiparse_attention_ref, in_float64(inputs), {"out": cotangent})
    compared = attention_check.compare_samples(inputs, expected, {"out": cotangent}, seed=3, samples=samples)
    assert set(compared) == {"out", "dq", "dk", "dv"}
    for found, sampled in compared.values():
        assert found.shape == sampled.shape and relative_error(found, sampled) < 1e-12
    assert compared["dk"][0].shape[1] == min(samples, inputs["k"].shape[1])


def test_invisible_keys_and_lengths_in_the_sampled_check():
    inputs = make_inputs(tokens=9, keys=6)
    inputs["key_lengths"] = torch.tensor([4, 0])
    masked = {**inputs, "key_lengths": None, "key_mask": torch.arange(6) < inputs["key_lengths"][:, None]}
    cotangent = torch.ones(inputs["q"].shape, dtype=torch.float64)
    del masked["key_lengths"]
    expected = results(skiparse_attention_ref, masked, {"out": cotangent})
    compared = attention_check.compare_samples(inputs, expected, {"out": cotangent}, seed=3)
    assert max(relative_error(*pair) for pair in compared.values()) < 1e-12
    assert not compared["out"][1][1].any() and not compared["dv"][1][0, 4:].any()


def test_the_sampled_check_sees_one_wrong_token_at_either_end():
    inputs = make_inputs(tokens=80, mode="single", sparse_n=3)
    cotangent = torch.ones(inputs["q"].shape, dtype=torch.float64)
    for token in (0, 79):
        for name in ("out", "dq", "dk", "dv"):
            found = results(skiparse_attention_ref, inputs, {"out": cotangent})
            found[name][1, token] *= 2
            compared = attention_check.compare_samples(inputs, found, {"out": cotangent}, seed=3, samples=40)
            wrong = [key for key, pair in compared.items() if relative_error(*pair) > 1e-6]
            assert wrong == [name]


def test_sampled_tokens_hold_both_ends():
    places = attention_check.sample_tokens(1000, 96, 5, "keys").tolist()
    assert len(set(places)) == 96 and places == sorted(places)
    assert set(range(16)) | set(range(984, 1000)) <= set(places)


def test_unknown_arguments_end_the_sampled_check():
    inputs = make_inputs(tokens=9)
    with pytest.raises(ValueError, match="novelty"):
        attention_check.compare_samples({**inputs, "novelty": 1}, {}, inputs["q"], seed=0)


def test_a_gather_that_is_a_view_copies_nothing():
    q = torch.randn(1, 12, 3, 2, 8)[:, :, 0]
    sets = gather(q, "single", 4)
    assert sets.data_ptr() == q.data_ptr() and sets.shape == (4, 3, 2, 8)
