"""Numbers that bring out what is rounded inside: terms that cancel, and decays of a large state.

A rounding to half precision is as small as that of the results, and hides behind it unless it is made to
matter. Each check takes a backend and a case of half precision.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch.nn.functional import one_hot

from linmu import reference

from .compare import assert_same, quarters
from .operator_cases import BidirectionalCase, Case, ConvCase, Numbers, run
from .operator_checks import check_matches_the_reference, sizes_of_gradients

HALVES = ("mixed", "bfloat16", "float16")
KEYS = ("k", "initial_k")
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
