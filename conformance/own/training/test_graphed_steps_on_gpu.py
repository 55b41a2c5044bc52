"""What only a GPU can show of steps from graphs: real captures, with recomputed layers, pictures and packed
rows."""

from __future__ import annotations

import gc

import pytest
import torch

from ..student.tiny_checkpoint import build_teacher, every_kind
from ..student.tiny_families import text_decoder
from .test_graphed_steps import OBJECTIVES, lesson_of, packed_pictures, words

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: nothing to capture")


def with_labels(inputs: dict) -> dict:
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, :5] = -100
    return inputs | {"labels": labels}


CASES = {
    "text": (lambda: text_decoder(llama=True).teacher, False, lambda: words(0)),
    "padded, recomputed": (lambda: text_decoder().teacher, True, lambda: words(0, padding=3)),
    "packed": (lambda: text_decoder().teacher, False, lambda: words(0, packed=True)),
    "pictures": (build_teacher, False, lambda: with_labels(every_kind("right"))),
    "packed pictures": (build_teacher, False, lambda: packed_pictures(5)),
    "pictures, recomputed": (build_teacher, True, lambda: with_labels(every_kind("right"))),
}


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_captured_steps_are_those_of_the_lesson(case, autocast):
    """The first of a shape runs as it is; an eager loss still alive must not disturb the capture."""
    build, recompute, make = CASES[case]
    lesson = lesson_of(build(), recompute)
    lesson = lesson.float().cuda().accelerate()
    batch = {name: each.float() if each.is_floating_point() else each for name, each in make().items()}
    batch = {name: each.cuda() for name, each in batch.items()}
    for objective in OBJECTIVES.values():
        lesson.objective, before = objective, lesson.graphs.runs
        results, alive = [], []
        for _ in range(4):
            lesson.zero_grad()
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                alive.append(lesson(**batch)["loss"])
            alive[-1].backward()
            found = {n: p.grad for n, p in lesson.named_parameters() if p.grad is not None}
            results.append((alive[-1].detach(), found))
        assert lesson.graphs.runs - before == 3
        (want, wanted), *others = results
        close = {"rtol": 2e-2, "atol": 1e-3} if autocast else {"rtol": 1e-4, "atol": 1e-6}
        for got, found in others:
            torch.testing.assert_close(got, want, **close)
            assert found.keys() == wanted.keys()
            for name, gradient in found.items():
                distance = float((gradient - wanted[name]).norm())
                limit = (0.05 if autocast else 1e-3) * float(wanted[name].norm()) + 1e-6
                assert distance <= limit, (name, distance, limit)
    lesson.close()
    gc.collect()
