"""How well a student stands in for its teacher on held-out conversations, both being one model."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..lesson import Lesson
from ..refusal import check
from ..token_groups import supervised
from .branch_usage import ERRORS, LayerWatch
from .scores import Rows, Scores

NOTHING_HELD_OUT = "held-out data must hold conversations that can be read, with an answer to learn", "none"


@torch.no_grad()
def evaluate(
    lesson: Lesson, batches: Iterable[tuple[list[str], dict[str, Tensor]]], device: torch.device
) -> Rows:
    """Measure student and teacher.

    Args:
        lesson: student with its teacher, whole on every process.
        batches: kinds and tensors of this process's part of the conversations.
        device: where the model is.
    Returns:
        {"teacher": row, "student": row}, of the conversations of all processes: what `Scores.rows` says,
        `mixer_error` (relative, on the teacher's hidden states) and `layer_error` (relative, on the student's
        own), means over layers. The student's row has `layers` as well.
    Raises:
        RefusedError: if there are no conversations with an answer to learn.
    """
    was_training = lesson.training
    lesson.eval()
    scores, watch = Scores(lesson.logit_loss), LayerWatch(lesson)
    for kinds, batch in batches:
        inputs = {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}
        labels = batch["labels"].to(device)
        positions, _ = supervised(labels)
        masks = lesson.token_masks(inputs, labels)
        with watch.usage(lesson.vision_tokens(inputs)):
            logits = lesson.run_both(inputs, positions)
        watch.add_errors("layer_error", lesson.layer_outputs, masks)
        lesson.follow_teacher()
        watch.add_errors("mixer_error", lesson.mixer_outputs, masks)
        scores.add(logits, labels, kinds)
    lesson.train(was_training)
    rows, layers = scores.rows(), watch.layers()
    check(rows, *NOTHING_HELD_OUT)
    for name in ERRORS:
        rows["teacher"][name] = 0.0
        rows["student"][name] = sum(layer[name] for layer in layers) / len(layers)
    rows["student"]["layers"] = layers
    return rows
