"""Triton's language, replaced by functions that compute once a launch, not once a call.

triton does it again for every call of a device function, though its launch has done it: a third to half of
the interpreter's time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, wraps

import triton.language as tl
from triton.runtime import interpreter


def patch_once_a_launch() -> None:
    """Let a device function rely on what its launch has replaced, for this process."""
    original, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    replaced: set[int] = set()

    @cache
    def modules(function: Callable) -> frozenset[int]:
        seen = (value for value in function.__globals__.values() if inspect.ismodule(value))
        return frozenset(id(value) for value in seen if value in (tl, tl.core))

    @wraps(original)
    def patch(function):
        if replaced and modules(function) <= replaced:
            return None
        replaced.update(modules(function))
        return original(function)

    @wraps(launch)
    def begin(self, *arguments, **named):
        replaced.clear()
        return launch(self, *arguments, **named)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch, begin
