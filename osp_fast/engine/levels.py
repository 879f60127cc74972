"""How much of a block forward keeps for backward: five levels, each a context for `torch.utils.checkpoint`.

What an output is worth keeping is the work, for each of its bytes, that making it again takes: of attention twice the
keys that a token sees, of a product its inner dimension. Tokens of a long clip see tens of thousands of others, the
feed-forward's second product sums over 4 d channels, all other products over d, and tokens of text are a few hundred.
The levels keep them in this order.

Source: Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models".
"""

from collections.abc import Callable
from enum import IntEnum
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

import osp_fast.kernels.rope3d
import osp_fast.kernels.skiparse_attention  # noqa: F401
from osp_fast.models.dit_block import Recompute

aten = torch.ops.aten
# Attention as it is dispatched -> the axis of q and k that counts tokens.
ATTENTION = {
    torch.ops.osp_fast.skiparse_attention.default: 1,
    aten._scaled_dot_product_flash_attention.default: 2,
    aten._scaled_dot_product_efficient_attention.default: 2,
    aten._scaled_dot_product_cudnn_attention.default: 2,
    aten._scaled_dot_product_flash_attention_for_cpu.default: 2,
}
# The flash-attn package's operations, which are there only where it is installed.
FLASH_ATTENTION = {"flash_attn::_flash_attn_forward": 1, "flash_attn::_flash_attn_varlen_forward": 0}
# Products x (M, K) by w (K, N) -> which arguments are x and w. Linear layers arrive as these, also under autocast.
PRODUCTS = {aten.mm.default: (0, 1), aten.addmm.default: (1, 2), aten._scaled_mm.default: (0, 1)}
# Rotates q and k inside of the product's output. Where that output is kept it is kept rotated: to run it again on it
# would rotate twice, so it counts as done.
IN_PLACE = torch.ops.osp_fast.rope3d_.default
WIDENS = 8  # times its inputs: a product with more outputs is taken for an adapter's


class Level(IntEnum):
    """What a block keeps of its forward pass, from the least memory to the most.

    NOTHING: its inputs; all else is recomputed
    ATTENTION: the output of self-attention
    NARROW: also products with fewer outputs than inputs: the feed-forward's second
    PRODUCTS: all products and cross-attention; norms, activations and rotations are recomputed
    EVERYTHING: all that backward needs
    """

    NOTHING = 0
    ATTENTION = 1
    NARROW = 2
    PRODUCTS = 3
    EVERYTHING = 4

    @property
    def words(self) -> str:
        """What is kept, for a reader."""
        return _WORDS[self]

    def recompute(self, adapters: bool = False) -> Recompute | None:
        """For `DiT.recompute_blocks`: picklable, for eager and compiled blocks alike.

        adapters: whether products have LoRA's beside them (`has_lora`)
        """
        return _WITH_ADAPTERS if adapters and self == Level.PRODUCTS else _RECOMPUTE[self]


_WORDS = {
    Level.NOTHING: "nothing",
    Level.ATTENTION: "attention",
    Level.NARROW: "attention and the last product",
    Level.PRODUCTS: "attention and products",
    Level.EVERYTHING: "everything",
}


def keep_nothing(ctx: Any, op: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    """Policy of `Level.NOTHING`. (`noop_context_fn`, which does the same in eager mode, Dynamo does not take.)"""
    return CheckpointPolicy.PREFER_RECOMPUTE


def keep_attention(ctx: Any, op: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    """Policy of `Level.ATTENTION`."""
    return _policy(_is_self_attention(op, arguments))


def keep_narrow(ctx: Any, op: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    """Policy of `Level.NARROW`."""
    return _policy(_is_self_attention(op, arguments) or (op in PRODUCTS and _narrows(op, arguments)))


def keep_products(ctx: Any, op: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    """Policy of `Level.PRODUCTS`."""
    return _policy(op in PRODUCTS or op is IN_PLACE or _token_axis(op) is not None)


def keep_products_with_adapters(ctx: Any, op: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    """Policy of `Level.PRODUCTS` where adapters add to products: the sum is rotated and not the product that is kept.

    An adapter's second product is not kept: it widens, by more than a feed-forward's, and so is cheap for its size.
    """
    keeps = op in PRODUCTS and _narrows(op, arguments, by=1 / WIDENS)
    return _policy(keeps or _token_axis(op) is not None)


def _policy(keep: bool) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def _token_axis(op: Any) -> int | None:
    """The axis of tokens in an attention's q and k; None of any other operation."""
    if op in ATTENTION:
        return ATTENTION[op]
    return FLASH_ATTENTION.get(op.name()) if getattr(op, "namespace", None) == "flash_attn" else None


def _is_self_attention(op: Any, arguments: tuple) -> bool:
    """Whether tokens attend to as many others as they are; those of the text are of another number."""
    axis = _token_axis(op)
    return axis is not None and arguments[0].shape[axis] == arguments[1].shape[axis]


def _narrows(op: Any, arguments: tuple, by: float = 1.0) -> bool:
    """Whether a product has more than `by` times as many inputs as outputs."""
    weight: Tensor = arguments[PRODUCTS[op][1]]
    return bool(weight.shape[0] > by * weight.shape[1])


def _selective(policy: Callable[..., CheckpointPolicy]) -> Recompute:
    # What is kept may be changed in place: IN_PLACE does it.
    return partial(create_selective_checkpoint_contexts, policy, allow_cache_entry_mutation=True)


_RECOMPUTE: dict[Level, Recompute | None] = {
    Level.NOTHING: _selective(keep_nothing),
    Level.ATTENTION: _selective(keep_attention),
    Level.NARROW: _selective(keep_narrow),
    Level.PRODUCTS: _selective(keep_products),
    Level.EVERYTHING: None,
}
_WITH_ADAPTERS = _selective(keep_products_with_adapters)
