"""Prompts rewritten by a chat model from a local transformers folder."""

from pathlib import Path

import torch
from torch import nn

from osp_fast.models.transformers_folder import load_config, network_on_meta


def refiner_on_meta(folder: Path, dtype: torch.dtype) -> nn.Module:
    """The chat model of a folder's config.json without weights: shapes and types only. Raises `UserError`.

    `decoder_layers` finds the layers in it.
    """
    return network_on_meta("AutoModelForCausalLM", load_config(folder), dtype)


def decoder_layers(network: nn.Module) -> nn.ModuleList:
    """The layers of a causal language model: of its lists of modules of one class, the longest.

    Lists within lists, such as the experts of a layer, are not looked at. Raises ValueError if there is none.
    """
    lists: dict[str, nn.ModuleList] = {}
    for name, module in network.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and not inside and len({type(member) for member in module}) == 1:
            lists[name] = module
    if not lists:
        raise ValueError(f"no list of layers of one class in {type(network).__name__}")
    return max(lists.values(), key=len)
