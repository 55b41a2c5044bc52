"""A CUDA graph's stand-in on a CPU: torch's operations, recorded once and repeated on the same memory.

As in a graph, nothing of Python runs again: numbers, shapes and choices stay what they were at capture, a
tensor that was not a static buffer keeps what it held, and what waits for the device fails.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
}


class Recorder(TorchDispatchMode):
    """Records each operation with its arguments and results, the tensors themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable, tuple, dict, list]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in WAITS:
            raise RuntimeError(f"{func} waits for the device, which cannot be captured")
        result = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, tree_flatten(result)[0]))
        return result


def tape(function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """A `Capture`: what repeats the function's operations, and what it returned."""
    function()
    with Recorder() as recorder:
        result = function()

    def replay() -> None:
        for func, args, kwargs, results in recorder.calls:
            given = {memory(leaf) for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)}
            again = tree_flatten(func(*args, **kwargs))[0]
            for old, new in zip(results, again, strict=True):
                if isinstance(old, Tensor) and memory(old) not in given:
                    assert old.shape == new.shape, f"{func}: {old.shape} at capture, {new.shape} now"
                    old.copy_(new)

    return replay, result


def memory(tensor: Tensor) -> int:
    """What two tensors over the same memory have in common."""
    return tensor.untyped_storage()._cdata
