"""What a run is taught on and measured on, from the flags that say so."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import ConcatDataset, Dataset

from ...demo import DigitsQuestions
from ...prompts.chat_collator import ChatCollator
from ..commands.command_line import RefusedError
from .conversations import ENDLESS, Conversations, InOrder, Mixture, order_of
from .sources import open_rows

if TYPE_CHECKING:
    from distill import Config

HELD_OUT = 20  # one sample in so many is held out unless --eval_data names others


def open_data(
    config: Config, encoder: ChatCollator, report: Path, world_size: int
) -> tuple[Dataset, Dataset]:
    """Training and held-out samples; held-out ones keep their messages.

    Args:
        config: the flags.
        encoder: makes tensors of samples.
        report: file that is told which samples were skipped.
        world_size: processes that share a batch.
    Raises:
        RefusedError: if there are no such data.
    """
    if config.data == "demo":
        return tuple(DigitsQuestions(split, config.seed, ENDLESS) for split in ("train", "heldout"))
    try:
        sources, weights = zip(*map(parse_weight, config.data.split(",")), strict=True)
        parts = [open_dataset(config, source, encoder.encode, report, config.streaming) for source in sources]
        if config.eval_data:
            held_out = open_held_out(config, config.eval_data, encoder, report)
        else:
            parts, held_out = zip(*(part.split(every=HELD_OUT) for part in parts), strict=True)
            for part in held_out:
                part.prepare = partial(with_tensors, encoder)
    except (ValueError, OSError) as error:
        raise RefusedError(str(error)) from error
    if len(parts) == 1:
        return parts[0], held_out[0] if len(held_out) == 1 else ConcatDataset(held_out)
    group = config.batch_size * world_size if config.group_by_length else 0
    return Mixture(parts, weights, config.seed, group), ConcatDataset(held_out)


def open_held_out(config: Config, names: str, encoder: ChatCollator, report: Path) -> list[Dataset]:
    """Data sets to measure on, as they stand; weights do not count."""
    if names == "demo":
        return [DigitsQuestions("heldout", config.seed, ENDLESS)]
    try:
        sources = [parse_weight(name)[0] for name in names.split(",")]
        return [open_dataset(config, source, partial(with_tensors, encoder), report) for source in sources]
    except (ValueError, OSError) as error:
        raise RefusedError(str(error)) from error


def parse_weight(source: str) -> tuple[str, float]:
    """ "a.jsonl@2" -> ("a.jsonl", 2.0); without a weight 1."""
    name, _, weight = source.partition("@")
    try:
        return name, float(weight or 1)
    except ValueError:
        raise RefusedError(f"distill: a weight in --data must be a number, got {weight!r}") from None


def open_dataset(
    config: Config, source: str, prepare: Any, report: Path, streaming: bool = False
) -> Conversations:
    """One data set of conversations."""
    rows = open_rows(source, streaming, config.seed)
    options = (config.on_broken, config.max_frames, config.max_pixels)
    return Conversations(rows, *options, prepare=prepare, report=report)


def with_tensors(encoder: ChatCollator, item: dict[str, Any]) -> dict[str, Any]:
    """A sample with its tensors."""
    return item | encoder.encode(item)


def in_order(config: Config, training: Dataset, samples: int, seen: int, world_size: int) -> InOrder:
    """The samples of a stage, after those that earlier stages have seen."""
    endless = config.data == "demo" or isinstance(training, Mixture)  # in an order already
    seed = None if endless else order_of(training, config.seed)
    grouped = config.group_by_length and seed is not None
    return InOrder(training, samples, seed, seen, config.batch_size * world_size if grouped else 0)
