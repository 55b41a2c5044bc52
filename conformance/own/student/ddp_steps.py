"""Two processes train students by plain DDP, one of them on text alone; gradients go to a folder."""

from __future__ import annotations

import datetime
import importlib
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .tiny_checkpoint import shake_mixers
from .tiny_families import BUILDERS, Tiny

STUDENTS = [
    ("qwen2_5_vl", "optimized"),
    ("qwen2_5_vl", "reference"),
    ("internvl", "optimized"),
    ("llama", "optimized"),
]
TOWERS = ("visual", "vision_tower", "vision_model", "multi_modal_projector", "connector", "image_newline")


def student_of(tiny: Tiny, package: str) -> nn.Module:
    """A student to be trained, its vision tower frozen."""
    student = shake_mixers(importlib.import_module(f"linmu.{package}").convert(tiny.teacher)).train()
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(not any(part in name for part in TOWERS))
    return student


def batches(tiny: Tiny) -> list[dict[str, torch.Tensor]]:
    """What each process learns from: text, and a picture where the family has any."""
    return [tiny.inputs("hello you dear"), tiny.inputs("a {wide} b" if tiny.image else "and you")]


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def train(folder: Path) -> None:
    """What each process does."""
    dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=5))
    for family, package in STUDENTS:
        tiny = BUILDERS[family]()
        model = DistributedDataParallel(student_of(tiny, package))
        inputs = batches(tiny)[dist.get_rank()]
        for _ in range(3):
            model.zero_grad()
            model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        if dist.get_rank() == 0:
            save_file(gradients(model.module), folder / f"{family}-{package}.safetensors")
    dist.barrier()
