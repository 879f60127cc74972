"""The diffusion transformer of Open-Sora-Plan v1.3: AdaLN-single blocks with skiparse attention and 3D RoPE.

Shape suffixes: b batch, c latent channels, t frames, h rows, w columns, n tokens, d width = heads * head dimension.
Parameters of one product are fused (q, k, v; k, v of the text); checkpoints keep them apart under their own names.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from osp_fast.kernels.adaln import gate_residual, gate_residual_norm_modulate, norm_modulate
from osp_fast.kernels.rope3d import Rope3D, make_rope3d
from osp_fast.models.attention import CrossAttention, SelfAttention, TextKeys, VisibleKeys, describe_attention
from osp_fast.models.attention_backends import select_attention
from osp_fast.models.dit_checkpoint import checkpoint_place
from osp_fast.models.patches import PatchEmbedding, unpatchify
from osp_fast.models.time_embedding import TimeContext, TimeEmbedding
from osp_fast.models.token_exchange import TokenExchange
from osp_fast.models.weights import PretrainedModel
from osp_fast.seeding import torch_generator

# Blocks strictly between these are skiparse: part of the architecture, whatever the number of layers.
FIRST_DENSE, LAST_DENSE = 1, 30
HEAD_NORM_EPS = 1e-6
MAX_LAYERS = 1000


@dataclass(frozen=True)
class DiTConfig:
    """The architecture, under the names of config.json; the defaults are the released 2.7 B model's."""

    num_layers: int = 32
    num_attention_heads: int = 24
    attention_head_dim: int = 96
    in_channels: int = 8
    out_channels: int = 8
    patch_size_t: int = 1
    patch_size: int = 2
    caption_channels: int = 4096
    cross_attention_dim: int | None = 2304  # always the width; kept for config.json
    norm_eps: float = 1e-6
    norm_elementwise_affine: bool = False
    sparse1d: bool = True
    sparse_n: int = 4
    interpolation_scale_t: float = 1.0
    interpolation_scale_h: float = 1.0
    interpolation_scale_w: float = 1.0
    sample_size_t: Any = None  # latent size of the training data; informative
    sample_size_h: Any = None
    sample_size_w: Any = None

    def __post_init__(self) -> None:
        if self.num_layers > MAX_LAYERS:
            raise ValueError(f"num_layers {self.num_layers} is more than {MAX_LAYERS}: correct the file")
        if self.attention_head_dim % 6:
            raise ValueError(f"attention_head_dim {self.attention_head_dim} is not a multiple of 6, as 3D RoPE needs")
        if self.cross_attention_dim not in (None, self.width):
            raise ValueError(f"cross_attention_dim {self.cross_attention_dim} is not the width {self.width}")

    @property
    def width(self) -> int:
        """d, the channels of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def patch(self) -> tuple[int, int, int]:
        """Latent cells of a token in (t, h, w)."""
        return self.patch_size_t, self.patch_size, self.patch_size

    def attention_mode(self, block: int) -> str:
        """full, single or group: how block number `block` (from 0) attends."""
        if not self.sparse1d or not FIRST_DENSE < block < LAST_DENSE:
            return "full"
        return "group" if block % 2 else "single"


DIT_CONFIGS = {
    "OpenSoraT2V_v1_3-2B/122": DiTConfig(),
    "tiny": DiTConfig(
        num_layers=5, num_attention_heads=3, attention_head_dim=48, caption_channels=64, cross_attention_dim=144
    ),
}


# Makes the two contexts, of forward and of recomputation, that `torch.utils.checkpoint` works in (its `context_fn`).
Recompute = Callable[[], tuple[AbstractContextManager, AbstractContextManager]]


class Pending(NamedTuple):
    """What the last layer made and is still to be added to the residual stream: x + gate * y.

    The norm that follows adds it, in the same pass over memory. y (B, N, d), gate (B, d) or None for 1.
    """

    y: Tensor
    gate: Tensor | None


class TextContext(NamedTuple):
    """What the DiT needs of a text, whatever the timestep: each block's `TextKeys`, and which text tokens are real."""

    keys: tuple[TextKeys, ...]
    tokens: VisibleKeys


class StepCache(Protocol):
    """Decides in each call of the DiT whether the blocks behind the first one run, or what they did before serves."""

    def __call__(self, x: Tensor, first: Callable[[Tensor], Tensor], rest: Callable[[Tensor], Tensor]) -> Tensor:
        """x (B, N, d), the tokens; first: the first block; rest: all others. Returns what all of them make of x."""


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward."""

    def __init__(self, config: DiTConfig, index: int):
        super().__init__()
        width, heads = config.width, config.num_attention_heads
        self.scale_shift_table = nn.Parameter(torch.empty(6, width))
        self.norm1 = nn.LayerNorm(width, config.norm_eps, elementwise_affine=config.norm_elementwise_affine)
        self.self_attention = SelfAttention(width, heads, config.attention_mode(index), config.sparse_n)
        self.cross_attention = CrossAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, config.norm_eps, elementwise_affine=config.norm_elementwise_affine)
        self.ff = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.recompute: Recompute | None = None

    def forward(
        self,
        x: Tensor,
        pending: Pending | None,
        time: Tensor,
        rope: Rope3D,
        tokens: VisibleKeys,
        text: Tensor | TextKeys,
        text_tokens: VisibleKeys,
    ) -> tuple[Tensor, Pending | None]:
        """x (B, N, d) and what is still to be added to it; time (B, 6, d), text (B, L, d); which of N and L are real.

        In place of the text there may be what `text_keys` made of it.

        Returns the residual stream in x's dtype, without the feed-forward's part, and that part. With `recompute` the
        part is added here: between blocks one tensor is kept then instead of two, at the price of a pass of its own.
        """
        arguments = (x, pending, time, rope, tokens, text, text_tokens)
        if self.recompute is None or not torch.is_grad_enabled():
            return self._forward(*arguments, finish=False)
        options = dict(use_reentrant=False, preserve_rng_state=False)
        if self.recompute is not noop_context_fn:  # the default, which torch.compile takes only unsaid
            options["context_fn"] = self.recompute
        return checkpoint(self._forward, *arguments, True, **options)

    def text_keys(self, text: Tensor) -> TextKeys:
        """Keys and values of the text (B, L, d) in cross-attention: they depend on nothing else."""
        return self.cross_attention.text_keys(text)

    def _forward(
        self,
        x: Tensor,
        pending: Pending | None,
        time: Tensor,
        rope: Rope3D,
        tokens: VisibleKeys,
        text: Tensor | TextKeys,
        text_tokens: VisibleKeys,
        finish: bool,
    ) -> tuple[Tensor, Pending | None]:
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = time.unbind(1)
        table = self.scale_shift_table.unbind(0)
        x, normed = _add_norm_modulate(x, pending, (shift_a, scale_a), table[0:2], self.norm1)
        x = gate_residual(x, gate_a, self.self_attention(normed, rope, tokens), gate_table=table[2])
        added = Pending(self.cross_attention(x, text, text_tokens), None)
        x, normed = _add_norm_modulate(x, added, (shift_f, scale_f), table[3:5], self.norm2)
        if finish:
            return gate_residual(x, gate_f, self.ff(normed), gate_table=table[5]), None
        # The sum with the table's row is made here, in float32 as in the operation: the next block must not need this
        # one's parameters.
        return x, Pending(self.ff(normed), gate_f + table[5].to(torch.promote_types(x.dtype, torch.float32)))


def _add_norm_modulate(
    x: Tensor, pending: Pending | None, vectors: Sequence[Tensor], rows: Sequence[Tensor], norm: nn.LayerNorm
) -> tuple[Tensor, Tensor]:
    """x with what was pending added, and its norm modulated, in the dtype that products take.

    vectors: shift and scale of each sample, (B, d); rows: of the table, (d,), added to them.
    """
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    options = dict(shift_table=rows[0], scale_table=rows[1], weight=norm.weight, bias=norm.bias, dtype=dtype)
    if pending is None:
        return x, norm_modulate(x, *vectors, norm.eps, **options)
    return gate_residual_norm_modulate(x, pending.gate, pending.y, *vectors, norm.eps, **options)


def _settled(x: Tensor, pending: Pending | None) -> Tensor:
    """x with what was pending added."""
    return x if pending is None else gate_residual(x, pending.gate, pending.y)


class DiT(PretrainedModel):
    """The diffusion transformer; construct with `DiT.create` (fresh weights) or `DiT.from_pretrained`.

    `recompute_blocks` says what is recomputed in backward; `rope_dtype` rounds RoPE angles to a 16-bit type, as the
    released checkpoints were trained (None: float32 angles).
    """

    class_name = "OpenSoraT2V_v1_3"
    config_class = DiTConfig
    fixed_config: ClassVar = dict(
        activation_fn="gelu-approximate",
        attention_bias=True,
        double_self_attention=False,
        dropout=0.0,
        only_cross_attention=False,
        upcast_attention=False,
    )

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        self.rope_dtype: torch.dtype | None = None
        self.exchange: TokenExchange | None = None
        width = config.width
        self.patch_embed = PatchEmbedding(config.in_channels, width, config.patch)
        self.time_embed = TimeEmbedding(width)
        self.text_embed = nn.Sequential(
            nn.Linear(config.caption_channels, width), nn.GELU(approximate="tanh"), nn.Linear(width, width)
        )
        self.transformer_blocks = nn.ModuleList(Block(config, index) for index in range(config.num_layers))
        self.norm_out = nn.LayerNorm(width, HEAD_NORM_EPS, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.empty(2, width))
        self.proj_out = nn.Linear(width, math.prod(config.patch) * config.out_channels)

    @classmethod
    def create(cls, config: DiTConfig, seed: int, device: torch.device | str = "cpu") -> "DiT":
        """A fresh float32 model; its weights depend on config and seed only."""
        with torch.device("meta"):
            model = cls(config)
        model.to_empty(device=device)
        model.init_weights(seed)
        return model

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Xavier for products, small normals for the time embedding, zeros where a block must start as an identity."""
        # Each fused product is drawn part by part, so that fusing does not change the fan-in or fan-out.
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Conv3d):
                parts = 3 if name.endswith("qkv") else 2 if name.endswith("kv") else 1
                for i, part in enumerate(module.weight.chunk(parts)):
                    drawn = torch.empty(part.shape)
                    generator = torch_generator("init", seed, name, i)
                    if name.startswith("time_embed"):
                        nn.init.normal_(drawn, std=0.02, generator=generator)
                    elif name.endswith("cross_attention.out") or name == "proj_out":
                        nn.init.zeros_(drawn)
                    else:
                        nn.init.xavier_uniform_(drawn.flatten(1), generator=generator)
                    part.copy_(drawn)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
                module.reset_parameters()
        for name, parameter in self.named_parameters():
            if name.endswith("scale_shift_table"):
                drawn = torch.randn(parameter.shape, generator=torch_generator("init", seed, name))
                parameter.copy_(drawn / self.config.width**0.5)

    def use_attention(self, name: str, device: torch.device | None = None, dtype: torch.dtype | None = None) -> "DiT":
        """Choose what computes attention: auto, triton, sdpa, flash or reference (`--attention`). Returns the model.

        It will run on `device` in `dtype`, by default those of the weights; autocast or a later move may say otherwise.
        Raises `UserError` where the choice cannot serve. Until this is called each call goes by its device.
        """
        weight = self.proj_out.weight
        backend = select_attention(name, device or weight.device, dtype or weight.dtype, self.config.attention_head_dim)
        for block in self.transformer_blocks:
            block.self_attention.backend = block.cross_attention.backend = backend
        return self

    def share_tokens(self, exchange: TokenExchange | None) -> "DiT":
        """Compute a part of each clip's tokens, other ranks the rest; None: all here. Returns the model.

        All that `forward` is given, and what it returns, stays that of the whole clip.
        """
        self.exchange = exchange
        for block in self.transformer_blocks:
            block.self_attention.exchange = exchange
        return self

    def recompute_blocks(self, recompute: Sequence[Recompute | None] | Recompute | None) -> "DiT":
        """What each block (or every block) recomputes in backward instead of keeping it. Returns the model.

        None: nothing; `noop_context_fn` of `torch.utils.checkpoint`: everything; what
        `create_selective_checkpoint_contexts` makes of a policy: what the policy does not save.
        """
        blocks = self.transformer_blocks
        each = recompute if isinstance(recompute, Sequence) else [recompute] * len(blocks)
        for block, context_fn in zip(blocks, each, strict=True):
            block.recompute = context_fn
        return self

    def attention_summary(self) -> str:
        """Which attention serves which block, in words."""
        return describe_attention((block.self_attention, block.cross_attention) for block in self.transformer_blocks)

    def text_context(self, text: Tensor, text_mask: Tensor | None = None) -> TextContext:
        """Once for each prompt what depends on its text alone.

        text (B, L, caption_channels); text_mask (B, L), 1 = real token. 2 B L d numbers for each block.
        """
        embedded = self.text_embed(text)
        keys = tuple(block.text_keys(embedded) for block in self.transformer_blocks)
        return TextContext(keys, VisibleKeys.from_mask(text_mask))

    def time_context(self, timesteps: Tensor) -> TimeContext:
        """What depends on timesteps (S,), 0..999, alone: all steps' in one call."""
        return self.time_embed(timesteps)

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor | TimeContext,
        text: Tensor | TextContext,
        text_mask: Tensor | None = None,
        latent_mask: Tensor | None = None,
        step_cache: StepCache | None = None,
    ) -> Tensor:
        """Predict noise, velocity or sample.

        latents (B, C, T, H, W); timestep (B,), 0..999; text (B, L, caption_channels); text_mask (B, L), 1 = real token;
        latent_mask (B, T, H, W), 1 = real cell. In place of the timestep and of the text (with its mask) there may be
        what `time_context` and `text_context` made of them. Returns (B, C_out, T, H, W). Raises ValueError if the
        latents do not divide into patches.
        """
        patch = self.config.patch
        size = tuple(length // p for length, p in zip(latents.shape[2:], patch, strict=True))
        if any(length % p for length, p in zip(latents.shape[2:], patch, strict=True)):
            raise ValueError(f"latents of (T, H, W) = {tuple(latents.shape[2:])} do not divide into patches of {patch}")
        x = self.patch_embed(latents, self.exchange)
        time = timestep if isinstance(timestep, TimeContext) else self.time_embed(timestep)
        if isinstance(text, TextContext):
            texts, text_tokens = text
        else:
            texts = (self.text_embed(text),) * len(self.transformer_blocks)
            text_tokens = VisibleKeys.from_mask(text_mask)
        scales = (
            self.config.interpolation_scale_t,
            self.config.interpolation_scale_h,
            self.config.interpolation_scale_w,
        )
        rope = make_rope3d(size, self.config.attention_head_dim, scales, latents.device, self.rope_dtype)
        token_mask = None
        if latent_mask is not None:
            token_mask = F.max_pool3d(latent_mask[:, None].float(), patch).flatten(1).bool()
        tokens = VisibleKeys.from_mask(token_mask)

        def run(x: Tensor, first: int, last: int | None) -> tuple[Tensor, Pending | None]:
            pending = None
            for block, text in zip(self.transformer_blocks[first:last], texts[first:last], strict=True):
                x, pending = block(x, pending, time.modulation, rope, tokens, text, text_tokens)
            return x, pending

        if step_cache is None:
            x, pending = run(x, 0, None)
        else:
            x, pending = step_cache(x, lambda x: _settled(*run(x, 0, 1)), lambda x: _settled(*run(x, 1, None))), None
        rows = self.scale_shift_table.unbind(0)
        _, x = _add_norm_modulate(x, pending, (time.embedded, time.embedded), rows, self.norm_out)
        y = self.proj_out(x)
        return unpatchify(y if self.exchange is None else self.exchange.gather(y, math.prod(size)), size, patch)

    def to_checkpoint(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Fused parameters -> one tensor per product, under the names of released checkpoints."""
        tensors = {}
        for name, tensor in state.items():
            prefix, names, kind = checkpoint_place(name)
            if name == "patch_embed.weight" and self.config.patch_size_t == 1:
                tensor = tensor.squeeze(2)
            for target, part in zip(names, tensor.chunk(len(names)), strict=True):
                tensors[f"{prefix}{target}{kind}"] = part
        return tensors

    def from_checkpoint(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `to_checkpoint`."""
        state = {}
        for name in self.state_dict():
            prefix, names, kind = checkpoint_place(name)
            parts = [tensors[f"{prefix}{target}{kind}"] for target in names]
            state[name] = parts[0] if len(parts) == 1 else torch.cat(parts)
            if name == "patch_embed.weight" and self.config.patch_size_t == 1:
                state[name] = state[name].unsqueeze(2)
        return state
