"""The diffusion transformer of Open-Sora-Plan v1.3: AdaLN-single blocks with skiparse attention and 3D RoPE.

Shape suffixes: b batch, c latent channels, t frames, h rows, w columns, n tokens, d width = heads * head dimension.
Parameters of one product are fused (q, k, v; k, v of the text); checkpoints keep them apart under their own names.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from osp_fast.kernels.rope3d import Rope3D, make_rope3d
from osp_fast.models.attention import TextKeys, VisibleKeys, describe_attention
from osp_fast.models.attention_backends import select_attention
from osp_fast.models.dit_block import Block, Pending, Recompute, add_norm_modulate, settled
from osp_fast.models.dit_checkpoint import checkpoint_place
from osp_fast.models.patches import PatchEmbedding, unpatchify
from osp_fast.models.time_embedding import TimeContext, TimeEmbedding
from osp_fast.models.token_exchange import SharedTokens, TokenExchange
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

    def block(self, index: int) -> Block:
        """Block number `index`, with weights that are not set yet."""
        mode, heads = self.attention_mode(index), self.num_attention_heads
        return Block(self.width, heads, mode, self.sparse_n, self.norm_eps, self.norm_elementwise_affine)


DIT_CONFIGS = {
    "OpenSoraT2V_v1_3-2B/122": DiTConfig(),
    "tiny": DiTConfig(
        num_layers=5, num_attention_heads=3, attention_head_dim=48, caption_channels=64, cross_attention_dim=144
    ),
}


class TextContext(NamedTuple):
    """What the DiT needs of a text, whatever the timestep: each block's `TextKeys`, and which text tokens are real."""

    keys: tuple[TextKeys, ...]
    tokens: VisibleKeys


class StepCache(Protocol):
    """Decides in each call of the DiT whether the blocks behind the first one run, or what they did before serves."""

    def __call__(self, x: Tensor, first: Callable[[Tensor], Tensor], rest: Callable[[Tensor], Tensor]) -> Tensor:
        """x (B, N, d), the tokens; first: the first block; rest: all others. Returns what all of them make of x."""


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
        self.token_kinds: list[str] = []  # how tokens lie in each block, with an exchange
        width = config.width
        self.patch_embed = PatchEmbedding(config.in_channels, width, config.patch)
        self.time_embed = TimeEmbedding(width)
        self.text_embed = nn.Sequential(
            nn.Linear(config.caption_channels, width), nn.GELU(approximate="tanh"), nn.Linear(width, width)
        )
        self.transformer_blocks = nn.ModuleList(config.block(index) for index in range(config.num_layers))
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
        self.exchange, blocks = exchange, self.transformer_blocks
        modes = [block.self_attention.mode for block in blocks]
        self.token_kinds = [] if exchange is None else exchange.kinds(modes)
        moves = [kind != following for kind, following in pairwise(self.token_kinds)]
        for block, moved in zip_longest(blocks, moves, fillvalue=False):
            block.mover = exchange if moved else None
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
        with nullcontext() if self.exchange is None else self.exchange.answering():
            return self._forward(latents, timestep, text, text_mask, latent_mask, step_cache)

    def _forward(
        self,
        latents: Tensor,
        timestep: Tensor | TimeContext,
        text: Tensor | TextContext,
        text_mask: Tensor | None,
        latent_mask: Tensor | None,
        step_cache: StepCache | None,
    ) -> Tensor:
        patch, heads = self.config.patch, self.config.num_attention_heads
        size = tuple(length // p for length, p in zip(latents.shape[2:], patch, strict=True))
        if any(length % p for length, p in zip(latents.shape[2:], patch, strict=True)):
            raise ValueError(f"latents of (T, H, W) = {tuple(latents.shape[2:])} do not divide into patches of {patch}")
        clip = None if self.exchange is None else self.exchange.clip(math.prod(size), heads, latents.device)
        kinds = self.token_kinds
        x = self.patch_embed(latents, None if clip is None else lambda tokens: clip.share(tokens, kinds[0]))
        time = timestep if isinstance(timestep, TimeContext) else self.time_embed(timestep)
        if isinstance(text, TextContext):
            texts, text_tokens = text
        else:
            texts = (self.text_embed(text),) * len(self.transformer_blocks)
            text_tokens = VisibleKeys.from_mask(text_mask)
        places = self._places(clip, size, latents, latent_mask)

        def run(x: Tensor, first: int, last: int | None) -> tuple[Tensor, Pending | None]:
            pending = None
            blocks = zip(self.transformer_blocks, texts, places, strict=True)
            for block, text, (rope, tokens) in list(blocks)[first:last]:
                x, pending = block(x, pending, time.modulation, rope, tokens, text, text_tokens)
            return x, pending

        def rest(x: Tensor) -> Tensor:
            """All blocks but the first; tokens lie afterwards as they did before, where they are cached."""
            x = settled(*run(x, 1, None))
            moved = kinds[1:] and kinds[1] != kinds[-1]
            return self.exchange.move(lambda part: x[:, part], x.shape[1]) if moved else x

        kind = kinds[-1] if kinds else None
        if step_cache is None:
            x, pending = run(x, 0, None)
        else:
            x, pending = step_cache(x, lambda x: settled(*run(x, 0, 1)), rest), None
            kind = kinds[1] if kinds[1:] else kind
        rows = self.scale_shift_table.unbind(0)
        _, x = add_norm_modulate(x, pending, (time.embedded, time.embedded), rows, self.norm_out)
        y = self.proj_out(x)
        return unpatchify(y if clip is None else clip.gather(y, kind), size, patch)

    def _places(
        self, clip: SharedTokens | None, size: tuple[int, ...], latents: Tensor, latent_mask: Tensor | None
    ) -> list[tuple[Rope3D, VisibleKeys]]:
        """For each block the positions of the tokens that it gets, and which are real of those that attend."""
        config = self.config
        scales = config.interpolation_scale_t, config.interpolation_scale_h, config.interpolation_scale_w
        rope = make_rope3d(size, config.attention_head_dim, scales, latents.device, self.rope_dtype)
        token_mask = None
        if latent_mask is not None:
            token_mask = F.max_pool3d(latent_mask[:, None].float(), config.patch).flatten(1).bool()
        tokens = VisibleKeys.from_mask(token_mask)
        if clip is None:
            return [(rope, tokens)] * len(self.transformer_blocks)
        modes = [block.self_attention.mode for block in self.transformer_blocks]
        each = list(zip(self.token_kinds, modes, strict=True))
        places = {place: clip.place(*place, rope, tokens, len(latents)) for place in set(each)}
        return [places[place] for place in each]

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
