"""A stage while it runs: a bar on stderr, and a line of `metrics.jsonl` for every logged step."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback

from .safety.atomic_writes import refused_by_disk, write_text

TERMS = ("loss", "mixer", "layer", "logits")


class Progress(TrainerCallback):
    """Tells how far a stage is.

    Args:
        stage: its name.
        path: of metrics.jsonl.
        shared: processes that count the same tokens.
    """

    def __init__(self, stage: str, path: Path, shared: int = 1) -> None:
        self.stage, self.path, self.shared = stage, path, shared
        self.bar: tqdm | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            forget_after(self.path, self.stage, state.global_step)
        self.started, self.tokens = time.perf_counter(), state.num_input_tokens_seen
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc=f"stage {self.stage}",
            unit="step", disable=not state.is_world_process_zero, dynamic_ncols=True,
        )  # fmt: skip

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(1)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs or not state.is_world_process_zero:
            return
        tokens = (state.num_input_tokens_seen - self.tokens) / self.shared
        rate = tokens / (time.perf_counter() - self.started)
        metrics = {"stage": self.stage, "step": state.global_step}
        metrics |= {term: logs[term] for term in TERMS if term in logs}
        metrics |= {"lr": logs["learning_rate"], "grad_norm": logs["grad_norm"], "tokens_per_second": rate}
        memory = {}
        if torch.cuda.is_available():
            memory = {"GiB": f"{torch.cuda.max_memory_allocated() / 2**30:.1f}"}
        self.bar.set_postfix({"loss": f"{metrics['loss']:.4f}", "tokens/s": f"{rate:.0f}"} | memory)
        append_json(self.path, metrics)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def append_json(path: Path, values: dict[str, Any]) -> None:
    """Add a line to a JSONL file."""
    with refused_by_disk(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`; a last one that was cut short by a kill does not count."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}\n")]


def forget_after(path: Path, stage: str, step: int) -> None:
    """Drop what was logged after the checkpoint at which a stage goes on: it will be logged again."""
    kept = [line for line in read_metrics(path) if line["stage"] != stage or line["step"] <= step]
    write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
