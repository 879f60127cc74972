"""Runs a warp-specialised Gluon kernel for Hopper on CPU tensors, to test its synchronisation and its addresses.

`simulate` executes the kernel's own Python functions with `gl`, `tma`, `mbarrier`, `warpgroup_mma` and their like
replaced. Each partition is a thread; one runs at a time, and at every barrier, copy and product a scheduler seeded by
the caller decides who goes on, or which copy lands. What hardware would leave undefined is made visible:

- shared memory holds NaN until a copy has landed; starting a copy makes its destination NaN again
- a product that reads NaN, or whose operands change before it is waited for, is an error
- an accumulator that `warpgroup_mma_wait` did not wait long enough for is NaN
- a barrier that is used before its initialisation is fenced, gets too many arrivals, or completes a second phase under
  a waiter, is an error; so are a deadlock, and copies or products left over at the end
- a copy that touches memory past its tensor's last element is an error; out-of-range coordinates give zeros
- storing an element of global memory twice, or past the tensor's end, is an error; int32 overflow of a scalar too

Not simulated: layouts and swizzles (the compiler checks them), registers, the warps of one partition (a partition is
one thread here), memory ordering beyond the barriers, rounding inside the tensor cores, timing.
"""

import math
import random
import threading
from collections.abc import Callable
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

ALLOCATION_LIMIT = 227 * 1024  # bytes of shared memory that a Hopper block may have


class SimulatorError(Exception):
    """The kernel did something that is undefined on the hardware, or hangs there."""


class _Stop(Exception):
    """Ends the other partitions after one has failed."""


class Scalar(int):
    """A run-time integer of the kernel: divides like C, and fails where `bits` do not hold a result."""

    bits = 32

    def to(self, dtype: torch.dtype) -> "Scalar":
        return Scalar64(self) if dtype == torch.int64 else self


Scalar64 = type("Scalar64", (Scalar,), {"bits": 64})


def _divide(a: Any, b: Any) -> Any:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return torch.div(a, b, rounding_mode="trunc")
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _apply(function: Callable[[Any, Any], Any], left: Any, right: Any) -> Any:
    """`function` of two operands, at least one of them a Scalar; 64 bits where either has 64."""
    kind = Scalar64 if Scalar64 in (type(left), type(right)) else Scalar
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        wide = kind is Scalar64
        return function(*(int(x) if isinstance(x, int) else x.long() if wide else x for x in (left, right)))
    if not isinstance(left, int) or not isinstance(right, int):
        return NotImplemented
    value = function(int(left), int(right))
    if not -(2 ** (kind.bits - 1)) <= value < 2 ** (kind.bits - 1):
        raise SimulatorError(f"{value} overflows {kind.bits} bits")
    return kind(value)


for _name, _function in {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "floordiv": _divide,
    "mod": lambda a, b: a - b * _divide(a, b),
}.items():
    setattr(Scalar, f"__{_name}__", lambda self, other, f=_function: _apply(f, self, other))
    setattr(Scalar, f"__r{_name}__", lambda self, other, f=_function: _apply(f, other, self))


class Pointer:
    """A pointer argument, or a tensor of pointers, into `tensor` at element `offset`."""

    def __init__(self, tensor: Tensor, writes: Tensor | None = None, offset: Any = 0) -> None:
        self.tensor, self.offset = tensor, offset
        self.writes = torch.zeros(tensor.numel(), dtype=torch.int32) if writes is None else writes
        self.dtype = SimpleNamespace(element_ty=tensor.dtype)

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.tensor, self.writes, offset + self.offset)

    def load(self) -> Scalar:
        return Scalar(self.tensor.view(-1)[int(self.offset)].item())

    def store(self, value: Tensor, mask: Tensor) -> None:
        mask = mask.expand(value.shape)
        where = torch.as_tensor(self.offset).expand(value.shape)[mask]
        if ((where < 0) | (where >= self.tensor.numel())).any():
            raise SimulatorError("a store lies outside its tensor")
        self.writes.index_add_(0, where.long(), torch.ones_like(where, dtype=torch.int32))
        if (self.writes > 1).any():
            raise SimulatorError("an element is stored twice")
        self.tensor.view(-1)[where.long()] = value.to(self.tensor.dtype)[mask]


class View:
    """A tensor descriptor argument. Its memory ends with the tensor's last element, whatever its shape claims."""

    def __init__(self, descriptor: TensorDescriptor) -> None:
        base = descriptor.base
        self.shape, self.strides, self.layout, self.dtype = descriptor.shape, descriptor.strides, None, base.dtype
        elements = 1 + sum((size - 1) * stride for size, stride in zip(base.shape, base.stride(), strict=True))
        self.memory = base.as_strided((elements,), (1,))
        box = list(descriptor.block_shape)
        self.block_type = SimpleNamespace(shape=box, nbytes=math.prod(box) * base.element_size())

    def read(self, corner: list[int]) -> Tensor:
        box = self.block_type.shape
        offsets, inside = torch.zeros(box, dtype=torch.int64), torch.ones(box, dtype=torch.bool)
        for axis, (start, length, size, stride) in enumerate(zip(corner, box, self.shape, self.strides, strict=True)):
            index = (torch.arange(length) + int(start)).view([-1 if i == axis else 1 for i in range(len(box))])
            offsets, inside = offsets + index * stride, inside & (index >= 0) & (index < size)
        if inside.any() and int(offsets[inside].max()) >= self.memory.numel():
            raise SimulatorError(f"the copy at {[int(c) for c in corner]} reads past the end of its tensor")
        return torch.where(inside, self.memory[torch.where(inside, offsets, 0)], torch.zeros((), dtype=self.dtype))


class Shared:
    """Shared memory, or a view of it."""

    def __init__(self, data: Tensor) -> None:
        self.data, self.dtype = data, data.dtype

    def index(self, i: int) -> "Shared":
        return Shared(self.data[range(len(self.data)).index(i)])

    def reshape(self, shape: list[int]) -> "Shared":
        return Shared(self.data.view(shape))

    def permute(self, order: tuple[int, ...]) -> "Shared":
        return Shared(self.data.permute(order))


class Barrier:
    """An mbarrier: `phase` counts completed phases; a phase ends when no arrival and no byte is missing."""

    def __init__(self) -> None:
        self.phase, self.count, self.missing, self.bytes, self.targets = 0, None, 0, 0, []

    def arrive(self, count: int) -> None:
        if self.count is None or count > self.missing:
            raise SimulatorError("an arrival too many at a barrier, or one before its initialisation")
        self.missing -= count
        self.finish_phase()

    def finish_phase(self) -> None:
        if self.missing == 0 and self.bytes == 0:
            if any(target <= self.phase for target in self.targets):
                raise SimulatorError("a barrier completed a second phase before its waiter saw the first")
            self.phase, self.missing = self.phase + 1, self.count


class Barriers(list):
    """An allocation of barriers."""

    def index(self, i: int) -> Barrier:
        return self[range(len(self)).index(i)]


class Product:
    """A wgmma in flight. Operands in shared memory must not change until it is waited for."""

    def __init__(self, a: Any, b: Shared, accumulator: Any, use_acc: bool) -> None:
        self.a, self.b, self.accumulator, self.use_acc, self.shape = a, b, accumulator, use_acc, accumulator.shape
        self.result = torch.full(self.shape, torch.nan)
        self.left, self.right = a.data.clone(), b.data.clone()  # `.data` of a tensor, a left operand, is itself
        if b.data.isnan().any() or (isinstance(a, Shared) and a.data.isnan().any()):
            raise SimulatorError("a product reads shared memory that has not arrived")
        if (self.left.shape[0], self.right.shape[1]) != tuple(self.shape) or self.left.dtype != self.right.dtype:
            raise SimulatorError("operands of a product do not fit")

    def finish(self) -> None:
        for operand, was in ((self.a, self.left), (self.b, self.right)):
            if isinstance(operand, Shared) and not torch.equal(operand.data, was):
                raise SimulatorError("an operand was overwritten while a product was reading it")
        before = self.accumulator.result if isinstance(self.accumulator, Product) else self.accumulator
        self.result = self.left.float() @ self.right.float() + (before if self.use_acc else 0.0)


class Partition:
    """One thread of execution: its products in flight, and the barrier and phase that it waits for, if any."""

    def __init__(self, function: Callable[..., Any], arguments: tuple, program: "Program") -> None:
        self.name, self.products, self.waits_for, self.error = function.__name__, [], None, None
        self.turn, self.done, self.speed = threading.Semaphore(0), False, program.draw_speed()
        self.thread = threading.Thread(target=self.run, args=(function, arguments, program), daemon=True)

    def run(self, function: Callable[..., Any], arguments: tuple, program: "Program") -> None:
        self.turn.acquire()
        try:
            if not program.stopped:
                function(*arguments)
            if self.products:
                raise SimulatorError(f"{self.name} ends with products in flight")
        except _Stop:
            pass
        except Exception as error:
            self.error = error
        self.done = True
        program.scheduler.release()

    def runnable(self) -> bool:
        return not self.done and (self.waits_for is None or self.waits_for[0].phase >= self.waits_for[1])


class Program:
    """One program (thread block) and its scheduler."""

    def __init__(self, number: int, programs: int, rng: random.Random) -> None:
        self.number, self.programs, self.rng = number, programs, rng
        self.scheduler, self.stopped, self.current = threading.Semaphore(0), False, None
        self.copies: list[tuple[Tensor, Tensor, Barrier]] = []
        self.unfenced, self.allocated, self.MBarrierLayout = False, 0, lambda: None

    def draw_speed(self) -> float:
        return 2 ** self.rng.uniform(-5, 5)  # now copies are slow, now one of the partitions

    def pause(self) -> None:  # called in a partition: give way to whoever the scheduler picks
        me = self.current
        self.scheduler.release()
        me.turn.acquire()
        if self.stopped:
            raise _Stop

    def run_partitions(self, functions_and_args: list, warps: list[int], registers: list[int]) -> None:
        if self.unfenced:
            raise SimulatorError("barriers are not fenced after their initialisation")
        partitions = [Partition(function, arguments, self) for function, arguments in functions_and_args]
        for partition in partitions:
            partition.thread.start()
        try:
            self.schedule(partitions)
        finally:
            self.stopped = True
            for partition in partitions:
                partition.turn.release()
                partition.thread.join()

    def schedule(self, partitions: list[Partition]) -> None:
        copy_speed = self.draw_speed()
        while not all(partition.done for partition in partitions):
            ready = [partition for partition in partitions if partition.runnable()]
            if not ready and not self.copies:
                raise SimulatorError("deadlock: every partition waits for a barrier that nothing will complete")
            weights = [partition.speed for partition in ready] + [copy_speed] * bool(self.copies)
            choice = self.rng.choices([*ready, None][: len(weights)], weights)[0]
            if choice is None:
                self.land(self.rng.randrange(len(self.copies)))
                continue
            self.current = choice
            choice.turn.release()
            self.scheduler.acquire()
            if choice.error is not None:
                raise choice.error
        if self.copies:
            raise SimulatorError("copies are in flight after the last partition has ended")

    def land(self, number: int) -> None:
        data, buffer, barrier = self.copies.pop(number)
        buffer.copy_(data)
        barrier.bytes -= data.numel() * data.element_size()
        barrier.finish_phase()

    # What the kernel calls: `gl.allocate_shared_memory`, the names of `mbarrier`, `tma` and of products.

    def allocate(self, dtype: torch.dtype, shape: list[int], layout: Any) -> Any:
        if dtype == torch.int64:
            return Barriers(Barrier() for _ in range(shape[0]))
        self.allocated += math.prod(shape) * dtype.itemsize
        if self.allocated > ALLOCATION_LIMIT:
            raise SimulatorError(f"{self.allocated} bytes of shared memory")
        return Shared(torch.full(shape, torch.nan, dtype=dtype))

    def init(self, barrier: Barrier, count: int) -> None:
        barrier.count = barrier.missing = count
        self.unfenced = True

    def fence(self) -> None:
        self.unfenced = False

    def wait(self, barrier: Barrier, phase: int, pred: bool = True) -> None:
        self.pause()
        if not pred:
            return
        if phase not in (0, 1) or barrier.count is None:
            raise SimulatorError(f"a wait for phase {phase}, or before the barrier's initialisation")
        target = barrier.phase + 1 if barrier.phase % 2 == phase else barrier.phase
        me = self.current
        if barrier.phase < target:
            me.waits_for = (barrier, target)
            barrier.targets.append(target)
            self.pause()
            barrier.targets.remove(target)
            me.waits_for = None

    def arrive(self, barrier: Barrier, count: int = 1, pred: bool = True) -> None:
        self.pause()
        if pred:
            barrier.arrive(count)

    def expect(self, barrier: Barrier, bytes: int, pred: bool = True) -> None:
        self.pause()
        if pred:
            barrier.bytes += bytes
            barrier.arrive(1)

    def copy(self, view: View, corner: list[int], barrier: Barrier, buffer: Shared) -> None:
        self.pause()
        data = view.read(corner)
        buffer.data.fill_(torch.nan)
        self.copies.append((data, buffer.data, barrier))

    def multiply(self, a: Any, b: Shared, acc: Any, *, use_acc: bool = True, is_async: bool = False) -> Any:
        self.pause()
        self.current.products.append(Product(a, b, acc, use_acc))
        return self.current.products[-1] if is_async else self.wait_products(0, (self.current.products[-1],))

    def wait_products(self, num_outstanding: int, deps: tuple) -> Any:
        self.pause()
        products = self.current.products
        while len(products) > num_outstanding:
            products.pop(0).finish()
        values = tuple(dep.result if isinstance(dep, Product) else dep for dep in deps)
        return values[0] if len(values) == 1 else values


def _language(program: Program) -> SimpleNamespace:
    """Stands for `gl`: values are CPU tensors and scalars; layouts are the real ones, and mean nothing."""
    return SimpleNamespace(
        **{name: getattr(gl, name) for name in dir(gl) if name.endswith("Layout")},
        float32=torch.float32,
        int64=torch.int64,
        static_range=range,
        program_id=lambda axis: Scalar(program.number),
        num_programs=lambda axis: Scalar(program.programs),
        allocate_shared_memory=program.allocate,
        warp_specialize=program.run_partitions,
        full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
        arange=lambda start, end, layout: torch.arange(start, end, dtype=torch.int32),
        load=lambda pointer: pointer.load(),
        store=lambda pointer, value, mask: pointer.store(value, mask),
        convert_layout=lambda value, layout: value,
        max=lambda value, axis: value.amax(axis),
        sum=lambda value, axis: value.sum(axis),
        maximum=lambda a, b: torch.maximum(a, b) if isinstance(a, Tensor) else Scalar(max(a, b)),
        minimum=lambda a, b: torch.minimum(a, b) if isinstance(a, Tensor) else Scalar(min(a, b)),
        cdiv=lambda a, b: Scalar(_divide(a + b - 1, b)),
        where=torch.where,
        exp2=torch.exp2,
        log=torch.log,
    )


def simulate(kernel: GluonJITFunction, programs: int, arguments: dict[str, Any], seed: int) -> None:
    """Run `programs` programs of `kernel` one after another; its outputs are written into the tensors in `arguments`.

    Tensors become pointers, tensor descriptors views, integers 32-bit scalars; anything else is passed as it is. Raises
    SimulatorError on what the module's docstring lists, whatever the interleaving that `seed` draws.
    """
    rng = random.Random(seed)
    stands_for = {Tensor: Pointer, TensorDescriptor: View, int: Scalar}
    values = {name: stands_for.get(type(value), lambda same: same)(value) for name, value in arguments.items()}
    for number in range(programs):
        _rebuild(kernel, Program(number, programs, rng))(**values)


def _rebuild(kernel: GluonJITFunction, program: Program) -> Callable[..., None]:
    """The kernel's Python function in a copy of its module's names, with the language replaced by the simulated one."""
    names = dict(kernel.fn.__globals__)
    for name, value in names.items():
        if isinstance(value, GluonJITFunction):
            names[name] = FunctionType(value.fn.__code__, names, value.fn.__name__, value.fn.__defaults__)
        elif isinstance(value, gl.constexpr):
            names[name] = value.value
    names |= dict(
        gl=_language(program),
        hopper=SimpleNamespace(
            tma=SimpleNamespace(async_copy_global_to_shared=program.copy),
            mbarrier=program,
            fence_async_shared=program.fence,
            warpgroup_mma=program.multiply,
            warpgroup_mma_wait=program.wait_products,
        ),
    )
    return names[kernel.fn.__name__]
