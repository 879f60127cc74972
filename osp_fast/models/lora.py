"""LoRA: low-rank adapters that train beside the frozen products of the DiT's blocks (Hu et al. 2021, arXiv:2106.09685).

A product W x becomes W x + (alpha / rank) B A x; A is (rank, in), B (out, rank) and zero at first. Training adds PEFT's
layers, one adapter to each product as the DiT computes it. Files (`lora_files.py`) have one for each product of the
released checkpoints: those of a fused product share A, and each has its rows of B, which makes the same B A exactly.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from osp_fast.config import Recipe
from osp_fast.errors import UserError
from osp_fast.models.dit import DiT
from osp_fast.models.dit_checkpoint import CHECKPOINT_NAMES
from osp_fast.models.lora_files import LORA_A, LORA_B, PREFIX, Lora, load_lora, write_lora
from osp_fast.seeding import torch_generator

ADAPTER = "default"  # PEFT's name for the only adapter of a model
OUR_A, OUR_B = f".lora_A.{ADAPTER}.weight", f".lora_B.{ADAPTER}.weight"


def add_lora(dit: DiT, rank: int, alpha: float, seed: int) -> DiT:
    """Freeze a DiT and add adapters to every product of its blocks, float32, to be trained. Returns the model.

    A is drawn by `seed` as PEFT draws it (kaiming uniform), B is zero, so nothing changes at first. To be called before
    compiling and sharding. Raises `UserError` if PEFT is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise UserError("--lora_rank needs the package peft: install it (pip install peft)") from error
    dit.requires_grad_(False)
    # On the meta device, so that PEFT draws nothing from the global random state.
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=list(CHECKPOINT_NAMES), lora_dropout=0.0, init_lora_weights=False
    )
    peft.inject_adapter_in_model(config, dit, ADAPTER, low_cpu_mem_usage=True)
    for place in product_places(dit):
        layer = dit.get_submodule(place)
        weight = layer.get_base_layer().weight
        drawn = torch.empty(rank, weight.shape[1])
        nn.init.kaiming_uniform_(drawn, a=5**0.5, generator=torch_generator("lora", seed, place))
        layer.lora_A[ADAPTER].weight = nn.Parameter(drawn.to(weight.device))
        layer.lora_B[ADAPTER].weight = nn.Parameter(torch.zeros(weight.shape[0], rank, device=weight.device))
        # Casting the input to float32 would only cost memory where the weights are float32 too: products cast theirs.
        layer.cast_input_dtype_enabled = weight.dtype != torch.float32
    return dit


def product_places(dit: DiT) -> list[str]:
    """The modules that have adapters, or would get them."""
    return [f"transformer_blocks.{i}.{part}" for i in range(dit.config.num_layers) for part in CHECKPOINT_NAMES]


def has_lora(dit: DiT) -> bool:
    """Whether a DiT has adapters."""
    return hasattr(dit.get_submodule(product_places(dit)[0]), "lora_A")


def lora_size(dit: DiT) -> tuple[int, float]:
    """Rank and alpha of a DiT's adapters."""
    layer = dit.get_submodule(product_places(dit)[0])
    return layer.r[ADAPTER], layer.scaling[ADAPTER] * layer.r[ADAPTER]


def lora_state(dit: DiT, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The adapters under their names in files: of the DiT, or of `state`, which has its names (such as an average).

    Sharded tensors are gathered: all ranks must call it then.
    """
    state = dit.state_dict() if state is None else state
    tensors = {}
    for place in product_places(dit):
        a, b = (_whole(state[place + kind]) for kind in (OUR_A, OUR_B))
        targets = _targets(place)
        for target, rows in zip(targets, b.chunk(len(targets)), strict=True):
            tensors[PREFIX + target + LORA_A], tensors[PREFIX + target + LORA_B] = a, rows
    return tensors


def save_lora(
    folder: str | Path, adapters: DiT | Mapping[str, Tensor], rank: int, alpha: float, recipe: Recipe | None = None
) -> None:
    """Write a DiT's adapters, or what `lora_state` has made, as a folder that PEFT and `--lora` read, synced to disk.

    recipe: how they were trained. Raises OSError, SafetensorError.
    """
    tensors = lora_state(adapters) if isinstance(adapters, DiT) else adapters
    write_lora(Path(folder), tensors, rank, alpha, recipe)


def fused_state(dit: DiT, folder: str | Path) -> dict[str, Tensor]:
    """The inverse of `lora_state`: adapters that training has saved, under the names of a DiT that has adapters.

    Raises:
        UserError: a file is missing or damaged, or they are not adapters of such a DiT with such a rank and alpha.
    """
    lora, fix = load_lora(folder), "resume from another checkpoint"
    rank, alpha = lora_size(dit)
    if (lora.rank, lora.alpha) != (rank, alpha):
        raise UserError(
            f"{lora.file}: r is {lora.rank} and lora_alpha {lora.alpha:g}, but --lora_rank is {rank}"
            f" and --lora_alpha {alpha:g}: give the flags that the adapters were trained with"
        )
    products, state = lora.products(), {}
    for place in product_places(dit):
        missing = [target for target in _targets(place) if target not in products]
        if missing:
            raise UserError(f"{lora.file} has no adapter of {missing[0]}: {fix}")
        parts = [products.pop(target) for target in _targets(place)]
        a, b = parts[0][0], torch.cat([rows for _, rows in parts])
        if not all(torch.equal(a, other) for other, _ in parts):
            raise UserError(
                f"{lora.file}: the adapters of {' and '.join(_targets(place))} differ in lora_A, which this training"
                f" has in common for them: {fix}; sampling takes them with --lora"
            )
        state[place + OUR_A], state[place + OUR_B] = a, b
    if products:
        raise UserError(f"{lora.file} has adapters of {next(iter(products))}, which is not trained: {fix}")
    for name, tensor in state.items():
        expected = dit.get_parameter(name).shape
        if tensor.shape != expected:
            raise UserError(f"{lora.file}: {name} has shape {tuple(tensor.shape)}, not {tuple(expected)}: {fix}")
    return state


@torch.no_grad()
def restore_lora(dit: DiT, folder: str | Path) -> DiT:
    """Go on from adapters that training has saved, bit for bit. Returns the model.

    dit: one that `add_lora` has made, not sharded yet. Raises `UserError` as `fused_state`.
    """
    for name, tensor in fused_state(dit, folder).items():
        dit.get_parameter(name).copy_(tensor)
    return dit


@torch.no_grad()
def merge_lora(dit: DiT, lora: Lora | str | Path, scale: float = 1.0) -> DiT:
    """Add scale * alpha / rank * B A to the weights of a DiT without adapters, computed in float32. Returns the model.

    lora: from `load_lora`, or the folder or file to load; its products may be any that are a matrix in a released
    checkpoint, with an A of its own each. Raises `UserError`, with the weights as they were, if one does not fit.
    """
    lora = lora if isinstance(lora, Lora) else load_lora(lora)
    # Views of the weights: what is added to a part of a fused one is added to that one.
    weights = dit.to_checkpoint(dict(dit.named_parameters()))
    products = lora.products()
    for target, (a, b) in products.items():
        weight = weights.get(f"{target}.weight")
        if weight is None or weight.dim() != 2:
            raise UserError(f"{lora.file}: {target} is no product of this DiT: name adapters that were made for it")
        if (b.shape[0], a.shape[1]) != tuple(weight.shape):
            raise UserError(
                f"{lora.file}: the adapter of {target} is for a weight of {b.shape[0]} x {a.shape[1]}, but the DiT's"
                f" has {weight.shape[0]} x {weight.shape[1]}: name adapters that were made for it"
            )
    for target, (a, b) in products.items():
        weight = weights[f"{target}.weight"]
        a, b = (part.to(weight.device, torch.float32) for part in (a, b))
        weight.copy_(weight.float() + (b @ a) * (scale * lora.alpha / lora.rank))
    return dit


def _targets(place: str) -> list[str]:
    """Our product -> its products in a released checkpoint, in the order of their rows."""
    _, index, part = place.split(".", 2)
    return [f"transformer_blocks.{index}.{name}" for name in CHECKPOINT_NAMES[part]]


def _whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
