"""Torch's private state, asked here and nowhere else: does anything observe a call?

A registered operator passes torch's dispatcher, the autograd wrapper and the checks of its schema: 15 µs of
the host a call, as long as a small kernel runs. They are needed only when autograd, torch.compile, a tracer,
a mode or a tensor subclass observes the call. Otherwise `engine.operator` skips them. In the same way a
projection whose module has no hooks may be read by a kernel instead of being called.

`LINMU_SHORTCUTS=0`, or `allow_shortcuts(False)`, turns all of this off: nothing private is asked, every
operator goes through the dispatcher, every module is called. Results are the same but for rounding. Use it if
a release of torch renames something below, or adds a mode that is not listed.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

CONSTANTS = (type(None), bool, int, float, str)

_shortcuts = os.environ.get("LINMU_SHORTCUTS") != "0"


def allow_shortcuts(allowed: bool) -> None:
    """Allow calls that nothing observes to skip torch's dispatcher, which is the default, or not."""
    global _shortcuts
    _shortcuts = allowed


def is_observed() -> bool:
    """Whether a compiler, a tracer, a mode, a transform or forward-mode autograd follows what is called."""
    return (
        not _shortcuts
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def is_plain(argument: Any) -> bool:
    """Whether it is a constant, or memory that a kernel may read as it is and autograd does not record; or a
    list of these.
    """
    kind = type(argument)
    if kind is Tensor or kind is nn.Parameter:
        recorded = argument.requires_grad and torch.is_grad_enabled()
        materialised = not argument.is_neg()  # a lazy negation is not in memory yet
        return materialised and not (recorded or argument.is_meta)
    return kind in CONSTANTS or (kind is list and all(map(is_plain, argument)))


def has_no_hooks(module: nn.Module) -> bool:
    """Whether calling `module` is its class's forward and nothing else: no hooks, no forward put over it."""
    if not _shortcuts:
        return False
    hooks = module._forward_hooks or module._forward_pre_hooks
    return not (hooks or module._backward_hooks or module._backward_pre_hooks or "forward" in module.__dict__)
