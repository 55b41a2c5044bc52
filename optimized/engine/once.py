"""What all layers of a forward have in common, made by the first of them: spans of keys, weights in parts."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

_of_forward: ContextVar[dict[Hashable, Any] | None] = ContextVar("found in a forward", default=None)


@contextmanager
def one_forward(found: dict[Hashable, Any] | None = None) -> Iterator[None]:
    """Within, what asks `once_a_forward` are the layers of one forward, over the same tokens, masks and
    `present` of states.

    `found` is added to: a forward that is entered again with it goes on. None = it begins.
    """
    before = _of_forward.set({} if found is None else found)
    try:
        yield
    finally:
        _of_forward.reset(before)


def once_a_forward(key: Hashable, make: Callable[[], Any]) -> Any:
    """What `make` returns, made by the first layer within `one_forward`, and by every caller outside."""
    known = None if torch.compiler.is_compiling() else _of_forward.get()
    if known is None:
        return make()
    if key not in known:
        known[key] = make()
    return known[key]
