"""What a step's kernels depend on beyond shapes, read of a batch before it goes to a GPU.

A GPU answers such a question only when all that it was given is computed; where a batch is made, the answer
is free.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .lesson import Lesson
from .token_groups import is_answered, token_masks


class Facts(NamedTuple):
    """What the values of a batch say that shapes do not.

    Args:
        groups: names of the groups of tokens, `Lesson.token_masks`, that are not empty.
        has_padding: whether the attention mask must be heeded.
        positions: how many have a next token that is supervised in some row.
    """

    groups: tuple[str, ...]
    has_padding: bool
    positions: int


@dataclass(frozen=True)
class WithFacts:
    """A collator whose batches say their `facts`.

    Args:
        collator: makes a batch of items.
        placeholders: ids that stand for images and videos.
    """

    collator: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]
    placeholders: tuple[int, ...]

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The collator's batch, and its facts."""
        batch = self.collator(items)
        vision = torch.isin(batch["input_ids"], torch.tensor(self.placeholders, dtype=torch.int64))
        masks = token_masks(batch["attention_mask"], vision, batch.get("labels"))
        return batch | {"facts": ask(masks, batch["attention_mask"], batch.get("labels"))}


def ask(masks: Mapping[str, Tensor], attention_mask: Tensor, labels: Tensor | None) -> Facts:
    """The facts of a batch, in one question to its device.

    Args:
        masks: (B, L) bool, `Lesson.token_masks`.
        attention_mask: (B, L).
        labels: (B, L) int64; None = nothing is supervised.
    """
    found = [mask.any() for mask in masks.values()]
    found.append((attention_mask == 0).any())
    found.append(found[-1].new_zeros(()) if labels is None else is_answered(labels).any(0).sum())
    *some, has_padding, positions = torch.stack([each.long() for each in found]).tolist()
    groups = tuple(name for name, is_there in zip(masks, some, strict=True) if is_there)
    return Facts(groups, bool(has_padding), positions)


def placeholders_of(lesson: Lesson) -> tuple[int, ...]:
    """The ids that a lesson takes for images and videos."""
    ids = torch.arange(lesson.student.get_input_embeddings().num_embeddings)[None]
    return tuple(lesson.student.placeholder_mask(ids)[0].nonzero().flatten().tolist())
