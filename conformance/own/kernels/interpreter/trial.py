"""Run linmu.optimized's Triton kernels in the interpreter, watched, against the reference. Started by
test_kernels.py.

    TRITON_INTERPRET=1 python trial.py OPERATOR DTYPE

Chunks, runs and blocks are made small, so that short sequences cross all of them; the sequences are ragged,
with padding, text inside segments, several segments, windows of any size, and NaN wherever nothing may be
read.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from linmu import optimized, reference
from linmu.optimized.causal_conv import kernels as conv_kernels
from linmu.optimized.layout import plan as window_plan
from linmu.optimized.losses import kernels as loss_kernels
from linmu.optimized.scan.kernels import states as scan_states
from linmu.optimized.scan.kernels import tiles as scan_tiles
from linmu.optimized.window_attention import kernels as window_kernels
from linmu.optimized.window_attention import kernels_backward as window_gradients
from linmu.optimized.window_attention import tiles as window_tiles

from ....harness.cancellation import sizes_of_sums
from ....harness.compare import assert_matches, cotangent
from . import mend_bfloat16, mend_scalars, watch_memory

Arguments = dict[str, Any]


def shrink_blocks() -> None:
    """Chunks of two parts of 16 tokens, runs of 2 chunks, small blocks of the rest."""
    scan_tiles.CHUNKS.update(dict.fromkeys(scan_tiles.CHUNKS, 32))
    scan_tiles.GRADIENT_CHUNKS.update(dict.fromkeys(scan_tiles.CHUNKS, 32))
    scan_tiles.ROWS.update(dict.fromkeys(scan_tiles.ROWS, 16))
    scan_states.RUN, scan_states.PROGRAMS = 2, 1
    conv_kernels.ROWS, conv_kernels.COLUMNS = 8, 16
    loss_kernels.BLOCK = 16
    window_plan.BLOCK = 32
    for table in (window_kernels.FORWARD, window_gradients.QUERY_GRADIENT, window_gradients.KEY_GRADIENT):
        table.update(dict.fromkeys(table, window_kernels.Tiles(16, 16, 4, 1)))
    for table, rows in ((window_kernels.HELD, 32), (window_gradients.QUERY_HELD, 16)):
        table.update(dict.fromkeys(table, window_kernels.Tiles(rows, 64, 4, 1)))
    window_gradients.KEY_HELD.update(
        dict.fromkeys(window_gradients.KEY_HELD, window_kernels.Tiles(16, 16, 4, 1))
    )
    window_tiles.HELD_PROGRAMS, window_tiles.REST_PROGRAMS = 10, 1


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def scan_arguments(length: int, heads: int, groups: int, state: int, head_dim: int) -> Arguments:
    batch = 2
    return {
        "x": numbers(batch, length, groups, head_dim),
        "dt": torch.rand(batch, length, heads, dtype=torch.float64) + 0.05,
        "A": -torch.rand(heads, dtype=torch.float64) * 2,
        "B": numbers(batch, length, groups, state),
        "C": numbers(batch, length, heads, state),
        "initial_state": numbers(batch, heads, state, head_dim),
    }


def bidirectional_cases() -> Iterator[Arguments]:
    for length, sizes in ((1, (2, 1, 3, 2)), (17, (2, 2, 4, 5)), (85, (3, 1, 5, 3))):
        given = scan_arguments(length, *sizes)
        position = torch.arange(length).expand(2, length)
        segment = (position // 11 * 7 % 9).where(position % 11 > 1, -1)
        segment = segment.where(torch.rand(2, length) < 0.9, -1)
        valid = position >= torch.tensor([[length // 4], [0]])
        gate = torch.rand(2, length, sizes[0], dtype=torch.float64)
        everything = {"gate": gate, "segment": segment, "valid": valid, "D": numbers(sizes[0])}
        yield spoil_at(given | everything, ("x", "dt", "B", "C", "gate"), valid)
    first = {name: given[name][:, :40] for name in ("x", "dt", "B", "C")}
    yield given | first | {"gate": gate[:, :40], "initial_state": None}
    some = slice(21, 71)  # two chunks
    tokens = {name: given[name][:, some] for name in ("x", "dt", "B", "C")}
    tokens |= {"gate": gate[:, some], "segment": segment[:, some], "valid": valid[:, some]}
    yield packed(spoil_at(given | everything | tokens, tuple(tokens)[:5], tokens["valid"]))


def selective_cases() -> Iterator[Arguments]:
    for reverse in (False, True):
        mask = torch.rand(2, 69) < 0.7
        yield spoil_at(scan_arguments(69, 2, 1, 4, 3), ("x", "dt", "B", "C"), mask) | {
            "mask": mask,
            "reverse": reverse,
        }
    yield packed(scan_arguments(50, 2, 1, 4, 3))


def step_cases() -> Iterator[Arguments]:
    for valid in (None, torch.tensor([True, False])):
        given = scan_arguments(1, 4, 2, 5, 3)
        tokens = {name: given[name][:, 0] for name in ("x", "dt", "B", "C")}
        yield tokens | {"A": given["A"], "D": numbers(4), "state": given["initial_state"], "valid": valid}


def conv_cases() -> Iterator[Arguments]:
    for taps, mask in ((4, torch.rand(2, 19) < 0.6), (3, None), (1, None)):
        given = {"u": numbers(2, 19, 20), "weight": numbers(20, taps), "bias": numbers(20), "mask": mask}
        start = {"initial_state": numbers(2, taps - 1, 20)}
        yield spoil_at(given, ("u",), mask) | start
        yield packed(spoil_at(given, ("u",), mask) | start)


def packed(given: Arguments) -> Arguments:
    """Samples of many lengths, one token among them, some longer than a chunk; in the second row the last one
    is the first. None begins in a segment."""
    batch, length = next(given[name] for name in ("x", "u") if name in given).shape[:2]
    begins = torch.zeros(batch, length, dtype=torch.bool)
    begins[:, [place for place in (3, 4, 11, 17, 39, length - 2) if place < length]] = True
    segment = given.get("segment")
    if segment is not None:
        begins[:, 1:] &= (segment[:, 1:] != segment[:, :-1]) | (segment[:, 1:] < 0)
    begins[1, length // 2 :] = False
    begins[1, 19:] = False
    return given | {"sequence": 2**33 * begins.cumsum(1)}


def window_cases() -> Iterator[Arguments]:
    """Windows of any size, and of about the sizes that kernels hold at once, the largest of which is 64."""
    edges = (64, 65, 33, 31, 15, 32, 3)
    of_edges = torch.arange(len(edges)).repeat_interleave(torch.tensor(edges))
    of_edges = torch.stack([of_edges[torch.randperm(len(of_edges))], of_edges.where(of_edges != 1, -1)])
    for ids, (heads, groups) in (
        (torch.tensor([[0], [-1]]), (1, 1)),
        (torch.randint(-1, 9, (2, 70)), (4, 2)),
        (torch.randint(-1, 1, (2, 70)), (2, 1)),
        (torch.randint(-1, 3, (2, 70)), (3, 1)),
        (torch.full((2, 5), -1), (2, 2)),
        (of_edges, (2, 1)),
    ):
        length = ids.shape[1]
        given = {"q": numbers(2, length, heads, 5), "k": numbers(2, length, groups, 5)}
        given |= {"v": numbers(2, length, groups, 3), "window_id": ids}
        yield spoil_at(given, ("q", "k", "v"), ids >= 0)


def far_from_zero_cases() -> Iterator[Arguments]:
    """Attention spread over keys and values of a large mean, which cancels in the gradient of q: there ō·o is
    too coarse with o rounded. In bfloat16 the rounding of the softmax's gradient shows, too: accepted."""
    ids = torch.randint(-1, 2, (2, 70))
    given = {"q": 0.1 * numbers(2, 70, 2, 5), "k": 4 + numbers(2, 70, 1, 5), "v": 4 + numbers(2, 70, 1, 3)}
    yield spoil_at(given | {"window_id": ids}, ("q", "k", "v"), ids >= 0)


def loss_cases() -> Iterator[Arguments]:
    for size, mask in (
        (33, torch.tensor([[True, False, True]])),
        (1, None),
        (16, torch.zeros(1, 3, dtype=torch.bool)),
    ):
        yield {
            "student": numbers(1, 3, size),
            "teacher": numbers(1, 3, size),
            "mask": mask,
            "temperature": 2.0,
        }


def spoil_at(given: Arguments, names: tuple[str, ...], mask: Tensor | None) -> Arguments:
    """Mark tensors whose tokens hold NaN where `mask` is False, in what the kernels are given."""
    return given | {"spoil": (names, mask)}


def spoilt(given: Arguments, names: tuple[str, ...], mask: Tensor | None) -> Arguments:
    """NaN where `mask` is False."""
    if mask is None:
        return given

    def spoil(tensor: Tensor) -> Tensor:
        where = mask.view(*mask.shape, *(1,) * (tensor.ndim - 2))
        return tensor.where(where, float("nan"))

    return given | {name: spoil(given[name]) for name in names}


CASES: dict[str, Callable[[], Iterator[Arguments]]] = {
    "bidirectional_scan": bidirectional_cases,
    "selective_scan": selective_cases,
    "scan_step": step_cases,
    "causal_conv": conv_cases,
    "window_attention": window_cases,
    "logit_loss": loss_cases,
}
FINE = {"window_attention": far_from_zero_cases}  # of float16 and float32
WIDE = ("dt", "A", "gate", "D", "state", "initial_state")  # float32 whatever the dtype of the tokens


def rounded(given: Arguments, dtype: torch.dtype, width: torch.dtype | None = None) -> Arguments:
    """The arguments as a model in `dtype` has them; in `width`, if given, the same values."""

    def cast(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        value = value.to(torch.float32 if name in WIDE else dtype)
        return value if width is None else value.to(width)

    return {name: cast(name, value) for name, value in given.items()}


def results(function: Callable, given: Arguments, draw: int | None = None) -> dict[str, Tensor]:
    """Outputs and gradients by name; a gradient that does not exist is zero. `draw` as in `evaluate`."""
    floats = {
        k: v.clone().requires_grad_()
        for k, v in given.items()
        if isinstance(v, Tensor) and v.is_floating_point()
    }
    floats.pop("teacher", None)
    outputs = function(**{**given, **floats})
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    steps = [cotangent(output, i, draw) for i, output in enumerate(outputs)]
    asked = [(output, step) for output, step in zip(outputs, steps, strict=True) if output.requires_grad]
    found = [None] * len(floats)
    if asked:
        held, given_grads = zip(*asked, strict=True)
        found = torch.autograd.grad(held, list(floats.values()), given_grads, allow_unused=True)
    named = dict(zip(("y", "final_state"), (output.detach() for output in outputs), strict=False))
    for (name, leaf), grad in zip(floats.items(), found, strict=True):
        named[f"grad {name}"] = torch.zeros_like(leaf) if grad is None else grad
    return named


def main(operator: str, dtype: torch.dtype) -> int:
    """Number of cases that fail; each is printed."""
    torch.manual_seed(0)
    shrink_blocks()
    mend_bfloat16()
    mend_scalars()
    optimized.set_engine("triton")
    failed = 0
    fine = FINE[operator]() if operator in FINE and dtype != torch.bfloat16 else ()
    drawn = (given for given in CASES[operator]() if dtype == torch.bfloat16 or "sequence" not in given)
    cases = enumerate(chain(drawn, fine))  # packed rows are told apart alike in every dtype
    if dtype == torch.float16:  # the kernels of float32 or bfloat16 otherwise
        cases = islice(cases, 2, None, 2)
    for number, given in cases:
        scan_states.ENOUGH = (1, 10**6)[number % 2]  # without runs, with runs
        names, mask = given.pop("spoil", ((), None))
        own = results(getattr(reference, operator), rounded(given, dtype))
        truth = results(getattr(reference, operator), rounded(given, dtype, torch.float64))
        with watch_memory():
            got = results(getattr(optimized, operator), spoilt(rounded(given, dtype), names, mask))
        try:
            wide = partial(results, getattr(reference, operator), rounded(given, dtype, torch.float64))
            sizes = partial(sizes_of_sums, lambda draw, wide=wide: wide(draw=draw))
            assert_matches(got, truth, own, f"case {number} of {operator}", sizes)
        except AssertionError as error:
            print(error)
            failed += 1
    return failed


if __name__ == "__main__":
    sys.exit(bool(main(sys.argv[1], getattr(torch, sys.argv[2]))))
