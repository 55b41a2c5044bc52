"""Types of Triton's language, worked out once for all tensors of one shape.

The interpreter makes several tensors in each operation, and triton builds and checks the type and the shape
of every one anew, element by element: half of the interpreter's time.
"""

from __future__ import annotations

import dataclasses
import math
from functools import cache, wraps

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def remember_types() -> None:
    """Work out block types, the shapes of tensors, and numpy's dtypes once each, for this process."""
    interpreter._get_np_dtype = remembered_dtype(interpreter._get_np_dtype)
    tl.core.block_type.__init__ = remembered_block(tl.core.block_type.__init__)
    tl.core.tensor.__init__ = begin_tensor
    tl.core.dtype.__eq__ = equal_by_name(tl.core.dtype.__eq__)
    TritonSemantic.broadcast_impl_value = broadcast_if_needed(TritonSemantic.broadcast_impl_value)
    # Without `debug`, the interpreter computes what would show an overflow and does not look at it.
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)


def equal_by_name(original):
    """Scalar types, which are most of what is compared."""

    @wraps(original)
    def equal(self, other):
        return self.name == other.name if type(other) is tl.core.dtype else original(self, other)

    return equal


def remembered_dtype(original):
    known: dict[str, np.dtype] = {}

    @wraps(original)
    def numpy_dtype(kind):
        name = kind.scalar.name
        if name not in known:
            known[name] = original(kind)
        return known[name]

    return numpy_dtype


def remembered_block(original):
    known: dict[tuple, dict] = {}  # all of an instance, by the id of its elements' type and by its sides
    shapes: dict[tuple, tl.tuple] = {}  # one for all types of elements, to be compared by `is`

    @wraps(original)
    def begin(self, element_ty, shape):
        sides = tuple([getattr(side, "value", side) for side in shape])
        key = (id(element_ty), sides)
        if key not in known:
            original(self, element_ty, shape)
            self.shape = shapes.setdefault(sides, self.shape)
            known[key] = dict(self.__dict__)  # element_ty too, so that no other type gets its id
        self.__dict__.update(known[key])

    return begin


@cache
def extent(sides: tuple[int, ...]) -> tuple[tl.constexpr, tl.tuple]:
    """What a tensor knows of its shape: the number of its elements, and its sides."""
    return tl.constexpr(math.prod(sides)), tl.tuple([tl.constexpr(side) for side in sides])


def begin_tensor(self, handle, type) -> None:
    """As the original does."""
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.numel, self.shape = extent(tuple(type.shape.values) if type.is_block() else ())


def broadcast_if_needed(original):
    @wraps(original)
    def broadcast(self, left, right):
        if getattr(left.type, "shape", None) is getattr(right.type, "shape", None):
            return left, right
        return original(self, left, right)

    return broadcast
