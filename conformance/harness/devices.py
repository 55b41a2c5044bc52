"""A backend's operators and modules on another device than the tests': arguments go there, results come back.

Strides survive the trip, and gradients take it too, so that a test need not know where its backend computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn


def moved(value: Any, device: str) -> Any:
    """`value` with all its tensors on `device`; containers and layouts keep their type."""
    if isinstance(value, Tensor):
        return moved_tensor(value, device)
    if isinstance(value, Mapping):
        return {name: moved(part, device) for name, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(moved(part, device) for part in value))
    if isinstance(value, list | tuple):
        return type(value)(moved(part, device) for part in value)
    if is_dataclass(value) and hasattr(value, "coords"):
        given = {part.name: getattr(value, part.name) for part in fields(value) if part.name[0] != "_"}
        return type(value)(**moved(given, device))
    return value


def moved_tensor(tensor: Tensor, device: str) -> Tensor:
    """The same values and strides, an expanded axis too; what has no memory stays where it is."""
    if tensor.device.type in (device, "meta"):
        return tensor
    expanded = [step == 0 and size > 1 for size, step in zip(tensor.shape, tensor.stride(), strict=True)]
    if any(expanded):
        once = tensor[tuple(slice(0, 1) if repeats else slice(None) for repeats in expanded)]
        return moved_tensor(once, device).expand(tensor.shape)
    if tensor.numel() == 0 or device == "cpu":
        return tensor.to(device)
    there = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return there.copy_(tensor)


def on_device(part: Any, device: str) -> Any:
    """An operator, or a module's class, that computes on `device`."""
    return module_on_device(part, device) if isinstance(part, type) else operator_on_device(part, device)


def operator_on_device(operator: Callable, device: str) -> Callable:
    @wraps(operator)
    def call(*given: Any, **named: Any) -> Any:
        return moved(operator(*moved(given, device), **moved(named, device)), "cpu")

    return call


class Call(nn.Module):
    """One class's forward on a module, its subclass's forward left out."""

    def __init__(self, kind: type[nn.Module], module: nn.Module) -> None:
        super().__init__()
        self.kind, self.module = kind, module

    def forward(self, *given: Any, **named: Any) -> Any:
        return self.kind.forward(self.module, *given, **named)


def module_on_device(kind: type[nn.Module], device: str) -> type[nn.Module]:
    """A subclass whose parameters stay where they are and whose forward pass runs on `device`."""

    class Elsewhere(kind):
        def forward(self, hidden_states: Tensor, *given: Any, **named: Any) -> Any:
            if hidden_states.device.type == device:  # a branch inside a block that is there already
                return super().forward(hidden_states, *given, **named)
            there = {f"module.{name}": moved_tensor(own, device) for name, own in self.named_parameters()}
            given = moved((hidden_states, *given), device)
            outputs = torch.func.functional_call(Call(kind, self), there, given, moved(named, device))
            return moved(outputs, "cpu")

    for branch in ("flex_ma_class", "local_swin_class"):
        if hasattr(kind, branch):
            setattr(Elsewhere, branch, module_on_device(getattr(kind, branch), device))
    Elsewhere.__name__ = Elsewhere.__qualname__ = kind.__name__
    return Elsewhere
