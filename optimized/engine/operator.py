"""How a function becomes a registered operator, and when a call may go round its registration.

A registered operator passes torch's dispatcher, the autograd wrapper and the checks of its schema: 15 µs of
the host a call, as long as a small kernel runs. They serve those who look on: autograd, a compiler, a tracer,
modes, subclasses of tensors. With nobody there the function itself is called, which gives the same tensors.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

PLAIN = (type(None), bool, int, float)


def operator(name: str, mutates_args: Iterable[str] = ()) -> Callable:
    """`torch.library.custom_op` of `linmu::name`, with its `register_fake` and `register_autograd`, for calls
    by position.
    """

    def register(function: Callable) -> Callable:
        registered = torch.library.custom_op(f"linmu::{name}", function, mutates_args=mutates_args)
        names = list(inspect.signature(function).parameters)
        overwritten = [names.index(each) for each in mutates_args]

        @wraps(function)
        def call(*args):
            if is_watched() or not all(map(is_plain, args)):
                return registered(*args)
            for place in overwritten:
                tell_autograd(args[place])
            return function(*args)

        call.register_fake, call.register_autograd = registered.register_fake, registered.register_autograd
        return call

    return register


def is_watched() -> bool:
    """Whether a compiler, a tracer, a mode, a transform or forward-mode autograd follows what is called."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def is_plain(argument: Any) -> bool:
    """Whether it is a number, nothing, or memory that kernels may read as it stands, without a gradient; or a
    list of these.
    """
    kind = type(argument)
    if kind is Tensor or kind is nn.Parameter:
        recorded = argument.requires_grad and torch.is_grad_enabled()
        as_it_stands = not argument.is_neg()  # or its negation is yet to be done
        return as_it_stands and not (recorded or argument.is_meta)
    return kind in PLAIN or (kind is list and all(map(is_plain, argument)))


def tell_autograd(overwritten: Tensor) -> None:
    """As a registered operator does: a graph that saved the tensor before must not use it any more."""
    if not overwritten.is_inference():
        torch.autograd.graph.increment_version(overwritten)
