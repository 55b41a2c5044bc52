"""Ask which variants of its kernels Triton would compile for prompts that a server has warmed up for: none.
Started by test_kernels.py. The kernels do not run.

    TRITON_INTERPRET=1 python trial_warm_up.py
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from triton.runtime.interpreter import InterpretedFunction

from linmu import optimized
from linmu.optimized.serving.vllm_plugin.warm_up import warm_up

COMPILED: set[tuple] = set()


def compile_only(self, *given, grid, warmup, **options) -> None:
    """Note what Triton's own compiler would know of the arguments, in place of a launch."""
    parameters, unread = inspect.signature(self.fn).parameters, self.kwargs.get("do_not_specialize") or ()
    known = dict(zip(parameters, given, strict=False)) | options
    found = {
        name: value
        if "constexpr" in str(getattr(parameters.get(name), "annotation", "constexpr"))
        else kind(value)
        for name, value in known.items()
        if name not in unread
    }
    COMPILED.add((self.fn.__name__, *sorted((name, str(value)) for name, value in found.items())))


def kind(value: Any) -> Any:
    """Return what a variant is compiled for of an argument."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16
    if isinstance(value, int):
        return value == 1, value % 16 == 0
    return type(value)


@torch.no_grad()
def main() -> None:
    """Raises if a prompt needs a variant that the warm-up did not."""
    InterpretedFunction.run = compile_only
    optimized.set_engine("triton")
    config = optimized.LinMUConfig(width=32, heads=4, groups=2, head_dim=16, text_window=128)
    block = optimized.MMATE(config, 0)
    warm_up(block, {})
    warmed = set(COMPILED)
    assert len(warmed) > 40, len(warmed)
    for rows, length in ((1, 1000), (5, 177), (2, 30), (16, 70)):
        at = torch.arange(length)
        for valid in (None, at >= torch.arange(rows)[:, None]) if rows > 1 else (None,):
            state, angles = None, (torch.zeros(rows, length, 16),) * 2
            for _ in range(2):
                u = torch.zeros(rows, length, 32)
                _, state = block(u, valid=valid, position_embeddings=angles, state=state)
                assert not COMPILED - warmed, (rows, length, valid is None, COMPILED - warmed)


if __name__ == "__main__":
    main()
