"""What computes skiparse attention in the DiT: one function for each value of `--attention`.

| name | what runs |
|---|---|
| triton | the operation of `kernels/skiparse_attention.py`, straight from the projections' layout |
| sdpa | sets gathered, PyTorch's fused attention kernels (cuDNN, flash, memory-efficient), scattered back |
| flash | sets gathered, the optional flash-attn package, scattered back |
| reference | the operation's reference in plain PyTorch |

auto is triton or reference, as `OSP_FAST_KERNELS` and the device say. All take and return the same as the operation.

Shape suffixes: b batch, n queries, m keys, l tokens of a set, s sets, h heads, d head dimension.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from osp_fast.errors import UserError
from osp_fast.kernels.launch import interpreting, selected_path
from osp_fast.kernels.skiparse_attention import (
    serving_version,
    skiparse_attention,
    skiparse_attention_ref,
    skiparse_attention_triton,
)
from osp_fast.models.gather import merge_sets, pack_keys, split_sets, visible_keys, with_all_where_none

# (q, k, v, mode, sparse_n, key_mask, key_lengths) -> (B, N, H, D); see `skiparse_attention`.
AttentionFunction = Callable[[Tensor, Tensor, Tensor, str, int, Tensor | None, Tensor | None], Tensor]
FUSED = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]


@dataclass(frozen=True)
class AttentionBackend:
    """One way to compute attention, chosen for a device, a dtype and a head dimension.

    name: as `--attention` has it
    function: computes attention
    version: (mode, sparse_n) -> what runs for such a call, in a word or two
    """

    name: str
    function: AttentionFunction
    version: Callable[[str, int], str]


# What a layer has before a backend is chosen for it: the operation, which looks at each call's device.
BY_DEVICE = AttentionBackend("auto", skiparse_attention, lambda mode, sparse_n: "by device")


def resolve_attention(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """`--attention` as the name of one backend, checked against where and in which dtype attention will run.

    Raises `UserError` where the backend cannot serve, or `OSP_FAST_KERNELS` asks for what is not there.
    """
    try:
        path = selected_path(device)
    except ValueError as error:
        raise UserError(str(error)) from None
    if name == "auto":
        name = path
    if name == "triton" and device.type != "cuda" and not interpreting():
        raise UserError(f"--attention triton needs an NVIDIA GPU, not the {device.type}: use --attention reference")
    if name == "flash":
        if device.type != "cuda":
            raise UserError(f"--attention flash needs an NVIDIA GPU, not the {device.type}: use --attention sdpa")
        if dtype not in (torch.float16, torch.bfloat16):
            raise UserError(
                f"--attention flash takes 16-bit numbers, not {str(dtype).removeprefix('torch.')}: add"
                " --mixed_precision bf16 (training) or --dtype bf16 (sampling), or use --attention sdpa"
            )
        load_flash()
    return name


def select_attention(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> AttentionBackend:
    """The backend that `--attention` names, for attention on `device` in `dtype`. Raises `UserError`."""
    name = resolve_attention(name, device, dtype)
    if name == "triton":
        try:
            serving_version(device, dtype, head_dim, "full", 1)
        except ValueError as error:
            raise UserError(f"--attention triton: {error}; use --attention sdpa") from None
        return AttentionBackend(name, skiparse_attention_triton, partial(serving_version, device, dtype, head_dim))
    if name == "flash":
        function = load_flash()
        return AttentionBackend(name, function, lambda mode, sparse_n: f"flash-attn {function.version}")
    if name == "sdpa":
        return AttentionBackend(name, sdpa_attention, lambda mode, sparse_n: "fused PyTorch kernels")
    return AttentionBackend(name, skiparse_attention_ref, lambda mode, sparse_n: "plain PyTorch")


def sdpa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mode: str = "full",
    sparse_n: int = 4,
    key_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
) -> Tensor:
    """Gather, PyTorch's `scaled_dot_product_attention` without its unfused fallback, scatter.

    Sets of equal length are one call, as further heads; an uneven N makes one call more for each other length, and no
    mask. `key_mask` and `key_lengths` become one vector for each set. Raises RuntimeError if no fused kernel serves.
    """
    visible = visible_keys(k, key_mask, key_lengths)
    tensors = [split_sets(x, mode, sparse_n) for x in (q, k, v)]
    masks = [None] * len(tensors[0]) if visible is None else split_sets(visible, mode, sparse_n)
    outs = []
    for q_blshd, k_bmshd, v_bmshd, visible_bms in zip(*tensors, masks, strict=True):
        heads = q_blshd.shape[2:4]
        q_bhld, k_bhmd, v_bhmd = (x.flatten(2, 3).transpose(1, 2) for x in (q_blshd, k_bmshd, v_bmshd))
        mask = sees_any = None
        if visible_bms is not None:
            seen, sees_any = with_all_where_none(visible_bms)
            mask = seen.transpose(1, 2)[:, :, None].expand(-1, -1, heads[1], -1).flatten(1, 2)[:, :, None]
        with sdpa_kernel(FUSED):
            out_bhld = F.scaled_dot_product_attention(q_bhld, k_bhmd, v_bhmd, attn_mask=mask)
        out_blshd = out_bhld.transpose(1, 2).unflatten(2, heads)
        outs.append(out_blshd if sees_any is None else torch.where(sees_any[:, None, :, None, None], out_blshd, 0.0))
    return merge_sets(outs, mode, sparse_n, q.shape[1])


@dataclass(frozen=True)
class FlashAttention:
    """Gather, the flash-attn package, scatter.

    Without bounds on the keys every set of one length is a further head of `dense`. With them the sets become packed
    sequences of `varlen`, whose keys are the visible ones alone.

    dense: flash_attn_func, or what computes the same
    varlen: flash_attn_varlen_func, or what computes the same
    version: of the package
    """

    dense: Callable[..., Tensor]
    varlen: Callable[..., Tensor]
    version: str

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mode: str = "full",
        sparse_n: int = 4,
        key_mask: Tensor | None = None,
        key_lengths: Tensor | None = None,
    ) -> Tensor:
        visible = visible_keys(k, key_mask, key_lengths)
        tensors = [split_sets(x, mode, sparse_n) for x in (q, k, v)]
        if visible is None:
            outs = [self._dense(*parts) for parts in zip(*tensors, strict=True)]
        else:
            masks = split_sets(visible, mode, sparse_n)
            outs = [self._varlen(*parts) for parts in zip(*tensors, masks, strict=True)]
        return merge_sets(outs, mode, sparse_n, q.shape[1])

    def _dense(self, q_blshd: Tensor, k_bmshd: Tensor, v_bmshd: Tensor) -> Tensor:
        q_blhd, k_bmhd, v_bmhd = (x.flatten(2, 3) for x in (q_blshd, k_bmshd, v_bmshd))
        out_blhd = self.dense(q_blhd, k_bmhd, v_bmhd, deterministic=torch.are_deterministic_algorithms_enabled())
        return out_blhd.unflatten(2, q_blshd.shape[2:4])

    def _varlen(self, q_blshd: Tensor, k_bmshd: Tensor, v_bmshd: Tensor, visible_bms: Tensor) -> Tensor:
        seen, sees_any = with_all_where_none(visible_bms)
        batch, queries, sets = q_blshd.shape[:3]
        seen = seen.transpose(1, 2).flatten(0, 1)
        key_bounds, rows = pack_keys((k_bmshd, v_bmshd), seen)
        out = self.varlen(
            q_blshd.transpose(1, 2).flatten(0, 2),
            *rows,
            torch.arange(batch * sets + 1, dtype=torch.int32, device=seen.device) * queries,
            key_bounds,
            queries,
            seen.shape[1],
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        out_blshd = out.unflatten(0, (batch, sets, queries)).transpose(1, 2)
        return torch.where(sees_any[:, None, :, None, None], out_blshd, 0.0)


def load_flash() -> FlashAttention:
    """The flash-attn package's functions. Raises `UserError` if it is not installed or does not load."""
    try:
        import flash_attn
    except ImportError as error:
        raise UserError(
            f"--attention flash: the flash-attn package cannot be imported ({error}): pip install flash-attn, or use"
            " --attention sdpa"
        ) from None
    return FlashAttention(flash_attn.flash_attn_func, flash_attn.flash_attn_varlen_func, flash_attn.__version__)
