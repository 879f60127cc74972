"""Attention against float64 where the whole score matrix would not fit: exact, in chunks, gradients on samples.

For each set, chunks of queries meet all its keys in float64: that gives the output and log-sum-exp of every query, and
with them delta = sum(dout * out). The gradient of a query needs its own row of scores only, that of a key its own
column over all queries: rows and columns of sampled tokens are taken from the chunks as they pass.
dP = dout v^T, dS = P (dP - delta); dq = dS k / sqrt(D), dk = dS^T q / sqrt(D), dv = P^T dout.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from osp_fast.seeding import torch_generator

CHUNK_ELEMENTS = 1 << 27  # float64 scores in a chunk: 1 GiB
DENSE_ELEMENTS = 1 << 27  # scores up to which the plain float64 reference is taken
SAMPLES = 96
EDGE = 16  # tokens at each end that are always sampled: tails are where kernels go wrong
KNOWN = {"q", "k", "v", "mode", "sparse_n", "key_mask", "key_lengths"}


def too_large(inputs: dict[str, Any]) -> bool:
    """Whether a dense (B, H, N, M) matrix of scores would be too large for the plain reference."""
    batch, queries, heads, _ = inputs["q"].shape
    return batch * heads * queries * inputs["k"].shape[1] > DENSE_ELEMENTS


def compare_samples(
    inputs: dict[str, Any], found: dict[str, Tensor], cotangents: dict[str, Tensor], seed: int, samples: int = SAMPLES
) -> dict[str, tuple[Tensor, Tensor]]:
    """out, dq, dk, dv -> (found, expected): out of every query, gradients of sampled tokens, the same in every sample.

    found: the results of the operation, under those names; cotangents: "out" -> (B, N, H, D), as is out. Raises
    ValueError on an argument that is not one of `KNOWN`.
    """
    unknown = {name for name, value in inputs.items() if value is not None} - KNOWN
    if unknown:
        raise ValueError(f"the sampled check of attention does not know the arguments {sorted(unknown)}")
    q, k, v = (inputs[name].detach() for name in "qkv")
    rows = sample_tokens(q.shape[1], samples, seed, "queries").to(q.device)
    columns = sample_tokens(k.shape[1], samples, seed, "keys").to(q.device)
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    dq = torch.zeros_like(out)
    dk, dv = (torch.zeros(k.shape, dtype=torch.float64, device=q.device) for _ in range(2))
    for sample in range(q.shape[0]):
        visible = _visible(inputs, sample)
        for queries, keys in _sets(inputs):
            keys = keys[visible[keys]]
            if not len(keys):
                continue
            part = (q[sample], k[sample, keys].double(), v[sample, keys].double(), cotangents["out"][sample])
            into = (out[sample], dq[sample], dk[sample], dv[sample])
            chosen = torch.isin(keys, columns).nonzero()[:, 0]
            _one_set(part, queries, keys, torch.isin(queries, rows), chosen, into)
    expected = {"dq": dq[:, rows], "dk": dk[:, columns], "dv": dv[:, columns]}
    compared = {"out": (found["out"], out)}
    for name, value in expected.items():
        compared[name] = (found[name][:, rows if name == "dq" else columns], value)
    return compared


def sample_tokens(tokens: int, samples: int, seed: int, what: str) -> Tensor:
    """Ascending places of at most `samples` tokens: some at each end, the rest drawn; all if there are no more."""
    if tokens <= samples:
        return torch.arange(tokens)
    edge = min(EDGE, samples // 4)
    inner = torch.randperm(tokens - 2 * edge, generator=torch_generator("attention check", what, seed))
    places = torch.cat((torch.arange(edge), edge + inner[: samples - 2 * edge], torch.arange(tokens - edge, tokens)))
    return places.sort().values


def _one_set(
    part: tuple[Tensor, ...], queries: Tensor, keys: Tensor, row_wanted: Tensor, columns: Tensor, into: tuple
) -> None:
    """Add what one set of one sample contributes. part: q, k, v, dout; k, v (m, H, D) hold the visible keys alone."""
    q, k, v, cotangent = part
    out, dq, dk, dv = into
    k, v = k.transpose(0, 1), v.transpose(0, 1)  # (H, m, D)
    scale = q.shape[-1] ** -0.5
    chunk = max(1, CHUNK_ELEMENTS // (k.shape[0] * k.shape[1]))
    for start in range(0, len(queries), chunk):
        places = queries[start : start + chunk]
        q_part, cotangent_part = (x[places].double().transpose(0, 1) for x in (q, cotangent))  # (H, c, D)
        weights = (q_part * scale) @ k.transpose(1, 2)
        weights = weights.sub_(weights.logsumexp(2, keepdim=True)).exp_()
        out_part = weights @ v
        delta = (cotangent_part * out_part).sum(2, keepdim=True)
        out[places] = out_part.transpose(0, 1)

        wanted = row_wanted[start : start + chunk].nonzero()[:, 0]
        inner = weights[:, wanted] * (cotangent_part[:, wanted] @ v.transpose(1, 2) - delta[:, wanted])
        dq[places[wanted]] = (inner @ k).transpose(0, 1) * scale

        column_weights = weights[:, :, columns]
        inner = column_weights * (cotangent_part @ v[:, columns].transpose(1, 2) - delta)
        dk[keys[columns]] += (inner.transpose(1, 2) @ q_part).transpose(0, 1) * scale
        dv[keys[columns]] += (column_weights.transpose(1, 2) @ cotangent_part).transpose(0, 1)


def _sets(inputs: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """The places of the queries and of the keys of each set, from the definition of the sets."""
    device = inputs["q"].device
    queries, keys = (torch.arange(inputs[name].shape[1], device=device) for name in "qk")
    mode, sparse_n = inputs.get("mode", "full"), inputs.get("sparse_n", 4)
    if mode == "full":
        yield queries, keys
        return
    number = queries % sparse_n if mode == "single" else queries // sparse_n % sparse_n
    for skip_set in range(sparse_n):
        places = (number == skip_set).nonzero()[:, 0]
        yield places, places


def _visible(inputs: dict[str, Any], sample: int) -> Tensor:
    """(M,): the keys of one sample that may be seen."""
    keys = inputs["k"].shape[1]
    visible = torch.ones(keys, dtype=torch.bool, device=inputs["k"].device)
    if inputs.get("key_mask") is not None:
        visible &= inputs["key_mask"][sample].bool()
    if inputs.get("key_lengths") is not None:
        visible &= torch.arange(keys, device=visible.device) < inputs["key_lengths"][sample]
    return visible
