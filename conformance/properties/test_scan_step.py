"""`scan_step`: one token of decoding, which must continue what prefill began."""

from __future__ import annotations

from functools import partial

import torch

from linmu import reference

from ..harness.compare import (
    assert_exact,
    assert_matches,
    assert_same,
    assert_zero,
    evaluate,
    in_float64,
    quarters,
)
from ..harness.layouts import Layout, Text
from ..harness.operator_cases import (
    DTYPES,
    BidirectionalCase,
    ScanCase,
    bidirectional_cases,
    holds,
    scan_cases,
)

PER_TOKEN = ("x", "dt", "B", "C")
step = partial(holds, "scan_step")


@step("selective_scan", case=scan_cases(DTYPES, reverse=False, initial_state=True))
def test_steps_equal_the_scan(backend, case: ScanCase):
    """P10: token by token, rows that take no part keep their state and give zero."""
    inputs = case.inputs()
    if inputs["mask"] is None:
        inputs["mask"] = torch.ones(case.batch, case.length, dtype=torch.bool)
    state, outputs = inputs["initial_state"], []
    for t in range(case.length):
        x, dt, B, C = (inputs[name][:, t] for name in PER_TOKEN)
        y, state = backend.scan_step(state.clone(), x, dt, inputs["A"], B, C, valid=inputs["mask"][:, t])
        outputs.append(y)
    stepped = {"output 0": torch.stack(outputs, dim=1), "output 1": state}
    assert_same(stepped, evaluate(backend.selective_scan, inputs), case, factor=2)


@step(case=scan_cases(DTYPES, length=1, initial_state=True))
def test_step_matches_its_formula(backend, case: ScanCase):
    """y = Cᵀ(exp(dt A) S + dt B x) + D x, for one token, written out head by head."""
    inputs = case.inputs()
    x, dt, B, C = (inputs[name][:, 0] for name in PER_TOKEN)
    skip = quarters(inputs["A"], case.seed)
    given = {"state": inputs["initial_state"], "x": x, "dt": dt, "A": inputs["A"], "B": B, "C": C, "D": skip}

    def formula(state, x, dt, A, B, C, D):
        ratio, states = C.shape[1] // x.shape[1], []
        for h in range(C.shape[1]):
            write = dt[:, h, None, None] * B[:, h // ratio, :, None] * x[:, h // ratio, None, :]
            states.append((dt[:, h] * A[h]).exp()[:, None, None] * state[:, h] + write)
        read = [(C[:, h, :, None] * s).sum(1) + D[h] * x[:, h // ratio] for h, s in enumerate(states)]
        return torch.stack(read, dim=1), torch.stack(states, dim=1)

    got = evaluate(lambda state, **rest: backend.scan_step(state.clone(), **rest), given)
    assert_matches(got, evaluate(formula, in_float64(given)), evaluate(reference.scan_step, given), case)


@step(case=scan_cases(length=1, initial_state=True, batch=3))
def test_step_of_a_finished_row_keeps_its_state(backend, case: ScanCase):
    """Rows with `valid` False keep their state bit by bit and give 0, the skip included."""
    inputs = case.inputs()
    x, dt, B, C = (inputs[name][:, 0] for name in PER_TOKEN)
    valid = torch.tensor([True, False, True])
    before = inputs["initial_state"]
    y, state = backend.scan_step(
        before.clone(), x, dt, inputs["A"], B, C, D=torch.ones_like(inputs["A"]), valid=valid
    )
    assert_exact(state[1], before[1], case, "state of the finished row")
    assert_zero(y[1], case, "output of the finished row")


@step("bidirectional_scan", case=bidirectional_cases(DTYPES, layout=Layout(((Text(7),), (Text(7),)))))
def test_steps_equal_the_prefill_of_text(backend, case: BidirectionalCase):
    """P10: decoding token by token gives what prefilling the same text gives, the skip included."""
    inputs = case.inputs()
    whole = evaluate(backend.bidirectional_scan, inputs)
    state = inputs["initial_state"]
    state = torch.zeros_like(whole["output 1"]) if state is None else state
    outputs = []
    for t in range(7):
        x, dt, B, C = (inputs[name][:, t] for name in PER_TOKEN)
        y, state = backend.scan_step(state.clone(), x, dt, inputs["A"], B, C, D=inputs["D"])
        outputs.append(y)
    assert_same({"output 0": torch.stack(outputs, dim=1), "output 1": state}, whole, case, factor=2)
