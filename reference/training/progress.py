"""A stage while it runs: a bar on stderr, and a line of `metrics.jsonl` for every logged step."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import TrainerCallback

from .metrics import append_json, forget_after
from .stages import StageTrainer

TERMS = ("loss", "mixer", "block", "logits")


class Progress(TrainerCallback):
    """A bar per stage on stderr, and a line of `metrics.jsonl` for every logged step."""

    def __init__(self, trainer: StageTrainer, path: Path) -> None:
        self.trainer, self.path = trainer, path
        self.bar: tqdm | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            forget_after(self.path, self.trainer.stage.name, state.global_step)
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
        metrics = {"stage": self.trainer.stage.name, "step": state.global_step}
        metrics |= {term: logs[term] for term in TERMS if term in logs}
        metrics |= {"lr": logs["learning_rate"], "grad_norm": logs["grad_norm"], "tokens_per_second": rate}
        memory = {}
        if torch.cuda.is_available():
            memory = {"GiB": f"{torch.cuda.max_memory_allocated() / 2**30:.1f}"}
        self.bar.set_postfix({"loss": f"{metrics['loss']:.4f}", "tokens/s": f"{rate:.0f}"} | memory)
        append_json(self.path, metrics)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()
