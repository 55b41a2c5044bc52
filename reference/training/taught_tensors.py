"""What a stage has taught: M-MATE and what it tunes of the MLPs, as tensors by name, to a file and back."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor, distribute_tensor

from ..checks import require
from .parameter_groups import belongs


def taught_tensors(student: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor that distillation may change, M-MATE and adapters, whole where it is spread over
    processes."""
    return {
        name: gathered(tensor.detach()).contiguous()
        for name, tensor in student.named_parameters()
        if belongs(name)
    }


@torch.no_grad()
def load_taught(student: torch.nn.Module, path: Path) -> None:
    """Put the tensors of a checkpoint in their places; refuse one that belongs to another student."""
    where = "load_taught"
    require(path.is_file(), where, "a checkpoint must hold taught.safetensors", path)
    saved, own = load_file(path), taught_tensors(student)
    differing = [name for name in own.keys() | saved.keys() if name not in own or name not in saved]
    differing += [name for name in own.keys() & saved.keys() if own[name].shape != saved[name].shape]
    got = f"{len(differing)} tensors that do not: {differing[:3]}"
    require(not differing, where, f"{path} must fit the student", got)
    for name, tensor in saved.items():
        parameter = student.get_parameter(name)
        if isinstance(parameter, DTensor):
            tensor = distribute_tensor(
                tensor.to(parameter.device), parameter.device_mesh, parameter.placements
            )
        parameter.copy_(tensor)


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with the parts that other processes hold."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
