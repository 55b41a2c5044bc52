"""Every load and store of the interpreter checked: bounds, races between programs, and values that nobody
defined.

A wrapped 32-bit offset lands outside the tensor it was meant for, so that the bounds catch it too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

Handle = interpreter.TensorHandle


class MemoryFaultError(AssertionError):
    """A kernel touched memory that it must not."""


class Launch:
    """The memory that one launch may touch, and who stored where."""

    def __init__(self, arguments: list) -> None:
        spans = [span(tensor) for tensor in map(unwrapped, arguments) if isinstance(tensor, torch.Tensor)]
        self.spans = np.array(spans, dtype=np.uint64).reshape(-1, 2)
        self.stored: list[tuple[np.ndarray, int]] = []

    def check(self, what: str, pointers: Handle, mask: Handle | None) -> np.ndarray:
        """Addresses that take part; MemoryFaultError if one is outside all arguments."""
        addresses = np.asarray(pointers.data, dtype=np.uint64)
        if mask is not None:
            addresses = addresses[np.broadcast_to(mask.data, addresses.shape).astype(bool)]
        addresses = addresses.reshape(-1)
        size = np.uint64(max(1, pointers.get_element_ty().primitive_bitwidth // 8))
        starts, ends = self.spans[:, 0], self.spans[:, 1]
        inside = ((addresses[:, None] >= starts) & (addresses[:, None] + size <= ends)).any(1)
        if not inside.all():
            count = f"{int((~inside).sum())} of {addresses.size} lanes"
            raise MemoryFaultError(f"{what}: {count} outside every argument, program {program()}")
        return addresses

    def check_races(self, kernel: str) -> None:
        """MemoryFaultError if two programs stored to one address."""
        if not self.stored:
            return
        addresses = np.concatenate([part for part, _ in self.stored])
        programs = np.concatenate([np.full(len(part), number) for part, number in self.stored])
        order = np.lexsort((programs, addresses))
        addresses, programs = addresses[order], programs[order]
        shared = (addresses[1:] == addresses[:-1]) & (programs[1:] != programs[:-1])
        if shared.any():
            raise MemoryFaultError(f"{kernel}: {int(shared.sum())} addresses stored by more than one program")


def unwrapped(argument):
    """The tensor behind an argument, if it is one."""
    return getattr(argument, "base", argument) if not isinstance(argument, torch.Tensor) else argument


def span(tensor: torch.Tensor) -> tuple[int, int]:
    """First address and the one after the last."""
    start = tensor.data_ptr()
    if tensor.numel() == 0:
        return start, start
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (reach + 1) * tensor.element_size()


def program() -> tuple[int, ...]:
    return tuple(int(index) for index in interpreter.interpreter_builder.grid_idx)


def undefined(pointers: Handle) -> Handle:
    """What a masked load without `other` gives here: NaN, or the smallest integer."""
    kind = pointers.get_element_ty()
    numpy_kind = interpreter._get_np_dtype(kind)
    if kind == tl.bfloat16:
        fill = 0x7FC0
    else:
        fill = np.nan if numpy_kind.kind == "f" else np.iinfo(numpy_kind).min if numpy_kind.kind == "i" else 0
    return Handle(np.full(pointers.data.shape, fill, dtype=numpy_kind), kind)


@contextmanager
def watch_memory() -> Iterator[None]:
    """Check every kernel launched inside the `with`."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, launch = builder.create_masked_load, builder.create_masked_store, executor.__call__
    prepare = executor._init_args_hst
    current: list[Launch] = []

    def watched_prepare(self, arguments, named):
        prepared = prepare(self, arguments, named)
        current.append(Launch([*prepared[0], *prepared[1].values()]))
        return prepared

    def watched_launch(self, *arguments, **named):
        result = launch(self, *arguments, **named)
        current.pop().check_races(self.fn.__name__)
        return result

    def watched_load(self, pointers, mask, other, *rest):
        current[-1].check("load", pointers, mask)
        return load(self, pointers, mask, undefined(pointers) if other is None else other, *rest)

    def watched_store(self, pointers, value, mask, *rest):
        current[-1].stored.append((current[-1].check("store", pointers, mask), hash(program())))
        return store(self, pointers, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = watched_load, watched_store
    executor.__call__, executor._init_args_hst = watched_launch, watched_prepare
    try:
        yield
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
        executor.__call__, executor._init_args_hst = launch, prepare
