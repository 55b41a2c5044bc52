"""Numbers that bring out what is rounded inside: terms that cancel, and decays of a large state.

A rounding to half precision is as small as that of the results, and hides behind it unless it is made to
matter. Each check takes a backend and a case of half precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.nn.functional import one_hot

from linmu import reference

from .compare import assert_same, check_errors, evaluate, in_float64, quarters
from .operator_cases import BidirectionalCase, Case, ConvCase, Numbers, run
from .operator_checks import check_matches_the_reference, sizes_of_gradients

HALVES = ("mixed", "bfloat16", "float16")
KEYS = ("k", "initial_k")
OF_A_STATE = 1e-6  # what float32 may lose of one that nothing happens to
WRITES = 601
STRONG = 16  # e^16 is what a state loses in one token


def check_decays(backend: Any, case: Case) -> None:
    """One token after which e^16 of a state of that size is left: an error of dt A is multiplied by 16, in
    results and in gradients."""
    given, numbers = case.inputs(), Numbers(case.seed + 2)
    state = "state" if case.operator == "scan_step" else "initial_state"
    decays = case.changed(
        dt=numbers.uniform(*given["dt"].shape, low=1, high=1.06).to(given["dt"]),
        A=-numbers.uniform(*given["A"].shape, low=STRONG, high=STRONG + 1).to(given["A"]),
        **{state: given[state] * math.exp(STRONG)},
    )
    check_matches_the_reference(backend, decays)


def check_state_is_kept(backend: Any, case: Case) -> None:
    """Steps of 0 hand on a float32 state as it came, and its gradient as it comes back; so does a
    convolution, which moves its state along."""
    state = "state" if case.operator == "scan_step" else "initial_state"
    after, given = case.results[1], case.inputs()
    weights = Numbers(case.seed + 5).normal(*given[state].shape)

    def weighted(module: Any, **given: Any) -> torch.Tensor:
        return getattr(module, case.operator)(**given)[1] * weights.to(given[state])

    kept = given | ({"dt": torch.zeros_like(given["dt"])} if "dt" in given else {})
    names = (after, f"grad {state}")
    found, wanted = (
        evaluate(partial(weighted, module), inputs, gradients=True, names=(after,))
        for module, inputs in ((backend, kept), (reference, in_float64(kept)))
    )
    for name in names:
        check_errors(name, found[name], wanted[name], case, floor=OF_A_STATE)


def check_small_writes_across_pieces(
    operator: Callable, dtype: torch.dtype, last: int = -1, **given: Any
) -> None:
    """601 writes of 1/2 to a state of 4,096, where bfloat16 counts by 32 and float16 by 4, all at once and a
    few at a time, the state handed over. `last` is the place of the token that is scanned last; `given` holds
    what else the operator takes for each token and head, the same everywhere."""
    for tokens in (WRITES, 13):
        state = torch.full((1, 1, 1, 1), 4096.0)
        for start in range(0, WRITES, tokens):
            one = torch.ones(1, min(tokens, WRITES - start), 1, 1, dtype=dtype)
            step, decay = torch.full_like(one[..., 0], 0.5), torch.tensor([-1e-12])
            shaped = {name: torch.full_like(step, value) for name, value in given.items()}
            y, state = operator(one, step, decay, one, one, initial_state=state, **shaped)
        assert state.item() == pytest.approx(4096 + WRITES / 2, abs=1e-2), f"in pieces of {tokens} tokens"
        assert y[0, last].item() == pytest.approx(4096 + WRITES / 2, rel=0.005), (
            f"in pieces of {tokens} tokens"
        )


def check_skip(backend: Any, case: Case) -> None:
    """Each token reads x of itself alone, and the skip takes 63 parts in 64 of that away."""
    given = case.inputs()
    read_one = torch.zeros_like(given["C"])
    read_one[..., 0] = 1
    cancelling = case.changed(
        dt=torch.ones_like(given["dt"]),
        A=torch.full_like(given["A"], -1000),
        B=torch.ones_like(given["B"]),
        C=read_one,
        D=torch.full_like(given["A"], 2**-6 + 2**-12 - 1),
    )
    check_matches_the_reference(backend, cancelling, gradients=False)


def check_gate(backend: Any, case: BidirectionalCase) -> None:
    """Of two tokens, x and -2x, that nothing decays, the first reads x one way and -x the other: a gate of
    about 1/2 leaves the little that it differs by."""
    given = case.inputs()
    read_one = torch.zeros_like(given["C"])
    read_one[..., 0] = 1
    x = given["x"][:, :1]
    cancelling = case.changed(
        x=torch.cat([x, -2 * x], dim=1),
        dt=torch.ones_like(given["dt"]),
        A=torch.full_like(given["A"], -1e-30),
        B=torch.ones_like(given["B"]),
        C=read_one,
        gate=torch.full_like(given["gate"], 0.5 + 2**-7 + 2**-9),
    )
    left = 2 * (2**-7 + 2**-9) * x.double().repeat_interleave(case.ratio, dim=2)
    assert_same({"y": run(backend, cancelling)["y"][:, :1]}, {"y": left.to(x.dtype)}, case)


def check_taps(backend: Any, case: ConvCase) -> None:
    """Inputs that differ in their last bits, taps that differ in sign."""
    given = case.inputs()
    step, numbers = torch.finfo(given["u"].dtype).eps, Numbers(case.seed + 2)
    bits = torch.randint(0, 8, given["u"].shape, generator=numbers.generator)
    signs = 1 - 2 * (torch.arange(case.taps) % 2)
    cancelling = case.changed(
        u=(1 + step * bits).to(given["u"]),
        weight=given["weight"][:, :1] * signs.to(given["weight"]),
        initial_state=torch.ones_like(given["initial_state"]),
    )
    check_matches_the_reference(backend, cancelling, gradients=False)


def check_state_is_read_in_float32(backend: Any, case: ConvCase) -> None:
    """A state that half precision cannot hold, under taps of 1 and -1: what is left is what rounding takes
    away."""
    given, numbers = case.inputs(), Numbers(case.seed + 2)
    bits = torch.randint(0, 16, given["initial_state"].shape, generator=numbers.generator)
    signs = 1 - 2 * (torch.arange(case.taps) % 2)
    cancelling = case.changed(
        u=torch.ones_like(given["u"]),
        weight=torch.ones_like(given["weight"][:, :1]) * signs.to(given["weight"]),
        initial_state=1 + 2.0**-14 * bits.to(given["initial_state"]),
    )
    check_matches_the_reference(backend, cancelling, gradients=False)


def check_taps_are_kept(backend: Any, case: ConvCase) -> None:
    """The current token alone, with a tap and a bias that cancel but for what half precision leaves out of
    each."""
    given = case.inputs()
    weight = torch.zeros_like(given["weight"])
    weight[:, -1] = 1 + 2**-10
    bias = torch.full_like(weight[:, 0], 2**-11 - 1)
    u = torch.ones_like(given["u"])
    out = run(backend, case.changed(u=u, weight=weight, bias=bias))["out"]
    assert_same({"out": out}, {"out": torch.full_like(u, 2**-10 + 2**-11)}, case)


def check_scores(backend: Any, case: Case) -> None:
    """Large scores that differ by the last bits of q, of which each key reads one channel; and with q and k
    swapped."""
    for fine, coarse in (("q", "k"), ("k", "q")):
        given, generator = case.inputs(), Numbers(case.seed + 2).generator
        step = torch.finfo(given["q"].dtype).eps
        bits = torch.randint(0, 8, given[fine].shape, generator=generator)
        channel = torch.randint(0, case.state, given[coarse].shape[:3], generator=generator)
        close = case.changed(
            **{
                fine: (1 + step * bits).to(given["q"]),
                coarse: (one_hot(channel, case.state) / step).to(given["q"]),
            }
        )
        check_matches_the_reference(backend, close, gradients=False)


def check_low_scores(backend: Any, case: Case) -> None:
    """All scores far below 0, exactly so, but one key's, far above it: a softmax knows differences only, and
    those of keys that a token sees. A logarithm of its sum is as large as the scores, and so is its rounding.
    """
    given = case.inputs()
    for offset in (16, 512, 2**15):
        q, k = quarters(given["q"], case.seed), {}
        q[..., -1] = 1
        for place, name in enumerate(name for name in KEYS if given.get(name) is not None):
            k[name] = quarters(given[name], case.seed + 1 + place)
            k[name][..., -1] = -offset
        k["k"][:, case.length // 2, :, -1] = offset
        low = case.changed(q=q, **k, scale=1.0)
        found, wanted = (run(each, low, gradients=True) for each in (backend, reference))
        of_sums = partial(sizes_of_gradients, low)
        assert_same(found, wanted, case, 1 + offset / 50, of_sums, "linmu.reference")


def check_low_scores_of_all(backend: Any, case: Case) -> None:
    """All scores far below 0, exactly so, in one block of places or in several, of which some hold no token:
    the result is a mean of values, never 0. e^-1024 is 0 in float64, too."""
    given = case.inputs()
    for offset in (1024, 2**15):
        q = quarters(given["q"], case.seed)
        q[..., -1] = 1
        keys = {name: quarters(given[name], case.seed + 1) for name in KEYS if given.get(name) is not None}
        for k in keys.values():
            k[..., -1] = -offset
        low = case.changed(q=q, **keys, scale=1.0)
        found, wanted = (run(each, low, gradients=True) for each in (backend, reference))
        of_sums = partial(sizes_of_gradients, low)
        assert_same(found, wanted, case, 1 + offset / 50, of_sums, "linmu.reference")
