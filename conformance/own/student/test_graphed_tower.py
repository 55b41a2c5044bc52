"""A vision tower from graphs gives what it gives eagerly; a session watches through both."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from linmu import optimized
from linmu.optimized import graphs
from linmu.optimized.graphs import tower as graphed
from linmu.reference import watch

from .tape import tape
from .test_graphs import LIMITS
from .test_watch import clip, watching_student
from .tiny_families import qwen_vl

GRIDS = ([[2, 4, 6]], [[1, 8, 4], [1, 10, 10]], [[3, 4, 6]])  # T, Y, X in patches


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl"])
def student(request) -> nn.Module:
    student = optimized.convert(qwen_vl(request.param).teacher).double()
    return graphs.install(student, LIMITS, lambda: tape)


@pytest.fixture
def tower(student) -> nn.Module:
    """One without graphs yet."""
    return copy.deepcopy(student).model.visual


def pixels_of(tower: nn.Module, grid: list, seed: int) -> tuple[Tensor, Tensor]:
    sizes, grid = tower.config, torch.tensor(grid)
    width = sizes.in_channels * sizes.temporal_patch_size * sizes.patch_size**2
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(int(grid.prod(1).sum()), width, generator=generator, dtype=torch.float64), grid


@torch.no_grad()
def assert_same(tower: nn.Module, grid: list, seed: int) -> None:
    inputs = pixels_of(tower, grid, seed)
    got, want = tower(*inputs), tower.forward.eager(*inputs)
    for name in ("pooler_output", "last_hidden_state"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name))


def captured(tower: nn.Module) -> list[list]:
    return [[[*map(int, sizes)] for sizes in key[0]] for key in tower.forward.graphs]


def test_grids_that_come_again_run_from_graphs_and_give_the_same(tower):
    for seed in range(3):
        for grid in GRIDS:
            assert_same(tower, grid, seed)
        assert captured(tower) == ([] if seed == 0 else list(GRIDS))


def test_what_an_earlier_call_gave_is_not_overwritten(tower):
    one, two = (pixels_of(tower, GRIDS[0], seed) for seed in (0, 1))
    with torch.no_grad():
        tower(*one)
        first = tower(*one).pooler_output
        kept = first.clone()
        assert not torch.equal(tower(*two).pooler_output, kept)
    assert torch.equal(first, kept)


def test_grids_of_long_ago_are_forgotten(tower, monkeypatch):
    monkeypatch.setattr(graphed, "MOST_GRIDS", 2)
    for grid in (*GRIDS, GRIDS[0]):  # the first is not among the last two any more
        assert_same(tower, grid, 0)
    assert captured(tower) == []
    for grid in (GRIDS[0], GRIDS[1], GRIDS[1], GRIDS[2], GRIDS[2]):
        assert_same(tower, grid, 0)
    assert captured(tower) == [GRIDS[1], GRIDS[2]]


def test_large_pictures_run_as_before(tower, monkeypatch):
    monkeypatch.setattr(graphed, "MOST_PATCHES", 47)
    for _ in range(3):
        assert_same(tower, GRIDS[0], 0)
    assert captured(tower) == []


def with_gradients(tower: nn.Module) -> str:
    torch.set_grad_enabled(True)
    return "gradients are recorded"


def with_hook(tower: nn.Module) -> str:
    tower.blocks[0].register_forward_hook(lambda *_: None)
    return "hooks on its modules"


def with_other_attention(tower: nn.Module) -> str:
    tower.config._attn_implementation = "eager"
    return "the tower's attention is eager"


@pytest.mark.parametrize("watched", [with_gradients, with_hook, with_other_attention])
def test_what_watches_the_tower_keeps_graphs_away_and_is_said(tower, monkeypatch, capsys, watched):
    monkeypatch.setattr(graphed, "say_once", lambda key, text: print(text))
    with torch.no_grad():
        for _ in range(2):
            tower(*pixels_of(tower, GRIDS[0], 0))
        assert captured(tower) == [GRIDS[0]]
        replay, tower.forward.run = tower.forward.run, None
        reason = watched(tower)
        tower(*pixels_of(tower, GRIDS[0], 0))
        tower.forward.run = replay
    assert reason in capsys.readouterr().out


def test_other_weights_are_noticed(tower):
    for _ in range(2):
        assert_same(tower, GRIDS[0], 0)
    projection = tower.blocks[0].attn.proj
    projection.weight = nn.Parameter(2 * projection.weight.detach())
    for _ in range(3):
        assert_same(tower, GRIDS[0], 0)


def test_copies_begin_without_graphs_and_unaccelerate_takes_them_away(student):
    tower = student.model.visual
    for _ in range(2):
        assert_same(tower, GRIDS[0], 0)
    other = copy.deepcopy(student)
    assert other.model.visual.forward.module is other.model.visual and captured(other.model.visual) == []
    graphs.unaccelerate(other)
    assert "forward" not in vars(other.model.visual) and "forward" in vars(tower)


def test_a_session_sees_the_same_from_graphs():
    by_reference, processor = watching_student(qwen_vl("qwen2_5_vl"))
    eager = optimized.convert(qwen_vl("qwen2_5_vl").teacher, {"text_window": 8})
    eager.resize_token_embeddings(len(processor.tokenizer))
    eager.load_state_dict(by_reference.state_dict())
    fast = graphs.install(copy.deepcopy(eager), LIMITS, lambda: tape)
    sessions = [watch(each, processor, max_position=60) for each in (eager, fast, fast)]
    for index in range(5):
        for session in sessions:
            session.see(clip(index, 2))
    want = sessions[0].logits("so?")
    for session in sessions[1:]:
        torch.testing.assert_close(session.logits("so?"), want, rtol=0, atol=1e-4)
    assert len(captured(fast.model.visual)) == 1
    kinds = {(key[0], key[-1]) for key in fast.get_decoder().forward.graphs}
    assert kinds == {("prompt", False), ("prompt", True)}  # without and with a state before
