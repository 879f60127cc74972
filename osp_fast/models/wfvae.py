"""WF-VAE: a causal video autoencoder whose main path runs beside a pyramid of Haar wavelets.

Shapes: video (B, 3, T, H, W) with T = 4m + 1 and H, W multiples of 8; latents (B, latent_dim, m + 1, H / 8, W / 8).
Source: "WF-VAE" (Li et al., 2024). Networks are in `wfvae_encoder.py` and `wfvae_decoder.py`.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from osp_fast.errors import UserError
from osp_fast.kernels.haar import COEFFICIENT_2D, COEFFICIENT_3D
from osp_fast.models.weights import PretrainedModel
from osp_fast.models.wfvae_decoder import Decoder
from osp_fast.models.wfvae_encoder import Encoder
from osp_fast.models.wfvae_stream import TIME_STRIDE, Plan, decode_stream, encode_stream

LOGVAR_RANGE = (-30.0, 20.0)
MANY = 1 << 40  # cells: more than any clip has
Tiles = tuple[int | None, int | None, int | None]


@dataclass(frozen=True)
class WFVAEConfig:
    """The architecture, under the names of config.json; the defaults are the released 4x8x8, 8-channel model's."""

    latent_dim: int = 8
    base_channels: int = 128
    encoder_num_resblocks: int = 2
    encoder_energy_flow_hidden_size: int = 64
    decoder_num_resblocks: int = 2
    decoder_energy_flow_hidden_size: int = 128
    connect_res_layer_num: int = 1
    use_attention: bool = True
    t_interpolation: str = "trilinear"
    scale: tuple[float, ...] = field(default=(0.18215,) * 8)
    shift: tuple[float, ...] = field(default=(0.0,) * 8)

    def __post_init__(self) -> None:
        for name in ("scale", "shift"):
            values = tuple(float(value) for value in getattr(self, name))
            object.__setattr__(self, name, values)
            if not all(math.isfinite(value) for value in values) or (name == "scale" and 0.0 in values):
                raise ValueError(f"{name} {values} must be finite, and not zero for scale")
            if len(values) != self.latent_dim:
                raise ValueError(f"{name} has {len(values)} values, latent_dim is {self.latent_dim}")
        if self.t_interpolation not in ("trilinear", "nearest"):
            raise ValueError(f"t_interpolation {self.t_interpolation!r} is unknown: trilinear or nearest")


WFVAE_CONFIGS = {
    "WFVAEModel_D8_4x8x8": WFVAEConfig(),
    "tiny": WFVAEConfig(
        base_channels=8,
        encoder_num_resblocks=1,
        encoder_energy_flow_hidden_size=24,
        decoder_num_resblocks=1,
        decoder_energy_flow_hidden_size=24,
        scale=(1.0,) * 8,
    ),
}


@dataclass(frozen=True)
class Posterior:
    """A diagonal normal over raw latents: mean and log-variance, each (B, latent_dim, T, H, W)."""

    mean: Tensor
    logvar: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """The draw that standard normal noise of the mean's shape stands for, in the noise's dtype."""
        return self.mean.to(noise) + noise * torch.exp(0.5 * self.logvar.to(noise))


class WFVAE(PretrainedModel):
    """The autoencoder; load with `WFVAE.from_pretrained`.

    `tiles` = (t, h, w) in latent cells bounds the memory of encode and decode, with the same result as the whole clip:
    t latent frames at once, the layers at pixel resolution on h x w cells at once; None is all. A `Plan` may stand in
    its place; `wfvae_plan.py` makes one for a budget of bytes. Nothing is kept in the modules between calls.
    """

    class_name = "WFVAEModel"
    config_class = WFVAEConfig
    fixed_config: ClassVar = dict(
        dropout=0.0,
        norm_type="layernorm",
        l1_dowmsample_block="Downsample",
        l1_downsample_wavelet="HaarWaveletTransform2D",
        l2_dowmsample_block="Spatial2xTime2x3DDownsample",
        l2_downsample_wavelet="HaarWaveletTransform3D",
        l1_upsample_block="Upsample",
        l1_upsample_wavelet="InverseHaarWaveletTransform2D",
        l2_upsample_block="Spatial2xTime2x3DUpsample",
        l2_upsample_wavelet="InverseHaarWaveletTransform3D",
    )

    def __init__(self, config: WFVAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode(self, video: Tensor, tiles: Tiles | Plan | None = None) -> Posterior:
        """video (B, 3, 4m+1, H, W), uint8 or in [-1, 1] -> posterior of raw latents.

        Raises ValueError on other sizes.
        """
        frames = (video.shape[2] - 1) // TIME_STRIDE + 1
        mean, logvar = _collected(self.encode_stream((video,), as_plan(tiles)), frames).chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(*LOGVAR_RANGE))

    def decode(self, latents: Tensor, tiles: Tiles | Plan | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Raw latents (B, latent_dim, m+1, h, w) -> video (B, 3, 4m+1, 8h, 8w), in about [-1, 1].

        dtype: of the pixels, floating; by default the network's.
        """
        frames = TIME_STRIDE * (latents.shape[2] - 1) + 1
        return _collected(self.decode_stream((latents,), as_plan(tiles), dtype), frames)

    def encode_stream(self, frames: Iterable[Tensor], plan: Plan) -> Iterator[Tensor]:
        """Pieces (B, 3, t, H, W) of a video, of any lengths, 4m+1 frames in all -> mean and log-variance (before any
        clamping) of its latent frames, (B, 2 * latent_dim, t', H/8, W/8), as they are known. Raises ValueError.
        """
        return encode_stream(self.encoder, frames, plan)

    def decode_stream(
        self, latents: Iterable[Tensor], plan: Plan, dtype: torch.dtype | None = None
    ) -> Iterator[Tensor]:
        """Pieces (B, latent_dim, t, h, w) of raw latents, of any lengths -> frames (B, 3, t', 8h, 8w), in order.

        dtype: of the pixels, floating; by default the network's.
        """
        return decode_stream(self.decoder, latents, plan, dtype)

    def normalize(self, raw: Tensor) -> Tensor:
        """Raw latents -> the DiT's: (raw - shift) * scale, per channel."""
        return (raw - self._channels(self.config.shift, raw)) * self._channels(self.config.scale, raw)

    def denormalize(self, latents: Tensor) -> Tensor:
        """The DiT's latents -> raw ones, which `decode` takes."""
        return latents / self._channels(self.config.scale, latents) + self._channels(self.config.shift, latents)

    @staticmethod
    def _channels(values: tuple[float, ...], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1, 1)

    def to_checkpoint(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters plus the wavelet filters, which checkpoints store and this model computes."""
        like = next(iter(state.values()))
        return {**state, **{name: value.to(like) for name, value in wavelet_filters().items()}}

    def from_checkpoint(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters only. Raises `UserError` if the stored wavelets are not the Haar wavelets."""
        filters = wavelet_filters()
        for name, expected in filters.items():
            # 16-bit checkpoints hold the coefficients rounded.
            if not torch.allclose(tensors[name].float().cpu(), expected, atol=2e-3):
                raise UserError(f"{name} of the VAE's weights is not the Haar wavelet that this engine computes")
        layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
        return {
            name: tensor.contiguous(memory_format=layouts.get(tensor.dim(), torch.contiguous_format))
            for name, tensor in tensors.items()
            if name not in filters
        }


def as_plan(tiles: Tiles | Plan | None) -> Plan:
    """A plan as it is; tiles (t, h, w) with time as the outer loop; None: all at once. Raises ValueError."""
    if tiles is None or isinstance(tiles, Plan):
        return tiles or Plan()
    if len(tiles) != 3 or not all(size is None or (isinstance(size, int) and size > 0) for size in tiles):
        raise ValueError(f"tiles {tiles} must be (t, h, w) in latent cells, each at least 1, or None for all")
    frames, rows, columns = tiles
    if rows is None and columns is None:
        return Plan(frames)
    return Plan(frames, (rows or MANY, columns or MANY))


def _collected(parts: Iterator[Tensor], frames: int) -> Tensor:
    """Pieces in one tensor of that many frames, each written where it belongs as it comes."""
    whole, start = None, 0
    for part in parts:
        if part.shape[2] == frames:
            return part
        if whole is None:
            whole = part.new_empty((*part.shape[:2], frames, *part.shape[3:]))
        whole[:, :, start : start + part.shape[2]] = part
        start += part.shape[2]
        del part  # before the next one is computed
    return whole


def wavelet_filters() -> dict[str, Tensor]:
    """The constant filters that checkpoints store beside the parameters, under their names there."""
    low, high = torch.tensor([1.0, 1.0]), torch.tensor([1.0, -1.0])
    filters = {}
    # Stored names: columns low = h, high = g; then "h" if rows are high; then "_v" if time is high.
    for column_name, columns in (("h", low), ("g", high)):
        for row_name, rows in (("", low), ("h", high)):
            for time_name, time in (("", low), ("_v", high)):
                box = torch.einsum("t,h,w->thw", time, rows, columns)[None, None] * COEFFICIENT_3D
                name = f"{column_name}{row_name}{time_name}"
                filters[f"encoder.wavelet_tranform_l2.{name}_conv.conv.weight"] = box
                filters[f"decoder.inverse_wavelet_tranform_l2.{name}"] = box.clone()
    for name, rows, columns in (("aa", low, low), ("ad", high, low), ("da", low, high), ("dd", high, high)):
        box = torch.einsum("h,w->hw", rows, columns)[None, None] * COEFFICIENT_2D
        filters[f"encoder.wavelet_tranform_l1.{name}"] = box
        filters[f"decoder.inverse_wavelet_tranform_l1.{name}"] = box.clone()
    return filters
