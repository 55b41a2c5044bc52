"""How often a model answers the demo's questions, kind by kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin

from ..prompts.chat_collator import ChatCollator
from ..training.token_groups import supervised
from .questions import KINDS, DigitsQuestions


@torch.no_grad()
def answered(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    items: Sequence[Mapping[str, Any]],
    batch_size: int = 64,
) -> torch.Tensor:
    """Say which items the model would answer word for word by greedy decoding, end of turn included.

    Greedy decoding produces an answer exactly if each of its tokens is the likeliest after the ones before,
    so one forward pass decides.

    Returns:
        (items,) bool on the CPU.
    """
    collate = ChatCollator(processor)
    right = []
    for start in range(0, len(items), batch_size):
        batch = {k: v.to(model.device) for k, v in collate(items[start : start + batch_size]).items()}
        right.append(answered_of_batch(model, batch).cpu())
    return torch.cat(right)


@torch.no_grad()
def answered_of_batch(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The same of a batch that ChatCollator made: (B,) bool."""
    inputs, labels = dict(batch), batch["labels"]
    del inputs["labels"]
    positions, mask = supervised(labels)
    guesses = model(**inputs, use_cache=False, logits_to_keep=positions).logits.argmax(-1)
    return ((guesses == labels[:, positions + 1]) | ~mask).all(1)


def heldout_accuracy(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    samples_per_kind: int,
    *,
    seed: int = 0,
    batch_size: int = 64,
    split: str = "heldout",
) -> dict[str, float]:
    """Return the accuracy of each kind on fresh questions about held-out digits."""
    model.eval()
    accuracy = {}
    for kind in KINDS:
        items = DigitsQuestions(split, seed, kinds=(kind,)).__getitems__(range(samples_per_kind))
        accuracy[kind] = answered(model, processor, items, batch_size).double().mean().item()
    return accuracy


def best_guess(kind: str, samples: int = 2000, seed: int = 1) -> float:
    """Return the accuracy of the best constant answer to one kind: what blindness would score."""
    answers = [answer for _, answer in DigitsQuestions("heldout", seed, kinds=(kind,)).texts(range(samples))]
    return max(answers.count(answer) for answer in set(answers)) / samples
