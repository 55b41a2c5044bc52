"""The hastened vision towers equal Hugging Face's: values, gradients, pictures and videos of many sizes."""

from __future__ import annotations

import copy

import pytest
import torch

from linmu import optimized
from linmu.optimized import vision_tower
from linmu.optimized.vision_tower import filled_mlp, hasten_tower, runs_by_length

from .tiny_families import qwen_vl

GRIDS = {  # T, Y, X in patches
    "one picture": [[1, 4, 6]],
    "pictures of all sizes": [[1, 4, 6], [1, 8, 2], [1, 10, 10], [1, 4, 6]],
    "a video and a picture": [[5, 4, 6], [1, 6, 4]],
}
NAMES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")


@pytest.fixture(scope="module", params=NAMES)
def stock(request):
    """A genuine tower with random weights, in float64 where it lets us: RoPE is float32 there."""
    return qwen_vl(request.param).teacher.model.visual.double()


def pixels_of(tower, grid: torch.Tensor) -> torch.Tensor:
    patch = tower.config
    width = patch.in_channels * patch.temporal_patch_size * patch.patch_size**2
    generator = torch.Generator().manual_seed(len(grid))
    return torch.randn(int(grid.prod(1).sum()), width, generator=generator, dtype=torch.float64)


def results(tower, grid: torch.Tensor) -> list[torch.Tensor]:
    """What the decoder is given, and the gradients of pixels and weights."""
    tower.zero_grad()
    pixels = pixels_of(tower, grid).requires_grad_()
    output = tower(pixels, grid_thw=grid)
    given = [output.pooler_output, *(getattr(output, "deepstack_features", None) or [])]
    sum((each * torch.linspace(-1, 1, each.numel()).view_as(each)).sum() for each in given).backward()
    return [*given, pixels.grad, *(each.grad for each in tower.parameters() if each.grad is not None)]


@pytest.mark.parametrize("grid", GRIDS.values(), ids=list(GRIDS))
def test_a_hastened_tower_equals_the_stock_one(stock, grid):
    grid = torch.tensor(grid)
    fast = copy.deepcopy(stock)
    hasten_tower(fast)
    wanted, found = results(stock, grid), results(fast, grid)
    assert len(wanted) == len(found)
    for one, other in zip(wanted, found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)


def test_sequences_of_one_length_are_one_call(stock, monkeypatch):
    calls = []
    attend = vision_tower.scaled_dot_product_attention
    monkeypatch.setattr(
        vision_tower, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or attend(*a, **k)
    )
    fast = copy.deepcopy(stock)
    hasten_tower(fast)
    grid = torch.tensor([[9, 4, 6]])
    fast(pixels_of(stock, grid), grid_thw=grid)
    assert len(calls) <= 2 * len(fast.blocks)  # windows at the edge are narrower


def test_runs_hold_every_patch_once_and_no_empty_sequence():
    assert runs_by_length([0, 3, 6, 9], torch.device("cpu")) == [(3, None)]
    runs = runs_by_length([0, 2, 2, 5, 7], torch.device("cpu"))
    assert [(length, place.tolist()) for length, place in runs] == [(2, [0, 1, 5, 6]), (3, [2, 3, 4])]


def test_another_attention_and_copies_are_left_as_they_are(stock):
    """What is asked for is what runs; a copy's forwards are its own."""
    fast = copy.deepcopy(stock)
    hasten_tower(fast)
    twin = copy.deepcopy(fast)
    assert twin.blocks[0].attn.forward.args == (twin.blocks[0].attn,)
    eager = copy.deepcopy(stock)
    eager.config._attn_implementation = fast.config._attn_implementation = "eager"
    grid = torch.tensor([[1, 4, 4]])
    pixels = pixels_of(stock, grid)
    assert torch.equal(fast(pixels, grid_thw=grid).pooler_output, eager(pixels, grid_thw=grid).pooler_output)


@pytest.mark.parametrize("learns", [False, True])
def test_a_filled_mlp_is_the_stock_one(learns):
    mlp = qwen_vl("qwen2_5_vl").teacher.model.visual.blocks[0].mlp.double().requires_grad_(learns)
    hidden = torch.randn(10, 16, dtype=torch.float64)
    torch.testing.assert_close(filled_mlp(mlp, hidden, 5), mlp(hidden))


class Packed(torch.nn.Module):
    """A quantised product: there is no `weight` to ask."""

    def __init__(self, plain: torch.nn.Linear) -> None:
        super().__init__()
        self.packed = {"plain": plain}

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.packed["plain"](hidden)


def test_a_tower_of_quantised_products_runs(stock):
    fast, grid = copy.deepcopy(stock), torch.tensor([[1, 4, 4]])
    hasten_tower(fast)
    for parent in [*fast.blocks.modules()]:
        for name, child in [*parent.named_children()]:
            if type(child) is torch.nn.Linear:
                setattr(parent, name, Packed(child))
    pixels = pixels_of(stock, grid)
    found, wanted = (tower(pixels, grid_thw=grid).pooler_output for tower in (fast, stock))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_students_and_their_towers_refuse_replicas_in_one_process():
    """`nn.DataParallel` asks each module of what it wraps for its replicas."""
    teacher = qwen_vl("qwen2_5_vl").teacher
    student = optimized.convert(teacher)
    for part in (student, student.model.visual, torch.nn.Sequential(student)):
        with pytest.raises(ValueError, match=r"nn\.DataParallel: a student must have a process .*torchrun"):
            [module._replicate_for_data_parallel() for module in part.modules()]
    assert [module._replicate_for_data_parallel() for module in teacher.modules()]


@pytest.mark.parametrize("name", NAMES)
def test_students_are_hastened_and_their_teachers_are_not(name):
    tiny = qwen_vl(name)
    student = optimized.convert(tiny.teacher)
    blocks = student.model.visual.blocks
    assert all("forward" in vars(block.attn) for block in blocks)
    assert not any("forward" in vars(block.attn) for block in tiny.teacher.model.visual.blocks)
