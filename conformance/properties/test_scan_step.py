"""`scan_step`: one token of decoding, which must continue what prefill began."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from ..harness import operator_checks, rounding
from ..harness.compare import assert_exact, assert_matches, assert_same, assert_zero, in_float64, quarters
from ..harness.layouts import Layout, Text
from ..harness.operator_cases import (
    DTYPES,
    BidirectionalCase,
    ScanCase,
    StepCase,
    bidirectional_cases,
    fed,
    property_of,
    run,
    scan_cases,
    step_cases,
)

TOKENS = ScanCase.tokens
step = partial(property_of, "scan_step")

globals().update(operator_checks.call_properties("scan_step", step_cases))


@step("selective_scan", cases=scan_cases(DTYPES, reverse=False, initial_state=True))
def test_steps_equal_the_scan(backend, case: ScanCase):
    """Token by token, rows that take no part keep their state and give zero."""
    given = case.inputs()
    mask = torch.ones(case.shape, dtype=torch.bool) if given["mask"] is None else given["mask"]
    state, outputs = given["initial_state"], []
    for t in range(case.length):
        x, dt, B, C = (given[name][:, t] for name in TOKENS)
        y, state = backend.scan_step(state, x, dt, given["A"], B, C, valid=mask[:, t])
        outputs.append(y)
    stepped = {"y": torch.stack(outputs, dim=1), "final_state": state}
    assert_same(stepped, run(backend, case), case, factor=2)


@step(cases=step_cases(DTYPES, skip=True, valid=False))
def test_step_matches_its_formula(backend, case: StepCase):
    """y = Cᵀ(exp(dt A) S + dt B x) + D x, for one token, written out head by head."""

    def formula(state, x, dt, A, B, C, D, valid):
        states = []
        for h in range(case.heads):
            write = dt[:, h, None, None] * B[:, h // case.ratio, :, None] * x[:, h // case.ratio, None, :]
            states.append((dt[:, h] * A[h]).exp()[:, None, None] * state[:, h] + write)
        read = [(C[:, h, :, None] * s).sum(1) + D[h] * x[:, h // case.ratio] for h, s in enumerate(states)]
        return torch.stack(read, dim=1), torch.stack(states, dim=1)

    truth = fed(formula, case.changed(**in_float64(case.inputs())))
    in_own_dtypes = run(operator_checks.reference, case)
    assert_matches(run(backend, case), truth, in_own_dtypes, case)


@step(cases=step_cases(batch=3, skip=True))
def test_step_of_a_finished_row_keeps_its_state(backend, case: StepCase):
    """Rows with `valid` False keep their state bit by bit and give 0, the skip included."""
    found = run(backend, case.changed(valid=torch.tensor([True, False, True])))
    assert_exact(found["state"][1], case.inputs()["state"][1], case, "state of the finished row")
    assert_zero(found["y"][1], case, "y of the finished row")


@step(cases=step_cases(batch=3, skip=True))
def test_a_finished_row_may_hold_anything_and_gets_no_gradient(backend, case: StepCase):
    """Not even NaN gets from it into values, states or gradients; its own state gets the state's."""
    finished = case.changed(valid=torch.tensor([True, False, True]))
    given, spoilt = case.inputs(), {}
    for name in ("x", "dt", "B", "C"):
        spoilt[name] = given[name].clone()
        spoilt[name][1] = float("nan")
    clean = run(backend, finished, gradients=True)
    assert_same(run(backend, finished.changed(**spoilt), gradients=True), clean, case)
    for name in ("x", "dt", "B", "C"):
        assert_zero(clean[f"grad {name}"][1], case, f"grad {name} of the finished row")


@step(cases=step_cases(("float16", "mixed")))
def test_numbers_at_the_edge_of_half_precision_match_the_reference(backend, case: StepCase):
    """x of 2,000 and steps of 100: their product overflows float16, the result does not."""
    given, small = case.inputs(), 2.0**-13
    edge = case.changed(
        x=quarters(given["x"], case.seed) * 1000,
        dt=torch.full_like(given["dt"], 100),
        B=given["B"] * small,
        C=given["C"] * small,
    )
    operator_checks.check_matches_the_reference(backend, edge, gradients=False)
    operator_checks.check_matches_the_reference(backend, edge, of=("y",))  # the state's gradient overflows


@step(cases=step_cases(rounding.HALVES, valid=False), share=0.5)
def test_decays_are_formed_in_float32(backend, case: StepCase):
    """Neither dt, nor A, nor their product is rounded to the dtype of x."""
    rounding.check_decays(backend, case)


@step(cases=step_cases(rounding.HALVES), share=0.3)
def test_a_state_is_handed_on_in_float32(backend, case: StepCase):
    """Neither it nor its gradient is rounded to the dtype of x."""
    rounding.check_state_is_kept(backend, case)


@step(cases=step_cases(rounding.HALVES), share=0.5)
def test_the_skip_is_added_in_float32(backend, case: StepCase):
    """D x is no more rounded than what it is added to, nor is D."""
    rounding.check_skip(backend, case)


@step("bidirectional_scan", cases=bidirectional_cases(DTYPES, layout=Layout(((Text(7),), (Text(7),)))))
def test_steps_equal_the_prefill_of_text(backend, case: BidirectionalCase):
    """Decoding token by token gives what prefilling the same text gives, the skip included."""
    given, whole, outputs = case.inputs(), run(backend, case), []
    state = given["initial_state"]
    state = torch.zeros_like(whole["final_state"]) if state is None else state
    for t in range(7):
        x, dt, B, C = (given[name][:, t] for name in TOKENS)
        y, state = backend.scan_step(state, x, dt, given["A"], B, C, D=given["D"])
        outputs.append(y)
    assert_same({"y": torch.stack(outputs, dim=1), "final_state": state}, whole, case, factor=2)


@step(cases=step_cases(), share=0.5)
def test_strong_decay_and_tiny_steps_match_the_reference(backend, case: StepCase):
    """Neither is a decay kept from 0, nor a step from almost 0, nor either from being large."""
    given = case.inputs()
    strong = case.changed(A=torch.full_like(given["A"], -30000.0))
    tiny = case.changed(dt=1e-5 * given["dt"], state=torch.zeros_like(given["state"]))
    none = case.changed(dt=torch.zeros_like(given["dt"]), D=torch.zeros_like(given["A"]))
    for changed in (strong, tiny, none, case.changed(dt=1e4 * given["dt"])):
        operator_checks.check_matches_the_reference(backend, changed)


@pytest.mark.needs("scan_step")
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
def test_dozens_of_small_writes_all_count(backend, dtype):
    """A state that a step rounds to half precision, where it is 4,096, stops growing: by 40 times ½."""
    one, step, decay = torch.ones(1, 1, 1, dtype=dtype), torch.full((1, 1), 0.5), torch.tensor([-1e-12])
    state = torch.full((1, 1, 1, 1), 4096.0)
    for _ in range(40):
        y, state = backend.scan_step(state, one, step.to(dtype), decay, one, one)
    assert state.item() == pytest.approx(4096 + 20, abs=1e-2)
    assert y.item() == pytest.approx(4096 + 20, rel=0.005)
