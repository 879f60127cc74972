"""How the ranks share the weights."""

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from osp_fast.errors import UserError

REPLICATE, SHARD = "replicate", "shard"


def check_shard_size(shard_size: int | None, size: int) -> None:
    """Raise `UserError` unless `--shard_size` divides the number of ranks."""
    if shard_size is not None and size % shard_size:
        raise UserError(
            f"--shard_size {shard_size} does not divide the {size} GPUs of the run: name how many of them are to share"
            " one copy of the weights"
        )


def make_mesh(device_type: str, size: int, shard_size: int | None = None) -> DeviceMesh:
    """The mesh of `size` ranks, consecutive ones sharing a copy of the weights.

    One dimension, "shard" (FSDP), unless `shard_size` is smaller than `size`: then two, "replicate" and "shard", each
    group of `shard_size` ranks holding a copy (HSDP: Zhao et al. 2023, "PyTorch FSDP"). Raises `UserError`.
    """
    check_shard_size(shard_size, size)
    if shard_size is None or shard_size == size:
        return init_device_mesh(device_type, (size,), mesh_dim_names=(SHARD,))
    return init_device_mesh(device_type, (size // shard_size, shard_size), mesh_dim_names=(REPLICATE, SHARD))
