"""This rank's part of the weights, as plain tensors.

Optimizer, clipping and average work on these: one code for one process and for many, and no dispatch of distributed
tensors for each small operation. What is saved is wrapped again, so that it can be read by another number of ranks.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor


class LocalShards:
    """The parameters of a module that train, in the module's order.

    names: of the parameters
    parameters: as the module has them, sharded or not
    local: this rank's part of each, plain float32 parameters that share its memory; some may be empty
    """

    def __init__(self, module: nn.Module):
        named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        self.local = [nn.Parameter(local_part(parameter).detach()) for parameter in self.parameters]

    @property
    def place(self) -> str:
        """Which part of the weights this rank has, "0-of-8"; ranks that hold copies have the same."""
        first = self.parameters[0]
        if not isinstance(first, DTensor):
            return "0-of-1"
        mesh = first.device_mesh
        return f"{mesh.get_coordinate()[-1]}-of-{mesh.size(mesh.ndim - 1)}"

    def collect_gradients(self) -> list[Tensor]:
        """Give the local parameters the gradients of the last backward, without a copy. Returns those that are there.

        Raises ValueError if a parameter has none.
        """
        for name, parameter, local in zip(self.names, self.parameters, self.local, strict=True):
            if parameter.grad is None:
                raise ValueError(f"{name} has no gradient")
            local.grad = local_part(parameter.grad)
        return [local.grad for local in self.local]

    def drop_gradients(self) -> None:
        """Free all gradients."""
        for parameter in (*self.parameters, *self.local):
            parameter.grad = None

    def like(self, index: int, local: Tensor) -> Tensor:
        """A tensor of this rank's part of parameter `index` as part of the whole: a DTensor where that is sharded."""
        return wrap_like(self.parameters[index], local)

    def part(self, index: int, whole: Tensor) -> Tensor:
        """This rank's part of a tensor of parameter `index`'s shape that every rank has."""
        parameter = self.parameters[index]
        if not isinstance(parameter, DTensor):
            return whole
        # No rank is asked for its copy: each cuts its part out of its own.
        placed = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
        return placed.to_local()


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def wrap_like(parameter: Tensor, local: Tensor) -> Tensor:
    """`local` as this rank's part of a tensor that is spread like `parameter`; itself where nothing is spread."""
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def on_cpu(tensor: Tensor, cpu_mesh: DeviceMesh | None) -> Tensor:
    """A copy of this rank's part of a tensor in CPU memory, still known as part of the whole.

    cpu_mesh: the ranks' mesh with CPUs for devices; not needed for a tensor that is not spread
    """
    copy = local_part(tensor).detach().to("cpu", copy=True)
    if not isinstance(tensor, DTensor):
        return copy
    return DTensor.from_local(
        copy, cpu_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def gather_state(module: nn.Module, replaced: Mapping[str, Tensor], take: Callable[[str, Tensor], None]) -> None:
    """Hand each tensor of a module's state to `take`, whole, one after the other, as every rank gathers it.

    replaced: local parts that go in the place of parameters' own, by name. All ranks must call it.
    """
    for name, tensor in module.state_dict().items():
        if name in replaced:
            tensor = wrap_like(tensor, replaced[name])
        with torch.no_grad():
            take(name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)
