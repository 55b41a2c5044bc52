"""A student's forward over a prompt that is split over processes is the forward of one process."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from linmu import optimized
from linmu.optimized import lesson_modules
from linmu.reference.student.split_forward import SplitForward, evenly

from ..ranks import run_ranks
from .split_forward_steps import STUDENTS, Case, Taught, work


def test_logits_losses_gradients_caches_and_lessons_are_those_of_one_process(tmp_path):
    """Three gloo processes, started once; cuts inside pictures, ranks with a token, layers of attention."""
    cases = {family: Case.of(family) for family in STUDENTS}
    run_ranks(3, tmp_path, work, cases, Taught.of("qwen3_vl", optimized))


@pytest.mark.parametrize(("length", "ranks"), [(1, 1), (7, 3), (9, 3), (1000, 7)])
def test_slices_differ_by_one_token_at_most(length, ranks):
    lengths = evenly(length, ranks)
    assert sum(lengths) == length and len(lengths) == ranks and max(lengths) - min(lengths) <= 1


def test_a_lessons_fast_attention_leaves_split_rows_to_the_one_that_fetches_all_keys(monkeypatch):
    """On a GPU it would see this rank's keys alone."""
    monkeypatch.setattr(lesson_modules, "engine_of_block", lambda *_: "triton")
    given = {}

    class Attention(torch.nn.Module):
        head_dim, attention_dropout = 4, 0.0

        def forward(self, hidden_states, **kwargs):
            given.update(kwargs)
            return hidden_states, None

    u, mask, split = torch.zeros(1, 2, 8), torch.ones(1, 2), object()
    lesson_modules.attended(Attention(), u, (u, u), attention_mask=mask, linmu_split=split)
    assert given["linmu_split"] is split and given["attention_mask"] is mask


def test_a_negative_number_of_last_tokens_is_refused():
    parallel = SimpleNamespace(edges=[0, 2, 4], slice=slice(0, 2))
    with pytest.raises(ValueError, match=r"context_parallel: logits_to_keep must be .*, got -2"):
        SplitForward(parallel, {"logits_to_keep": -2}, 0)
