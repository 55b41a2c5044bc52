"""`transformers.Trainer` for one stage of distillation: its losses, its learning rates, its checkpoints.

A checkpoint holds what the stage may change (M-MATE and adapters), the optimizer, the schedule, the step and
the random state; the data's order is a function of the step, so a resumed run sees what an unbroken one would
have seen.
"""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import SequentialSampler
from tqdm import tqdm
from transformers import Trainer, TrainerCallback

from .checks import require
from .lesson import Objective

STAGES = ("i", "ii", "iii")


@dataclass(frozen=True)
class Stage:
    """What a stage trains, on what, and how fast.

    Args:
        name: i, ii or iii.
        trained: parts of parameter names that are trained.
        routes: objectives, each for an equal share of the steps.
        lr_new, lr_copied, lr_lora: learning rates of tensors without and with an ancestor in the teacher, and
        adapters.
    """

    name: str
    trained: tuple[str, ...]
    routes: tuple[Objective, ...]
    lr_new: float
    lr_copied: float
    lr_lora: float = 0.0


class StageTrainer(Trainer):
    """`transformers.Trainer` for one stage: its routes, its learning rates, and checkpoints of what is
    trained."""

    def __init__(self, stage: Stage, new_names: set[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.stage, self.new_names = stage, new_names
        self.model_accepts_loss_kwargs = False  # Lesson's **kwargs are the model's, and its loss is a mean
        self.terms: dict[str, list[torch.Tensor]] = defaultdict(list)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        routes = self.stage.routes
        self.model.objective = routes[self.state.global_step * len(routes) // self.state.max_steps]
        terms = model(**inputs)
        for name, value in terms.items():
            self.terms[name].append(value.detach())
        return (terms["loss"], terms) if return_outputs else terms["loss"]

    def mean_terms(self) -> dict[str, float]:
        """Means of the loss's terms since the last call."""
        means = {name: float(torch.stack(values).mean()) for name, values in self.terms.items()}
        self.terms.clear()
        return means

    def create_optimizer(self, model=None):
        groups: dict[float, list[torch.nn.Parameter]] = defaultdict(list)
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                groups[self.learning_rate(name)].append(parameter)
        kind, options = self.get_optimizer_cls_and_kwargs(self.args)
        self.optimizer = kind([{"params": group, "lr": rate} for rate, group in groups.items()], **options)
        return self.optimizer

    def learning_rate(self, name: str) -> float:
        """Adapters, tensors without an ancestor in the teacher, and copied ones learn at different rates."""
        if "lora_" in name:
            return self.stage.lr_lora
        return self.stage.lr_new if name.split(".mixer.")[-1] in self.new_names else self.stage.lr_copied

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(
            self.train_dataset
        )  # InOrder has shuffled: a resumed run sees the same samples

    def _save(self, output_dir=None, state_dict=None):
        if self.args.should_save:
            os.makedirs(output_dir, exist_ok=True)
            save_file(taught_tensors(self.model.student), Path(output_dir) / "taught.safetensors")

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        load_taught(self.model.student, Path(resume_from_checkpoint) / "taught.safetensors")


class Progress(TrainerCallback):
    """A bar per stage on stderr, and a line of `metrics.jsonl` for every logged step."""

    def __init__(self, trainer: StageTrainer, path: Path) -> None:
        self.trainer, self.path = trainer, path
        self.bar: tqdm | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.started, self.tokens = time.perf_counter(), state.num_input_tokens_seen
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc=f"stage {self.trainer.stage.name}",
            unit="step", disable=not state.is_world_process_zero, dynamic_ncols=True,
        )  # fmt: skip

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(1)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs or not state.is_world_process_zero:
            return
        rate = (state.num_input_tokens_seen - self.tokens) / (time.perf_counter() - self.started)
        metrics = {"stage": self.trainer.stage.name, "step": state.global_step} | self.trainer.mean_terms()
        metrics |= {"lr": logs["learning_rate"], "grad_norm": logs["grad_norm"], "tokens_per_second": rate}
        memory = {}
        if torch.cuda.is_available():
            memory = {"GiB": f"{torch.cuda.max_memory_allocated() / 2**30:.1f}"}
        self.bar.set_postfix({"loss": f"{metrics['loss']:.4f}", "tokens/s": f"{rate:.0f}"} | memory)
        append_json(self.path, metrics)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def taught_tensors(student: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor that distillation may change: M-MATE and adapters."""
    return {
        name: tensor.detach().contiguous()
        for name, tensor in student.named_parameters()
        if ".mixer." in name or "lora_" in name
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
        student.get_parameter(name).copy_(tensor)


def append_json(path: Path, values: dict[str, Any]) -> None:
    """Add a line to a JSONL file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")
