"""Run the Triton kernels of sliding-window attention in the interpreter, watched, against the reference:
outputs, states, every gradient, and one token of decoding. Started by test_kernels.py.

    TRITON_INTERPRET=1 python trial_sliding_window.py DTYPE
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from itertools import islice

import torch

from linmu import optimized, reference
from linmu.optimized.sliding_window_attention import kernels, kernels_backward, kernels_step

from ....harness.compare import assert_exact, assert_matches
from ....harness.operator_cases import Case, run
from ....harness.operator_checks import sizes_of_gradients, widened
from ....harness.sliding_window_cases import STATE, SlidingWindowCase
from . import mend_bfloat16, mend_scalars, watch_memory

SMALL = {"scale": None, "seed": 3}


def cases(dtype: str) -> Iterator[SlidingWindowCase]:
    """Every kind of mask, windows smaller and larger than a tile, rows of several tiles, groups of heads."""
    case = partial(SlidingWindowCase, dtype=dtype, **SMALL)
    yield case(1, 37, 4, 2, 5, 3, 20, "none", "none", False, False)
    yield case(2, 50, 3, 1, 8, 20, 7, "some", "some", True, True)
    yield case(1, 21, 2, 2, 3, 5, 40, "left", "right", False, True)
    yield case(2, 35, 2, 1, 17, 1, 1, "right", "left", True, False)
    yield case(1, 3, 1, 1, 2, 2, 18, "none", "none", False, True)
    yield case(1, 40, 2, 1, 3, 3, 16, "some", "none", False, False)


def steps(dtype: str) -> Iterator[SlidingWindowCase]:
    """One token behind states of several tiles, or of less than one."""
    case = partial(SlidingWindowCase, dtype=dtype, packed=False, initial_state=True, **SMALL)
    yield case(3, 1, 4, 2, 5, 3, 20, "none", "none")
    yield case(3, 1, 3, 1, 20, 17, 40, "some", "some")
    yield case(2, 1, 2, 2, 3, 1, 2, "none", "some")


def spoilt(case: SlidingWindowCase) -> Case:
    """NaN where nothing may be read."""
    given, everyone = case.inputs(), torch.ones(case.batch, case.length, dtype=torch.bool)
    there = everyone if given["valid"] is None else given["valid"]
    asking = there if given["asks"] is None else there & given["asks"]
    where = {"q": asking, "k": there, "v": there}
    where |= dict.fromkeys(STATE[:2], given["present"]) if case.initial_state else {}
    return case.changed(
        **{name: given[name].where(mask[..., None, None], float("nan")) for name, mask in where.items()}
    )


def check(case: SlidingWindowCase, gradients: bool) -> None:
    """Raises unless the kernels' results are those of the reference, and in a second run the same."""
    truth, own = run(reference, widened(case), gradients), run(reference, case, gradients)
    with watch_memory():
        found, again = (run(optimized, each, gradients) for each in (spoilt(case), case))
    assert_matches(found, truth, own, case, partial(sizes_of_gradients, case))
    for name, result in found.items():
        assert_exact(again[name], result, case, f"{name} of a second run")


def main(dtype: str) -> None:
    """Raises the AssertionError of the first case that fails."""
    mend_bfloat16()
    mend_scalars()
    for table in (kernels.FORWARD, kernels_backward.QUERY_GRADIENT, kernels_backward.KEY_GRADIENT):
        table.update(dict.fromkeys(table, kernels.Tiles(16, 16, 4, 1)))
    kernels_step.READ, kernels_step.MOVED = dict.fromkeys((False, True), 16), 16
    optimized.set_engine("triton")
    for case in islice(cases(dtype), dtype == "float16", None, 1 + (dtype == "float16")):
        check(case, gradients=True)  # float16 has the kernels of bfloat16, so half of the cases
    with torch.no_grad():
        for case in steps(dtype):
            check(case, gradients=False)


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    main(sys.argv[1])
