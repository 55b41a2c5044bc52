"""An accelerated student's generate() asks one token late whether it has ended, and returns the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.generation.streamers import BaseStreamer

from linmu import optimized
from linmu.optimized import graphs
from linmu.optimized.graphs import token_loop
from linmu.optimized.graphs.decoder import Limits

from .tiny_checkpoint import build_teacher, prompt, shake_mixers, words

MOST = 8


class NoEvent:
    """A CPU is done with what it was asked for."""

    def __init__(self, **_: Any) -> None: ...

    def record(self) -> None: ...

    def synchronize(self) -> None: ...


@pytest.fixture(scope="module")
def student() -> nn.Module:
    return shake_mixers(optimized.convert(build_teacher(num_hidden_layers=1)).double())


@pytest.fixture
def late(student, monkeypatch):
    """The student, as `accelerate` leaves it."""
    monkeypatch.setattr(token_loop, "DEVICES", {"cpu"})
    monkeypatch.setattr(torch, "Event", NoEvent)
    monkeypatch.setitem(student.__dict__, "token_loop", token_loop.sample)
    return student


class Forwards:
    """Counts a module's calls."""

    def __init__(self, module: nn.Module) -> None:
        self.count = 0
        self.hook = module.register_forward_hook(self.called)

    def called(self, *_: Any) -> None:
        self.count += 1


def generated(student: nn.Module, **options: Any) -> tuple[Any, int]:
    """What it returns, and how many forwards that took."""
    torch.manual_seed(0)
    forwards = Forwards(student)
    rows = torch.tensor([words(7, 1), words(7, 2)])
    try:
        given = {"attention_mask": torch.ones_like(rows), "do_sample": False, "max_new_tokens": MOST}
        return student.generate(rows, **given | options), forwards.count
    finally:
        forwards.hook.remove()


def ends(student: nn.Module, **options: Any) -> dict[str, Any]:
    """Options by which both rows end early: each has one of these tokens."""
    tokens, _ = generated(student, **options)
    return {"eos_token_id": tokens[:, 7 + MOST // 2].tolist(), "pad_token_id": 0}


@pytest.mark.parametrize("options", [{}, {"do_sample": True}], ids=["likeliest", "by chance"])
def test_tokens_are_the_same_one_forward_later(student, late, monkeypatch, options):
    monkeypatch.setitem(student.__dict__, "token_loop", None)
    options = options | ends(student, **options)
    want, fewer = generated(student, **options)
    monkeypatch.setitem(student.__dict__, "token_loop", token_loop.sample)
    got, more = generated(late, **options)
    assert torch.equal(got, want)
    assert fewer < MOST
    assert more == fewer + 1, "the forward that is too many shows that nobody waited"


def test_a_length_is_known_beforehand(late):
    tokens, forwards = generated(late)
    assert tokens.shape[1] == 7 + MOST
    assert forwards == MOST


def test_a_cache_that_is_returned_has_seen_no_token_too_many(student, late, monkeypatch):
    options = ends(student) | {"return_dict_in_generate": True, "output_logits": True}
    got, forwards = generated(late, **options)
    monkeypatch.setitem(student.__dict__, "token_loop", None)
    want, fewer = generated(student, **options)
    assert forwards == fewer
    assert torch.equal(torch.stack(got.logits), torch.stack(want.logits))


class Told(BaseStreamer):
    """Keeps what it is handed."""

    def __init__(self) -> None:
        self.tokens: list[Tensor] = []
        self.has_ended = False

    def put(self, value: Tensor) -> None:
        self.tokens.append(value.flatten())

    def end(self) -> None:
        self.has_ended = True


def test_a_streamer_is_handed_all_tokens(late):
    row, told = prompt(words(7, 1)), Told()
    tokens = late.generate(**row, do_sample=False, max_new_tokens=5, streamer=told)
    assert told.has_ended
    assert torch.equal(torch.cat(told.tokens), tokens[0])


def test_accelerate_brings_the_loop_and_takes_it_away(student):
    graphs.install(student, Limits((8,), 1, 8, 1), lambda: None)
    assert student.token_loop is token_loop.sample
    graphs.unaccelerate(student)
    assert student.token_loop is None
