"""`scan_order`, `inverse_order` and `window_ids`: integers, so everything here holds exactly."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from linmu import reference

from ..harness import second_formulation
from ..harness.compare import assert_exact, check_form, report
from ..harness.layouts import Layout, Text, Vision, layouts
from ..harness.operator_cases import property_of
from ..harness.operator_checks import memory_of
from ..harness.strides import oddly_strided

AXES = {0: (1, 2, 3), 1: (1, 3, 2), 2: (2, 3, 1), 3: (3, 2, 1)}  # columns of coords, most significant first


@dataclass(frozen=True)
class LayoutCase:
    """A layout, a layer and a window."""

    layout: Layout
    layer_index: int
    window_thw: tuple[int, int, int]
    shifted: bool
    seed: int


CASES = st.builds(
    LayoutCase,
    layouts(),
    st.integers(0, 9) | st.sampled_from((34, 127, 1026)),
    st.tuples(*[st.integers(1, 4)] * 3),
    st.booleans(),
    st.integers(0, 2**16),
)
orders = partial(property_of, "scan_order", cases=CASES)
partitions = partial(property_of, "window_ids", cases=CASES)


def partition(ids: torch.Tensor) -> torch.Tensor:
    """(B, L, L) bool: which tokens of a row share an id."""
    return (ids[:, :, None] == ids[:, None, :]) & (ids >= 0)[:, :, None]


def assert_windows(
    ids: torch.Tensor, wanted: torch.Tensor, coords: torch.Tensor, case: Any, what: str
) -> None:
    """Tokens share an id where `wanted`, (B, L, L) bool, says so; with themselves if in a window at all."""
    wrong = (partition(ids) != wanted).nonzero()
    if not len(wrong):
        return
    row, one, other = wrong[0].tolist()
    both, share = one != other, wanted[row, one, other]
    places = [f"{t} at {tuple(coords[row, t].tolist())}" for t in ((one, other) if both else (one,))]
    tokens = f"token{'s' * both} {' and '.join(places)} (segment, t, y, x) of row {row}"
    must = ("not " * (not share) + "share a window") if both else f"be in {'a window' if share else 'none'}"
    got = f"got ids {' and '.join(str(ids[row, t].item()) for t in ((one, other) if both else (one,)))}"
    raise AssertionError(report(f"window_ids: {what}: {tokens} must {must}, {got}", case))


def assert_order(
    order: torch.Tensor, wanted: torch.Tensor, coords: torch.Tensor, case: Any, what: str
) -> None:
    """The same tokens in the same places."""
    check_form(f"scan_order: {what}", order, wanted, case, finite=False)
    wrong = (order != wanted).nonzero()
    if not len(wrong):
        return
    row, place = wrong[0].tolist()

    def token(number: int) -> str:
        known = 0 <= number < coords.shape[1]
        return f"token {number}" + (f" at {tuple(coords[row, number].tolist())}" if known else "")

    must, got = token(wanted[row, place].item()), token(order[row, place].item())
    line = f"scan_order: {what}: place {place} of row {row} must hold {must} (segment, t, y, x), got {got}"
    raise AssertionError(report(line, case))


def four_layers(case: LayoutCase) -> range:
    """The layer of the case and the three after it: one of each scan order."""
    return range(case.layer_index, case.layer_index + 4)


def gathered(coords: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """coords in scan order."""
    return coords.gather(1, order[..., None].expand_as(coords))


@orders()
def test_scan_order_equals_sorting_plain_tuples(backend, case: LayoutCase):
    """Against a formulation without tensors; ties, here of two cells joined in one, keep their order."""
    coords = case.layout.coords
    halves = torch.cat([coords[..., :1], coords[..., 1:].div(2, rounding_mode="floor")], dim=-1)
    for layer in four_layers(case):
        for cells, name in ((coords, "order"), (halves, "order with ties")):
            wanted = second_formulation.scan_order(cells, layer)
            assert_order(backend.scan_order(cells, layer), wanted, cells, case, f"{name} of layer {layer}")


@orders()
def test_scan_order_is_a_permutation_that_leaves_text_and_segments_in_place(backend, case: LayoutCase):
    """Every token once; text stays; a segment's tokens are re-sorted among its own positions."""
    coords = case.layout.coords
    order = backend.scan_order(coords, case.layer_index)
    position = torch.arange(order.shape[1]).expand_as(order)
    assert_exact(order.sort(1).values, position, case, "sorted order")
    assert_exact(order[coords[..., 0] < 0], position[coords[..., 0] < 0], case, "order on text")
    assert_exact(gathered(coords, order)[..., 0], coords[..., 0], case, "segments in scan order")


@orders()
def test_scan_order_sorts_by_the_axes_of_its_layer(backend, case: LayoutCase):
    """Keys never fall from one vision token of a segment to the next, and rotate with period 4."""
    coords = case.layout.coords
    scanned = gathered(coords, backend.scan_order(coords, case.layer_index))
    for row in scanned:
        for segment in range(int(coords[..., 0].max()) + 1):
            keys = row[row[:, 0] == segment][:, AXES[case.layer_index % 4]].tolist()
            axes = ", ".join("_tyx"[axis] for axis in AXES[case.layer_index % 4])
            line = f"scan_order: segment {segment} must be sorted by {axes}, got cells (in these axes) {keys}"
            assert keys == sorted(keys), report(line, case)
    later = backend.scan_order(coords, case.layer_index + 4)
    assert_order(later, backend.scan_order(coords, case.layer_index), coords, case, "order four layers on")


@orders()
def test_scan_order_does_not_depend_on_how_a_segment_is_stored(backend, case: LayoutCase):
    """Shuffle the tokens of each segment among their positions: the scan visits the same cells."""
    coords, generator = case.layout.coords, torch.Generator().manual_seed(case.seed)
    shuffled = coords.clone()
    for row in range(coords.shape[0]):
        for segment in range(int(coords[..., 0].max()) + 1):
            own = (coords[row, :, 0] == segment).nonzero().squeeze(-1)
            shuffled[row, own] = coords[row, own[torch.randperm(len(own), generator=generator)]]
    for layer in four_layers(case):
        stored, mixed = (gathered(c, backend.scan_order(c, layer)) for c in (coords, shuffled))
        assert_exact(mixed, stored, case, f"cells in the scan order of layer {layer}")


@property_of("scan_order", "inverse_order", cases=CASES)
def test_order_then_inverse_is_identity(backend, case: LayoutCase):
    """Both ways round."""
    order = backend.scan_order(case.layout.coords, case.layer_index)
    inverse = backend.inverse_order(order)
    position = torch.arange(order.shape[1]).expand_as(order)
    assert_exact(order.gather(1, inverse), position, case, "order after inverse")
    assert_exact(inverse.gather(1, order), position, case, "inverse after order")


@property_of("scan_order", "window_ids", cases=CASES)
def test_numbers_neighbours_and_padding_do_not_change_the_layout(backend, case: LayoutCase):
    """Segment ids are names; rows do not know each other; padding on the left moves everything along."""
    layout, windows = case.layout, (case.window_thw, case.shifted)
    order, ids = (
        backend.scan_order(layout.coords, case.layer_index),
        backend.window_ids(layout.coords, *windows),
    )
    for number in (lambda i: 1000 - 7 * i, lambda i: 2**33 + i * 2**32, lambda i: 2**63 - 1 - i):
        renamed = layout.renumbered([number(i) for i in range(int(layout.segment.max()) + 1)]).coords
        found = backend.scan_order(renamed, case.layer_index)
        assert_order(found, order, renamed, case, "order of segments renumbered")
        found = backend.window_ids(renamed, *windows)
        assert_windows(found, partition(ids), renamed, case, "windows of segments renumbered")
    for row in range(layout.shape[0]):
        alone, one = layout.only(row).coords, slice(row, row + 1)
        found = backend.scan_order(alone, case.layer_index)
        assert_order(found, order[one], alone, case, f"order of row {row} alone")
        found = backend.window_ids(alone, *windows)
        assert_windows(found, partition(ids[one]), alone, case, f"windows of row {row} alone")
    padded = layout.padded(3, 2).coords
    inner = slice(3, 3 + layout.shape[1])
    found = backend.scan_order(padded, case.layer_index)[:, inner] - 3
    assert_order(found, order, layout.coords, case, "order behind three tokens of padding, less three")
    found = backend.window_ids(padded, *windows)[:, inner]
    assert_windows(found, partition(ids), layout.coords, case, "windows between padding")


@partitions()
def test_windows_equal_their_definition_pair_by_pair(backend, case: LayoutCase):
    """Same segment and the same floor((c + s) / w) on all three axes; -1 exactly on text and padding.

    Wherever the grid begins: its extent is from its first cell to its last.
    """
    for start, shifted in itertools.product(((0, 0, 0), (1, 5, 3)), (False, True)):
        coords = case.layout.coords
        coords = torch.where(coords >= 0, coords + torch.tensor((0, *start)), coords)
        ids = backend.window_ids(coords, case.window_thw, shifted)
        wanted = second_formulation.same_window(coords, case.window_thw, shifted)
        what = f"windows {case.window_thw} of grids that begin at {start}, shifted={shifted}"
        assert_windows(ids, wanted, coords, case, what)
        assert_exact(ids == -1, case.layout.segment < 0, case, f"window_ids: {what}: ids of -1")
        assert ids.dtype == torch.int64, report(f"window_ids: must be int64, got {ids.dtype}", case)


@partitions()
def test_windows_are_local(backend, case: LayoutCase):
    """No window is wider than its size on any axis, crosses a segment, or holds more tokens than cells."""
    coords = case.layout.coords
    ids = backend.window_ids(coords, case.window_thw, case.shifted)
    for row in range(coords.shape[0]):
        for window in ids[row].unique().tolist():
            cells = coords[row, ids[row] == window]
            if window >= 0:
                spread = (cells[:, 1:].amax(0) - cells[:, 1:].amin(0)).tolist()
                within = all(s < w for s, w in zip(spread, case.window_thw, strict=True))
                line = f"window_ids: window {window} of row {row} must lie in {case.window_thw} cells"
                assert within, report(f"{line}, got cells that are {spread} apart", case)
                line = f"window_ids: window {window} of row {row} must lie in one segment"
                assert len(cells[:, 0].unique()) == 1, report(f"{line}, got {cells[:, 0].tolist()}", case)


@pytest.mark.needs("scan_order")
@pytest.mark.parametrize(
    ("layer_index", "cells"),
    (
        (0, ["000", "001", "010", "011", "100", "101", "110", "111"]),
        (1, ["000", "010", "001", "011", "100", "110", "101", "111"]),
        (2, ["000", "100", "001", "101", "010", "110", "011", "111"]),
        (3, ["000", "100", "010", "110", "001", "101", "011", "111"]),
    ),
)
def test_the_four_orders_of_a_cube(backend, layer_index, cells):
    """Spelt out as txy digits t, y, x of a 2 × 2 × 2 segment: the last axis of the key moves fastest."""
    coords = Layout(((Text(1), Vision(0, (2, 2, 2)), Text(1)),)).coords
    scanned = gathered(coords, backend.scan_order(coords, layer_index))[0, 1:-1, 1:]
    found = ["".join(map(str, cell)) for cell in scanned.tolist()]
    assert found == cells, f"scan_order: layer {layer_index} must visit txy {cells}, got {found}"


def far_apart(coords: torch.Tensor, *columns: int) -> torch.Tensor:
    """The same cells and segments, in these columns, by default all, under numbers too large to join."""
    stretched = torch.where(coords >= 0, coords * 2**40, coords)
    if not columns:
        return stretched
    return torch.stack([(stretched if i in columns else coords)[..., i] for i in range(4)], dim=-1)


@orders()
def test_large_coordinates_sort_as_small_ones(backend, case: LayoutCase):
    """Keys that are joined into one number must not overflow it."""
    coords = case.layout.coords
    for layer in four_layers(case):
        wanted = backend.scan_order(coords, layer)
        for far in (far_apart(coords), far_apart(coords, 1 + (case.seed + layer) % 3)):
            found = backend.scan_order(far, layer)
            assert_order(found, wanted, far, case, f"order of layer {layer}, coordinates times 2^40")


@partitions()
def test_large_coordinates_have_the_windows_of_small_ones(backend, case: LayoutCase):
    """The same of the keys of windows: cells of one token, and everything in one cell. Ids may differ."""
    coords = case.layout.coords
    for window, far in (((1, 1, 1), (1, 1, 1)), ((64,) * 3, (2**48,) * 3)):
        found = backend.window_ids(far_apart(coords), far, case.shifted)
        wanted = backend.window_ids(coords, window, case.shifted)
        what = f"windows {far} of coordinates times 2^40"
        assert_windows(found, partition(wanted), far_apart(coords), case, what)
    far = far_apart(coords, 1 + case.seed % 3)
    found, wanted = (backend.window_ids(cells, (1, 1, 1), case.shifted) for cells in (far, coords))
    assert_windows(found, partition(wanted), far, case, "windows (1, 1, 1) of one axis times 2^40")


@pytest.mark.needs("window_ids")
@pytest.mark.parametrize(
    ("columns", "window", "sizes"),
    (
        (8, 4, [2, 4, 2]),  # Swin's shifted row, border windows smaller, not wrapped
        (5, 4, [2, 3]),
        (4, 4, [4]),  # not longer than the window: no shift
        (3, 4, [3]),
        (5, 3, [2, 3]),  # an odd window shifts by its half rounded down
        (3, 1, [1, 1, 1]),
    ),
)
def test_shifted_windows_follow_swins_rule(backend, columns, window, sizes):
    """Half a window, only where the segment is longer than the window."""
    coords = Layout(((Vision(0, (1, 1, columns)),),)).coords
    ids = backend.window_ids(coords, (4, 8, window), True)[0].tolist()
    found, row = [ids.count(i) for i in dict.fromkeys(ids)], f"a row of {columns} columns, window {window}"
    assert found == sizes, f"window_ids: {row}, shifted, must have windows of {sizes} tokens, got {found}"


@pytest.mark.needs("window_ids")
@pytest.mark.parametrize("axis", (1, 2, 3))
def test_cells_without_a_token_count_towards_the_extent(backend, axis):
    """Four cells of seven, 0 1 5 6: a window of four is shifted, to 0 1 | 5 | 6."""
    coords = torch.zeros(1, 4, 4, dtype=torch.int64)
    coords[0, :, axis] = torch.tensor([0, 1, 5, 6])
    ids = backend.window_ids(coords, (4, 4, 4), True)[0].tolist()
    found = [list(dict.fromkeys(ids)).index(i) for i in ids]
    assert found == [0, 0, 1, 2], f"window_ids: cells 0 1 5 6 must be in windows 0 0 1 2, got {found}"


@pytest.mark.needs("window_ids")
def test_the_shift_looks_at_every_segment_and_axis_by_itself(backend):
    """A long image next to a short one, a long axis next to a short one."""
    coords = Layout(((Vision(0, (1, 2, 4)), Vision(1, (1, 2, 2)), Vision(2, (3, 1, 2))),)).coords
    ids = backend.window_ids(coords, (2, 2, 2), True)[0]
    sizes = [
        sorted(int((ids == i).sum()) for i in ids[span].unique())
        for span in (slice(8), slice(8, 12), slice(12, 18))
    ]
    wanted = [[2, 2, 4], [4], [2, 4]]
    assert sizes == wanted, f"window_ids: segments must have windows of {wanted} tokens, got {sizes}"


LARGE = {
    "an image of 40 x 52": Layout(((Text(7), Vision(0, (1, 40, 52), "row"), Text(3)),)),
    "a video and 3,000 tokens of text": Layout(((Text(3000), Vision(0, (9, 20, 20), "frame")),)),
    "300 images": Layout((tuple(Vision(i, (1, 2, 3)) for i in reversed(range(300))),)),
    "one axis of 2,100 cells": Layout(((Vision(0, (1, 1, 2100)),), (Vision(0, (2100, 1, 1)),))),
    "300 rows": Layout(((Text(1), Vision(0, (1, 2, 2))),) * 300),
}


@pytest.mark.needs("scan_order", "inverse_order")
@pytest.mark.parametrize("name", LARGE)
def test_orders_of_the_sizes_that_people_run(backend, name):
    """Thousands of cells, hundreds of segments and rows, in every order."""
    coords = LARGE[name].coords
    for layer in range(4):
        order = backend.scan_order(coords, layer)
        wanted = second_formulation.scan_order(coords, layer)
        assert_order(order, wanted, coords, name, f"order of layer {layer}")
        if layer == 1:  # cells of 64 tokens, which keep their order
            cells = torch.where(coords >= 0, coords * torch.tensor((8, 2, 1, 1)) // 8, coords)
            wanted = second_formulation.scan_order(cells, layer)
            found = backend.scan_order(cells, layer)
            assert_order(found, wanted, cells, name, f"order of layer {layer}, with ties")
        position = torch.arange(order.shape[1]).expand_as(order)
        assert_exact(order.gather(1, backend.inverse_order(order)), position, name, "order after inverse")


@pytest.mark.needs("inverse_order")
def test_the_inverse_of_70_000_tokens(backend):
    """Positions do not fit into 16 bits."""
    order = torch.randperm(70_000, generator=torch.Generator().manual_seed(0)).expand(2, -1)
    found = order.gather(1, backend.inverse_order(order))
    assert_exact(found, torch.arange(70_000).expand(2, -1), "70,000 tokens", "order after inverse")


@pytest.mark.needs("window_ids")
@pytest.mark.parametrize("name", LARGE)
def test_windows_of_the_sizes_that_people_run(backend, name):
    """The same cells and segments in windows small and large, shifted or not."""
    coords = LARGE[name].coords
    for window in ((4, 8, 8), (1, 1, 1), (9, 40, 52)):
        for shifted in (False, True):
            found = backend.window_ids(coords, window, shifted)
            wanted = reference.window_ids(coords, window, shifted)
            what = f"first token of each token's window, {window}, shifted={shifted}"
            assert_exact(first_seen(found), first_seen(wanted), name, f"window_ids: {what}")


def first_seen(ids: torch.Tensor) -> torch.Tensor:
    """Each id replaced by the place of its first token in the row, -1 left as it is."""
    rows = []
    for row in ids.tolist():
        places: dict[int, int] = {-1: -1}
        rows.append([places.setdefault(number, place) for place, number in enumerate(row)])
    return torch.tensor(rows)


@property_of("scan_order", "inverse_order", "window_ids", cases=CASES)
def test_layouts_do_not_depend_on_strides_and_leave_their_arguments(backend, case: LayoutCase):
    """Coordinates with gaps and their last axis first in memory; nothing is written to them."""
    coords = case.layout.coords
    strided, copy = oddly_strided(coords), coords.clone()
    order = backend.scan_order(coords, case.layer_index)
    ids, inverse = backend.window_ids(coords, case.window_thw, case.shifted), backend.inverse_order(order)
    for result, argument in ((order, coords), (ids, coords), (inverse, order)):
        line = "scan_order, window_ids and inverse_order: results must be new tensors, got a view"
        assert memory_of(result) != memory_of(argument), report(line, case)
    assert_exact(backend.scan_order(strided, case.layer_index), order, case, "scan_order of strided coords")
    assert_exact(strided, copy, case, "scan_order or window_ids: coords after the call")
    for name, call in (
        ("window_ids", lambda given: backend.window_ids(given, case.window_thw, case.shifted)),
        ("inverse_order", lambda given: backend.inverse_order(oddly_strided(order))),
    ):
        assert_exact(call(strided), call(coords), case, f"{name} of strided coords")
    assert_exact(strided, copy, case, "scan_order or window_ids: coords after the call")


@property_of("scan_order", "window_ids", cases=CASES)
def test_layouts_are_not_remembered_between_calls(backend, case: LayoutCase):
    """Other coordinates in the same memory have their own orders and windows; results outlive a call."""
    coords = case.layout.coords.clone()
    others = torch.cat([coords[..., :1], coords[..., 1:].flip(-1)], dim=-1)
    windows = (case.window_thw, case.shifted)
    wanted = backend.scan_order(others, case.layer_index), backend.window_ids(others, *windows)
    copies = [tensor.clone() for tensor in wanted]
    backend.scan_order(coords, case.layer_index)
    backend.window_ids(coords, case.window_thw, case.shifted)
    for name, found, copy in zip(("scan_order", "window_ids"), wanted, copies, strict=True):
        assert_exact(found, copy, case, f"{name}: the result, after another call")
    coords.copy_(others)
    found = backend.scan_order(coords, case.layer_index)
    assert_order(found, wanted[0], coords, case, "order of coords that were written to")
    found = backend.window_ids(coords, case.window_thw, case.shifted)
    assert_windows(found, partition(wanted[1]), coords, case, "windows of coords that were written to")


@property_of("inverse_order", cases=CASES)
def test_inverses_are_not_remembered_between_calls(backend, case: LayoutCase):
    """Another order in the same memory has its own inverse; an inverse outlives the next call."""
    length = case.layout.shape[1]
    order = torch.randperm(length, generator=torch.Generator().manual_seed(case.seed)).repeat(2, 1)
    given, inverse = order.clone(), backend.inverse_order(order)
    copy = inverse.clone()
    backend.inverse_order(given)
    given.copy_(copy)
    assert_exact(backend.inverse_order(given), order, case, "inverse_order of an order that was written to")
    assert_exact(inverse, copy, case, "inverse_order: the result, after another call")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.needs(n)) for n in ("scan_order", "inverse_order", "window_ids")],
)
@pytest.mark.parametrize("shape", ((0, 3), (2, 0), (0, 0)))
def test_layouts_may_have_no_rows_and_no_tokens(backend, name, shape):
    """What is made of nothing is empty, int64, and no error."""
    coords = torch.zeros(*shape, 4, dtype=torch.int64)
    given = {
        "scan_order": (coords, 1),
        "inverse_order": (coords[..., 0],),
        "window_ids": (coords, (2, 2, 2), True),
    }
    found = getattr(backend, name)(*given[name])
    assert_exact(found, torch.zeros(shape, dtype=torch.int64), shape, name)
