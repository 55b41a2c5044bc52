"""How well a student stands in for its teacher on held-out conversations, as numbers and a table."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch

from ..teacher_student import Lesson, Objective, pictures_encoded_once, supervised, temporary_objective
from .branch_usage import LayerWatch


def evaluate(
    lesson: Lesson, batches: list[tuple[list[str], dict[str, Any]]], device: torch.device
) -> dict[str, Any]:
    """Measure student and teacher on held-out batches.

    Returns:
        {"student": row, "teacher": row}. A row holds `accuracy` (share of conversations whose supervised
        tokens are
        all the most likely ones: what greedy decoding would answer), `kinds` (the same by kind), `kl` (nats
        per supervised token), `agreement` (share of supervised tokens with the teacher's most likely one),
        `mixer_error` (relative, on the teacher's hidden states) and `block_error` (relative, on the student's
        own). The student's row has `layers` as well: both errors, and what each layer relies on.
    """
    alone = Objective(mixer=1.0, inputs="teacher")
    together = Objective(block=1.0, logits=1.0, end_to_end=True)
    sums: dict[str, float] = defaultdict(float)
    correct: dict[str, dict[str, list[bool]]] = {"student": defaultdict(list), "teacher": defaultdict(list)}
    watch = LayerWatch(lesson)
    for kinds, batch in batches:
        inputs = {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}
        labels = batch["labels"].to(device)
        positions, mask = supervised(labels)
        with pictures_encoded_once(lesson.student.base_model), temporary_objective(lesson, alone):
            groups = lesson.token_groups(inputs, labels)
            mixer_error = lesson(labels, **inputs)["mixer"]
            watch.add_errors("mixer_error", [layer.self_attn.heard for layer in lesson.layers], groups)
            watch.look_at(lesson.vision_tokens(inputs))
            lesson.objective = together
            logits = {role: lesson.run(role, inputs, positions) for role in ("teacher", "student")}
            block_error = lesson.hidden_terms(groups)["block"]
            watch.add_errors("block_error", lesson.blocks, groups)
            divergence = lesson.logit_loss(logits["student"], logits["teacher"], mask)
        answers = {role: values.argmax(-1) for role, values in logits.items()}
        for role, answer in answers.items():
            right = ((answer == labels[:, positions + 1]) | ~mask).all(1)
            for kind, is_right in zip(kinds, right.tolist(), strict=True):
                correct[role][kind].append(is_right)
        tokens = int(mask.sum())
        sums["tokens"] += tokens
        sums["batches"] += 1
        sums["kl"] += float(divergence) * tokens
        sums["agreement"] += float(((answers["student"] == answers["teacher"]) & mask).sum())
        sums["mixer_error"] += float(mixer_error)
        sums["block_error"] += float(block_error)
    per = {"kl": "tokens", "agreement": "tokens", "mixer_error": "batches", "block_error": "batches"}
    student = {name: sums[name] / sums[count] for name, count in per.items()} | {"layers": watch.close()}
    teacher = {"kl": 0.0, "agreement": 1.0, "mixer_error": 0.0, "block_error": 0.0}
    return {"student": student | scores(correct["student"]), "teacher": teacher | scores(correct["teacher"])}


def scores(correct: dict[str, list[bool]]) -> dict[str, Any]:
    """Accuracy overall and by kind."""
    every = [right for rights in correct.values() for right in rights]
    kinds = {kind: sum(rights) / len(rights) for kind, rights in sorted(correct.items())}
    return {"accuracy": sum(every) / len(every), "kinds": kinds}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The measurements of `evaluate` side by side."""
    kinds = list(rows["teacher"]["kinds"])
    measures = {
        "accuracy": "accuracy",
        "KL": "kl",
        "agree": "agreement",
        "mixer err": "mixer_error",
        "block err": "block_error",
    }
    lines = [f"{'held-out':12}" + "".join(f"{title:>11}" for title in [*measures, *kinds])]
    for name, row in rows.items():
        values = [row[key] for key in measures.values()] + [row["kinds"][kind] for kind in kinds]
        lines.append(f"{name:12}" + "".join(f"{value:11.3f}" for value in values))
    return "\n".join(lines)
