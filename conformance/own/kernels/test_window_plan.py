"""The plan of linmu.optimized's window kernels: an order of the tokens and its blocks, in whole numbers."""

from __future__ import annotations

from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from linmu import optimized, reference
from linmu.optimized.layout import plan
from linmu.optimized.layout.operator import WindowPlanInputs, window_plan

from ...harness.compare import assert_exact
from ...harness.layouts import Layout, Text, Vision, layouts
from .gpu_cases import prompt

BLOCK = 8  # small, so that few tokens make windows of every kind


@dataclass(frozen=True)
class PlanCase:
    """Rows of windows of given sizes, id -1 among them, and how their tokens are mixed."""

    sizes: tuple[tuple[int, ...], ...]
    seed: int

    def ids(self) -> torch.Tensor:
        """(B, L), every row's first size in no window, rows filled up with -1."""
        generator = torch.Generator().manual_seed(self.seed)
        length = max(map(sum, self.sizes))
        ids = torch.full((len(self.sizes), length), -1)
        for row, sizes in zip(ids, self.sizes, strict=True):
            values = torch.repeat_interleave(torch.arange(-1, len(sizes) - 1), torch.tensor(sizes))
            row[: len(values)] = values
            row[:] = row[torch.randperm(length, generator=generator)]
        return ids

    def plan(self) -> tuple[torch.Tensor, torch.Tensor]:
        """As a caller gets it who brings ids."""
        return window_plan(WindowPlanInputs(self.ids()))


@dataclass(frozen=True)
class LayoutPlanCase:
    """The windows of a layout; text takes part in the plan, or not."""

    layout: Layout
    window_thw: tuple[int, int, int]
    layer_index: int
    text: bool

    def ids(self) -> torch.Tensor:
        """(B, L), the reference's."""
        return reference.window_ids(self.layout.coords, self.window_thw, self.layer_index % 2 == 1)

    def plan(self) -> tuple[torch.Tensor, torch.Tensor]:
        """As a layer gets it, which brings no ids."""
        layout = optimized.VisionLayout(self.layout.coords)
        return layout.window_plan(self.window_thw, self.layer_index, self.text)


SIZES = st.lists(st.integers(0, 3 * BLOCK), min_size=1, max_size=7).map(tuple)
CASES = st.builds(PlanCase, st.lists(SIZES, min_size=1, max_size=3).map(tuple), st.integers(0, 2**16))
WINDOWS = st.tuples(*[st.integers(1, 4)] * 3)
LAYOUT_CASES = st.builds(LayoutPlanCase, layouts(), WINDOWS, st.integers(0, 1), st.booleans())
cases = given(case=CASES | LAYOUT_CASES)


def planned(
    case: PlanCase | LayoutPlanCase,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token and window of each place, the blocks there are, and row and id of the places' tokens."""
    ids = case.ids()
    with mock.patch.object(plan, "BLOCK", BLOCK):
        places, blocks = case.plan()
        assert len(blocks) == 1 + plan.most_blocks(places.shape[1])
    row = torch.arange(len(ids))[:, None].expand_as(ids).flatten()
    token, window = places.long()
    keys = torch.stack([row, ids.flatten()], dim=1)[token]
    count = int(blocks[0, 0])
    assert count < len(blocks), f"more blocks than their bound: {case!r}"
    return token, window, blocks[1 : 1 + count].long(), keys


@cases
def test_every_token_has_one_place_beside_its_window(case):
    """A permutation; tokens share a window's name exactly if they share row and id; -1 in none."""
    token, window, _, keys = planned(case)
    every = isinstance(case, PlanCase) or case.text
    wanted = (case.ids().flatten() >= (-1 if every else 0)).nonzero().squeeze(1)
    assert_exact(token.sort().values, wanted, case, "tokens")
    inside = keys[:, 1] >= 0
    assert_exact(window >= 0, inside, case, "places in a window")
    same = (keys[:, None] == keys[None, :]).all(-1) & inside[:, None]
    assert_exact((window[:, None] == window[None, :]) & inside[:, None], same, case, "window mates")
    for first in window[inside].unique().tolist():
        members = (window == first).nonzero().squeeze(1)
        wanted = torch.arange(first, first + len(members))
        assert_exact(members, wanted, case, f"places of window {first}")


@cases
def test_blocks_cover_all_places_once_and_name_what_their_windows_cover(case):
    """One after the other, none empty, none too long; tokens of no window see nothing."""
    _, window, blocks, _ = planned(case)
    place = 0
    for start, end, low, high in blocks.tolist():
        assert start == place < end <= start + BLOCK, f"block [{start}, {end}) after {place}: {case!r}"
        place = end
        assert min(low, high) >= 0, f"[{start}, {end}) walks over [{low}, {high}): {case!r}"
        names = window[start:end].unique()
        covered = torch.isin(window, names[names >= 0]).nonzero().squeeze(1)
        assert (names >= 0).all() or (names < 0).all(), f"[{start}, {end}) mixes both: {case!r}"
        wanted = torch.arange(low, high)
        assert_exact(wanted, covered, case, f"places that block [{start}, {end}) walks over")
    assert place == len(window), f"blocks end at {place} of {len(window)}: {case!r}"


@cases
def test_no_block_wastes_much(case):
    """A window of half a block or more has blocks of its own; the others see at most two blocks' length."""
    _, window, blocks, _ = planned(case)
    for start, end, low, high in blocks.tolist():
        names = window[start:end].unique()
        sizes = [int((window == name).sum()) for name in names if name >= 0]
        alone = len(sizes) == 1 and 2 * sizes[0] >= BLOCK
        assert alone or not any(2 * size >= BLOCK for size in sizes), f"[{start}, {end}): {case!r}"
        assert alone or high - low <= 2 * BLOCK, f"[{start}, {end}) walks over {high - low}: {case!r}"


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (1, 1)])
@pytest.mark.parametrize("number", [-1, 0])
def test_hardly_any_tokens_make_a_plan(shape, number):
    places, blocks = window_plan(WindowPlanInputs(torch.full(shape, number)))
    assert places.shape == (2, shape[0] * shape[1])
    assert blocks[0].tolist() == [min(1, shape[0] * shape[1]), 0, 0, 0]


def test_layers_with_the_same_windows_share_a_plan():
    """A layout makes one for its regular and one for its shifted windows, however many layers ask."""
    layout = optimized.VisionLayout(prompt(203).coords)
    plans = [layout.window_plan((2, 4, 4), layer) for layer in range(6)]
    assert all(plan is plans[layer % 2] for layer, plan in enumerate(plans))
    assert plans[0] is not plans[1]


def test_a_layer_makes_no_plan_of_its_own_twice():
    """Forward and backward, twice: the layout's plan is made once."""
    where = prompt(203)
    config = optimized.LinMUConfig(width=16, heads=2, groups=1, head_dim=8, window_thw=(2, 4, 4))
    layers = [optimized.LocalSwin(config, layer_index) for layer_index in (1, 3)]
    layout, u = optimized.VisionLayout(where.coords), torch.randn(2, 203, 16, requires_grad=True)
    angles = torch.rand(2, 203, 8)
    embeddings = (angles.cos(), angles.sin())
    with mock.patch.object(plan, "layout_plan", wraps=plan.layout_plan) as made:
        for layer in layers:
            layer(u, layout, position_embeddings=embeddings)[0].sum().backward()
    assert made.call_count == 1


@pytest.mark.parametrize("text", [2, 60])
def test_text_without_a_window_meets_no_projection_of_local_swin(text):
    """Unless there is hardly any; result and gradient are the reference's either way."""
    where = Layout(((Text(text // 2), Vision(0, (4, 6, 5)), Text(text - text // 2)),))
    config = optimized.LinMUConfig(
        width=16, heads=2, groups=1, head_dim=8, window_thw=(2, 4, 4), text_window=0
    )
    ours, wanted = (backend.LocalSwin(config, 1) for backend in (optimized, reference))
    wanted.load_state_dict(ours.state_dict())
    seen: list[int] = []
    ours.q_proj.register_forward_hook(lambda module, given, out: seen.append(given[0].shape[1]))
    u, angles = torch.randn(1, 120 + text, 16), torch.rand(1, 120 + text, 8)
    found = []
    for module, kind in ((ours, optimized), (wanted, reference)):
        given = u.clone().requires_grad_()
        angle = (angles.cos(), angles.sin())
        y, _ = module(given, kind.VisionLayout(where.coords), position_embeddings=angle)
        found.append((y, torch.autograd.grad(y.sin().sum(), given)[0]))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert seen == [120 if text > 14 else 120 + text]


@given(layouts(), WINDOWS, st.integers(0, 1))
def test_tokens_are_taken_with_the_windows_of_their_plan(case, window_thw, layer_index):
    """A row for each vision token, -1 on text, and ids that agree exactly in a window."""
    tokens = optimized.VisionLayout(case.coords).vision_tokens(window_thw, layer_index)
    ids = reference.window_ids(case.coords, window_thw, layer_index % 2 == 1)
    vision = ids.flatten() >= 0
    row, found = tokens.row.flatten()[vision], tokens.window_id.flatten()
    assert_exact(tokens.row >= 0, ids >= 0, case, "tokens with a row")
    if tokens.token is not None:
        assert_exact(tokens.token[row], vision.nonzero().squeeze(1), case, "tokens")
    place, window = tokens.plan[0].long()
    assert_exact(place.sort().values, torch.arange(len(found)), case, "tokens of the plan")
    assert_exact(found.long()[place], window, case, "ids in the plan's order")
    pairs = torch.stack([torch.arange(len(ids))[:, None].expand_as(ids)[ids >= 0], ids[ids >= 0]])
    same = (pairs[:, :, None] == pairs[:, None, :]).all(0)
    assert_exact(found[row][:, None] == found[row][None, :], same, case, "window mates")
    if tokens.token is None:
        assert_exact(found >= 0, vision, case, "tokens with an id")


def test_a_plan_passes_torchs_own_checks_of_operators():
    """Shapes promised to the compiler, no aliasing, no change of the argument."""
    torch.library.opcheck(torch.ops.linmu.window_plan, (torch.randint(-1, 4, (2, 37)),))


@pytest.mark.parametrize("text", [True, False])
def test_a_layouts_plan_passes_them_too(text):
    """From the layout's own arguments."""
    layout = optimized.VisionLayout(prompt(203).coords)
    given = (*layout.sorted, layout.facts.vision, [2, 4, 4], True, text)
    torch.library.opcheck(torch.ops.linmu.layout_plan, given)
