"""Tokens per second and memory of one optimizer step of each distillation stage.

A step is what `distill.py` does with a batch of one prompt: bfloat16 arithmetic on a GPU over float32 copies
of what is trained, layers recomputed in the backward pass, gradients clipped at 1, AdamW. The prompt comes
with its pixels, and its last tenth is supervised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from ...reference.training.config import PRESETS
from ...reference.training.parameter_groups import MIXER, belongs
from ...reference.training.safety.memory import leave_inputs_alone, recompute_layers
from ...reference.training.stages import Stage, stage_of
from ..student import convert
from ..training import Lesson, attach_teacher
from .cases import Case, values_of
from .kernels import OURS, Setting
from .models import Pair, build_teacher, video_inputs
from .problems import prompt
from .timing import time_calls

MLPS = r".*\.language_model\.layers\.\d+\.mlp\.(gate_proj|up_proj|down_proj)"
RANK = 16
ANSWERED = 0.1  # share of the prompt's tokens that are supervised, at its end
UNSUPERVISED = -100
LINES = {  # stage, and which of its objectives
    "stage i": ("i", 0),
    "stage ii, teacher's states": ("ii", 0),
    "stage ii, own states": ("ii", 1),
    "stage iii": ("iii", 0),
}


def training_cases(
    pair: Pair, lengths: Sequence[int], setting: Setting, priority: Callable[[str, int], int]
) -> Iterator[Case]:
    """A line per stage, route and length."""
    for name, (stage, place) in LINES.items():
        for length in lengths:
            run = partial(measure_step, pair, stage_of(stage, PRESETS["vlm"]), place, length, setting)
            yield Case("training", OURS, pair.size, name, length, run, priority(OURS, length))


def measure_step(pair: Pair, stage: Stage, place: int, length: int, setting: Setting) -> dict[str, Any]:
    """The values of one line, of one of the stage's objectives; student and optimizer are made for it and
    dropped."""
    pair.forget()
    student = taught_student(pair, setting)
    if stage.trains_mlps:
        get_peft_model(student, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=MLPS))
        leave_inputs_alone(student)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(belongs(name, stage.trained))
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    lesson = Lesson(student.train(), stage.objectives[place])
    optimizer = torch.optim.AdamW(trained, lr=stage.learning_rate_new, fused=setting.device.type == "cuda")
    batch = video_inputs(student, prompt(length), setting)
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, : -round(ANSWERED * length)] = UNSUPERVISED
    call = partial(train_step, lesson, optimizer, trained, batch, setting)
    timing = time_calls([call], setting.device, seconds=setting.seconds, most=10)
    values = values_of(timing, tokens_per_second=length / timing.seconds)
    lesson.close()
    return values | {"trained": sum(part.numel() for part in trained), "memory": timing.peak}


def taught_student(pair: Pair, setting: Setting) -> nn.Module:
    """A student with its teacher attached, frozen, M-MATE in float32, layers recomputed when needed."""
    teacher = build_teacher(pair.name, pair.layers, setting)
    student = convert(teacher)
    attach_teacher(student, teacher)
    student.requires_grad_(False)
    for name, parameter in student.named_parameters():
        if belongs(name, MIXER):
            parameter.data = parameter.data.float()
    recompute_layers(student)
    return student


def train_step(lesson: Lesson, optimizer, trained: list[nn.Parameter], batch, setting: Setting) -> None:
    """Forward, backward, clip, update."""
    enabled = setting.dtype != torch.float32
    with torch.autocast(setting.device.type, dtype=torch.bfloat16, enabled=enabled):
        loss = lesson(**batch)["loss"]
    loss.backward()
    nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
