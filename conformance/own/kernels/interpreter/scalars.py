"""Scalars in Triton's interpreter: arrays of one element, which numpy 2.4 no longer takes for a number.

triton 3.6 calls `int` on such an array; later versions squeeze it first, as is done here for all.
"""

from __future__ import annotations

from functools import wraps

from triton.runtime import interpreter


def mend_scalars() -> None:
    """Let a scalar tensor bound a loop, for this process."""
    original = interpreter._patch_lang_tensor

    @wraps(original)
    def patch(tensor, scope):
        original(tensor, scope)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())

    interpreter._patch_lang_tensor = patch
