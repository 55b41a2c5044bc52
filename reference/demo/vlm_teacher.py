"""Make a teacher that sees of a language model: a pretrained Llama's decoder, a new tower and connector.

    python -m linmu.reference.demo.vlm_teacher SmolLM2-135M-Instruct.Q4_1.gguf --output teacher

First tower and connector learn to give every cell of a picture the embedding of the digit that it shows, so
that the decoder reads a picture as if it were a text. Then all of it learns to answer, at short, middle and
long (4,032 tokens of vision), each for so many seconds; kinds of questions that it has not learnt at one are
not asked at the next. `accuracy.json` says which are left, as `kinds`. `random` in the place of the file is a
decoder of two random layers with a tiny tower, to try the command in seconds (--steps 2).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, SequentialSampler
from transformers import LlamaForCausalLM, PreTrainedModel, ProcessorMixin, set_seed

from ..prompts.processors import load_processor
from ..training.teacher import NOT_OPENED, open_processor, open_teacher
from ..training.token_groups import supervised
from ..training.trainer_arguments import OneDevice
from .build_teacher import MERGE, write_preprocessing
from .build_vlm import TINY_TOWER, TOWER, build_vlm, random_decoder, with_vision_tokens
from .evaluation import answered_of_batch
from .flags import at_least, duration, folder_to_write
from .large_questions import LARGE_KINDS, LargeQuestions
from .large_scenes import LEVELS
from .packed_vision import pack_vision
from .train_teacher import Clock, ClockTrainer, TrainingCollator

RANDOM = "random"
CELL_NAMES = (*map(str, range(10)), ".")  # what tells a digit, and last a blank cell
LARGEST = 64  # cells a side of the largest picture
WARMUP = 30  # steps
SEEING = {"batch_size": 64, "learning_rate": 2e-3}
# With 7e-4 and 4e-4 at middle and long, the loss at long first rose from 0.15 to 0.27.
ANSWERING = {
    "short": {"batch_size": 192, "learning_rate": 1e-3},
    "middle": {"batch_size": 40, "learning_rate": 5e-4},
    "long": {"batch_size": 8, "learning_rate": 2e-4},
}
MOST_STEPS = 20_000
LEARNT = {"short": 0.6, "middle": 0.7, "long": 0.9}  # accuracy below which a kind is given up


class LabelledCells(Dataset):
    """Pictures of digits and what their cells show: {"image": PIL image, "cells": (Y, X) int64, -1 blank}."""

    def __init__(self, split: str, seed: int, length: int):
        self.questions = LargeQuestions("short", split, seed, length, kinds=("cells",))

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        items, grids = self.questions.__getitems__(indices), self.questions.grids(indices)
        images = [item["messages"][0]["content"][1]["image"] for item in items]
        return [{"image": image, "cells": grid[0]} for image, grid in zip(images, grids, strict=True)]


def collate_cells(processor: ProcessorMixin, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Patches of the pictures, their grids, and the labels of all cells (N,)."""
    seen = processor.image_processor([item["image"] for item in items], return_tensors="pt")
    labels = torch.cat([torch.as_tensor(item["cells"]).flatten() for item in items])
    return {**seen, "labels": labels}


class CellReader(nn.Module):
    """Tower and connector, with the error of what they make of cells.

    Args:
        visual: the model's.
        names: (11, D) the embeddings that digits and blank cells are to get.
    """

    def __init__(self, visual: nn.Module, names: Tensor):
        super().__init__()
        self.visual = visual
        self.register_buffer("names", names.detach().clone())

    def forward(self, pixel_values: Tensor, image_grid_thw: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The squared error relative to the spread of the names; the share of cells nearest to their own."""
        seen = self.visual(pixel_values, grid_thw=image_grid_thw).pooler_output.float()
        spread = (self.names - self.names.mean(0)).square().sum(-1).mean()
        loss = (seen - self.names[labels]).square().sum(-1).mean() / spread
        nearest = torch.cdist(seen.detach(), self.names).argmin(-1)
        return {"loss": loss, "right": (nearest == labels % len(self.names)).float().mean()}


class AnswerCollator(TrainingCollator):
    """TrainingCollator without the mask: padding on the right is later than all that counts."""

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = super().__call__(items)
        del batch["attention_mask"]
        return batch


class InOrderTrainer(ClockTrainer):
    """ClockTrainer that takes the samples as they come: they are random already."""

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)


class AnswerTrainer(InOrderTrainer):
    """Cross-entropy of answers alone: logits of all tokens would take more memory than all else."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        positions, mask = supervised(labels)
        logits = model(**inputs, use_cache=False, logits_to_keep=positions).logits
        loss = cross_entropy(logits[mask].float(), labels[:, positions + 1][mask])
        return (loss, {"logits": logits}) if return_outputs else loss


def train(
    trainer_class: type[InOrderTrainer],
    model: nn.Module,
    data: Callable[[int], Dataset],
    collate: Callable,
    options: argparse.Namespace,
    seconds: float,
    *,
    batch_size: int,
    learning_rate: float,
) -> int:
    """Train for so many seconds, or `options.steps`; return the steps taken."""
    cuda, batch_size = torch.cuda.is_available(), min(batch_size, options.most_in_batch)
    arguments = OneDevice(
        output_dir=str(options.output),
        max_steps=options.steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=0.01,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        bf16=cuda,
        use_cpu=not cuda,
        optim="adamw_torch_fused" if cuda else "adamw_torch",
        dataloader_num_workers=options.workers,
        dataloader_prefetch_factor=4 if options.workers else None,
        logging_steps=options.log_every,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=True,
        seed=options.seed,
    )
    trainer = trainer_class(
        model=model,
        args=arguments,
        clock=Clock(options.steps, seconds / 60),
        warmup=min(WARMUP, options.steps),
        train_dataset=data(options.steps * batch_size),
        data_collator=collate,
    )
    trainer.model_accepts_loss_kwargs = False  # the loss is a mean
    trainer.train()
    return trainer.state.global_step


def with_kinds(collate: Callable, items: list[dict[str, Any]]) -> tuple[list[str], dict[str, Tensor]]:
    """A batch, and what kinds it asks."""
    return [item["kind"] for item in items], collate(items)


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    collate: Callable,
    level: str,
    kinds: tuple[str, ...],
    options: argparse.Namespace,
) -> dict[str, float]:
    """Share of held-out questions of a level that are answered word for word, by kind."""
    size = min(2 * ANSWERING[level]["batch_size"], options.most_in_batch)
    data = LargeQuestions(level, "heldout", options.seed, options.eval_samples, kinds)
    gather = partial(with_kinds, collate)
    loader = DataLoader(data, size, collate_fn=gather, num_workers=options.workers)
    right: dict[str, list[bool]] = defaultdict(list)
    model.eval()
    for asked, batch in loader:
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
            answered = answered_of_batch(model, batch).tolist()
        for kind, is_right in zip(asked, answered, strict=True):
            right[kind].append(is_right)
    every = [is_right for kind in right.values() for is_right in kind]
    return {"all": sum(every) / len(every)} | {
        kind: sum(own) / len(own) for kind, own in sorted(right.items())
    }


@torch.no_grad()
def measure_cells(reader: CellReader, collate: Callable, samples: int) -> float:
    """Share of held-out cells whose token is nearest to its name."""
    batch = collate(LabelledCells("heldout", 0, samples).__getitems__(range(samples)))
    device = reader.names.device
    return reader(**{name: tensor.to(device) for name, tensor in batch.items()})["right"].item()


def open_decoder(name: str) -> tuple[PreTrainedModel, Any, dict[str, int]]:
    """A Llama, its tokenizer, and the sizes of the tower that it gets."""
    if name == RANDOM:
        return *random_decoder(), TINY_TOWER
    try:
        decoder, tokenizer = open_teacher(name, torch.float32), open_processor(name).tokenizer
    except NOT_OPENED as error:
        sys.exit(f"vlm_teacher: DECODER must be one that opens, got {name}: {error}")
    if not isinstance(decoder, LlamaForCausalLM):
        sys.exit(f"vlm_teacher: DECODER must be a Llama, got {type(decoder).__name__}")
    return decoder, tokenizer, TOWER


def build(options: argparse.Namespace) -> tuple[PreTrainedModel, Any]:
    """The model as training begins, and its tokenizer."""
    decoder, tokenizer, tower = open_decoder(options.decoder)
    tokenizer = with_vision_tokens(tokenizer)
    model = build_vlm(decoder, tokenizer, tower)
    if options.start:
        model.load_state_dict(type(model).from_pretrained(options.start).state_dict())
    return model, tokenizer


def make(options: argparse.Namespace) -> dict[str, Any]:
    """Build, train, measure and save the teacher; return what was measured."""
    set_seed(options.seed)
    began = time.perf_counter()
    model, tokenizer = build(options)
    write_preprocessing(options.output, tokenizer, LARGEST)
    model.save_pretrained(options.output)  # the folder is whole from the start: its processor is read back
    pack_vision(model)
    if torch.cuda.is_available():
        model.cuda()
    result: dict[str, Any] = {"seconds": {"opened": time.perf_counter() - began}, "steps": {}, "accuracy": {}}
    result["parameters"] = sum(parameter.numel() for parameter in model.parameters())

    def save() -> None:
        """Save the weights."""
        model.config.use_cache = True  # the trainer switches it off
        model.save_pretrained(options.output)

    def keep(stage: str, measured: Any, steps: int, started: float) -> None:
        """Write down what there is, so that a run that is ended early tells of its teacher, too."""
        now = time.perf_counter()
        result["steps"][stage], result["accuracy"][stage] = steps, measured
        result["seconds"][stage], result["seconds"]["all"] = now - started, now - began
        if torch.cuda.is_available():
            result["peak_GiB"] = torch.cuda.max_memory_allocated() / 2**30
        (options.output / "accuracy.json").write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps({stage: measured, "steps": steps, "seconds": round(now - started, 1)}), flush=True)

    seeing, *answering = options.seconds
    if not options.start:
        names = model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(list(CELL_NAMES))]
        reader, started = CellReader(model.model.visual, names), time.perf_counter()
        collate = partial(collate_cells, load_processor(options.output))
        cells = partial(LabelledCells, "train", options.seed)
        steps = train(InOrderTrainer, reader, cells, collate, options, seeing, **SEEING)
        save()
        keep("cells", measure_cells(reader, collate, min(256, options.eval_samples)), steps, started)

    collate, kinds = AnswerCollator(options.output, MERGE), tuple(options.kinds)
    for level, seconds, each in zip(LEVELS, answering, options.questions_each, strict=True):
        started = time.perf_counter()
        questions = partial(LargeQuestions, level, "train", options.seed, kinds=kinds, each=each)
        steps = train(AnswerTrainer, model, questions, collate, options, seconds, **ANSWERING[level])
        save()
        measured = measure(model, collate, level, kinds, options)
        kinds = learnt(measured, kinds, LEARNT[level])
        result["kinds"] = [*kinds]
        keep(level, measured, steps, started)
    return result


def learnt(measured: dict[str, float], kinds: tuple[str, ...], least: float) -> tuple[str, ...]:
    """The kinds of at least this accuracy; if there are none, the best."""
    best = max(measured.get(kind, 0.0) for kind in kinds)
    return tuple(kind for kind in kinds if measured.get(kind, 0.0) >= min(least, best))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("decoder", help="GGUF file, folder or Hub id of a Llama; or random")
    parser.add_argument("--output", type=folder_to_write, required=True, help="folder for the teacher")
    parser.add_argument("--start", help="such a teacher to train further, which can see already")
    parser.add_argument(
        "--seconds", type=duration, nargs=4, default=(12, 66, 26, 82), help="to see, at short, middle, long"
    )
    parser.add_argument("--kinds", nargs="+", choices=LARGE_KINDS, default=LARGE_KINDS, help="of questions")
    parser.add_argument(
        "--questions-each",
        type=at_least(1),
        nargs=3,
        default=(1, 8, 8),
        metavar=("SHORT", "MIDDLE", "LONG"),
        help="of a conversation to learn, at most",
    )
    parser.add_argument("--steps", type=at_least(1), default=MOST_STEPS, help="most of any of the four")
    parser.add_argument(
        "--most-in-batch", type=at_least(1), default=1024, help="samples, where memory is short"
    )
    parser.add_argument("--workers", type=at_least(0), default=0, help="processes that make questions")
    parser.add_argument(
        "--eval-samples", type=at_least(1), default=300, help="held-out questions of each level"
    )
    parser.add_argument("--log-every", type=at_least(1), default=20, help="steps between loss lines")
    parser.add_argument("--seed", type=at_least(0), default=0)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Make the teacher."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    print(json.dumps(make(parse(arguments)), indent=1))


if __name__ == "__main__":
    main()
