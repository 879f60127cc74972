"""From a plain DiT to one whose weights are spread over ranks."""

import warnings

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from osp_fast.models.dit import DiT


def shard_dit(dit: DiT, mesh: DeviceMesh, dtype: torch.dtype = torch.float32) -> DiT:
    """Spread the weights over the ranks of `mesh` (FSDP2): each block is gathered while it computes. Returns the model.

    Ranks keep their rows of each float32 weight, and of its gradient and all that the optimizer knows of it. With
    `dtype` bfloat16 blocks are gathered in it and gradients are still added up in float32. To be called after
    `recompute_blocks` and compiling: FSDP's hooks stay outside of both.
    """
    # Inputs are left as they are: RoPE's tables and a flow's timesteps stay in float32, autocast sees to the rest.
    half = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    policy = half if dtype != torch.float32 else MixedPrecisionPolicy(cast_forward_inputs=False)
    # Results of blocks are views, and must not be changed in place; nothing of ours does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for block in dit.transformer_blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
        register_fsdp_forward_method(block, "text_keys")
    fully_shard(dit, mesh=mesh, mp_policy=policy)
    for method in ("text_context", "time_context"):  # sampling calls these beside forward
        register_fsdp_forward_method(dit, method)
    return dit
