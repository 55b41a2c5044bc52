"""Train the bundled teacher from nothing, on handwritten digits.

    python -m linmu.reference.demo.train_teacher --output DIR

The weights that come with this package are in `teacher/`; accuracy.json there has the commands that made
them and their accuracy on held-out handwriting.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoModelForImageTextToText,
    Trainer,
    TrainerCallback,
    set_seed,
)

from ..prompts.chat_collator import ChatCollator
from ..prompts.processors import load_processor
from ..training.trainer_arguments import OneDevice
from .build_teacher import MERGE, build_model, build_tokenizer, write_preprocessing
from .evaluation import best_guess, heldout_accuracy
from .flags import at_least, folder_to_write
from .packed_vision import pack_vision
from .questions import KINDS, DigitsQuestions


def rope_positions(batch: dict[str, torch.Tensor], merge: int) -> torch.Tensor:
    """Return the M-RoPE positions of rows with one picture each, a second per moment: (3, B, L) int64.

    The model would find them row by row; this does all rows at once, in the loader's workers.
    """
    kinds, valid = batch["mm_token_type_ids"], batch["attention_mask"]
    rows = kinds.amax(1)
    grid = rows.new_zeros(len(rows), 3)
    for kind, name in ((1, "image_grid_thw"), (2, "video_grid_thw")):
        if name in batch:
            grid[rows == kind] = batch[name]
    y, x = grid[:, 1:2] // merge, grid[:, 2:] // merge
    vision = (kinds > 0).long()
    text = valid.cumsum(1) - 1
    seen = vision.cumsum(1)
    after = (seen == seen[:, -1:]) & (vision == 0)
    text = torch.where(after, text - seen + torch.maximum(y, x), text)
    first = torch.where(vision.bool(), text, text.max()).amin(1, keepdim=True)
    place = (seen - 1).clamp(min=0)
    axes = torch.stack([place // (y * x), place % (y * x) // x, place % x])
    return torch.where(vision.bool(), first + axes, text) * valid


class TrainingCollator:
    """ChatCollator that also lays out the M-RoPE positions, so that the loader's workers do it."""

    def __init__(self, folder: Path, merge: int):
        self.collate = ChatCollator(load_processor(folder))
        self.merge = merge

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self.collate(items)
        return batch | {"position_ids": rope_positions(batch, self.merge)}


class Clock(TrainerCallback):
    """Measures progress in steps or minutes, whichever is further, and ends training when it is complete."""

    def __init__(self, steps: int, minutes: float):
        self.steps, self.seconds = steps, 60 * minutes
        self.start = time.monotonic()

    def progress(self, step: int) -> float:
        return min(1.0, max(step / self.steps, (time.monotonic() - self.start) / self.seconds))

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = self.progress(state.global_step) >= 1.0


class ClockTrainer(Trainer):
    """Trainer whose learning rate rises for `warmup` steps and falls as a cosine of the clock's progress."""

    def __init__(self, *args: Any, clock: Clock, warmup: int, **kwargs: Any):
        super().__init__(*args, callbacks=[clock], **kwargs)
        self.clock, self.warmup = clock, warmup

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """Return the schedule; it reads the clock at every step."""

        def rate(step: int) -> float:
            return (
                min(1.0, (step + 1) / self.warmup) * 0.5 * (1 + math.cos(math.pi * self.clock.progress(step)))
            )

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, rate)
        return self.lr_scheduler


def train(options: argparse.Namespace) -> int:
    """Train and save; return the number of steps taken."""
    set_seed(options.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    if options.start:
        model.load_state_dict(AutoModelForImageTextToText.from_pretrained(options.start).state_dict())
    write_preprocessing(options.output, tokenizer)
    model.save_pretrained(options.output)  # the folder is whole from the start: its processor is read back
    pack_vision(model)
    cuda = torch.cuda.is_available()
    arguments = OneDevice(
        output_dir=str(options.output),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        tf32=True if cuda else None,
        use_cpu=not cuda,
        optim="adamw_torch_fused" if cuda else "adamw_torch",
        dataloader_num_workers=options.workers,
        dataloader_prefetch_factor=8 if options.workers else None,
        logging_steps=options.log_every,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        seed=options.seed,
    )
    trainer = ClockTrainer(
        model=model,
        args=arguments,
        clock=Clock(options.steps, options.max_minutes),
        warmup=options.warmup,
        train_dataset=DigitsQuestions(
            "train", options.seed, length=options.steps * options.batch_size, kinds=options.kinds
        ),
        data_collator=TrainingCollator(options.output, MERGE),
    )
    trainer.train()
    model.config.use_cache = True  # the trainer switches it off
    model.save_pretrained(options.output)
    return trainer.state.global_step


def earlier_runs(start: Path | None) -> list[dict[str, Any]]:
    """Return the runs that made the weights this one started from."""
    return json.loads((start / "accuracy.json").read_text())["runs"] if start else []


def report(options: argparse.Namespace, steps: int) -> dict[str, Any]:
    """Evaluate the saved folder on held-out digits and write accuracy.json beside the weights."""
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else platform.machine()
    command = shlex.join(["python", "-m", "linmu.reference.demo.train_teacher", *sys.argv[1:]])
    torch.backends.cuda.matmul.allow_tf32 = False
    model = AutoModelForImageTextToText.from_pretrained(options.output).to("cuda" if cuda else "cpu")
    processor = load_processor(options.output)
    kinds = heldout_accuracy(model, processor, options.eval_per_kind, seed=options.eval_seed)
    result = {
        "split": "held-out images of handwritten digits, exact match of the whole answer by greedy decoding",
        "overall": sum(kinds.values()) / len(kinds),
        "kinds": kinds,
        "best_constant_answer": {kind: best_guess(kind) for kind in KINDS},
        "samples_per_kind": options.eval_per_kind,
        "evaluation_seed": options.eval_seed,
        "runs": [*earlier_runs(options.start), {"command": command, "steps": steps, "on": device}],
        "parameters": sum(p.numel() for p in model.parameters()),
        "date": date.today().isoformat(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    (options.output / "accuracy.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=folder_to_write, required=True, help="folder for the teacher")
    parser.add_argument("--start", type=Path, help="teacher to train further; default: fresh weights")
    parser.add_argument("--steps", type=at_least(1), default=12_000, help="optimiser steps")
    parser.add_argument(
        "--max-minutes", type=float, default=1e9, help="end, learning rate and all, by this time"
    )
    parser.add_argument("--batch-size", type=at_least(1), default=512, help="questions per step")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="at the end of the warm-up")
    parser.add_argument("--warmup", type=at_least(0), default=300, help="steps of warm-up")
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--workers", type=at_least(0), default=0, help="processes that compose pictures")
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=KINDS, help="one named twice is asked twice as often"
    )
    parser.add_argument("--log-every", type=at_least(1), default=100, help="steps between loss lines")
    parser.add_argument("--eval-per-kind", type=at_least(1), default=1000, help="of each kind, held out")
    parser.add_argument("--eval-seed", type=at_least(0), default=1234)
    return parser.parse_args(arguments)


def main() -> None:
    """Train, save, evaluate what was saved."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    options = parse()
    print(json.dumps(report(options, train(options)), indent=2))


if __name__ == "__main__":
    main()
