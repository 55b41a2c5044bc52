"""Properties that Flex-MA and M-MATE share; each takes a module with random parameters and a case."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from linmu import reference
from linmu.reference import VisionLayout

from .compare import assert_exact, assert_matches, assert_negligible, assert_same, assert_zero, quarters
from .layouts import Layout, Pad, Text, Vision
from .module_cases import (
    ModuleCase,
    check_module,
    large_cases,
    named,
    random_module,
    run,
    sizes,
    truth_and_reference,
    with_gradients,
)
from .operator_cases import Numbers

STATES = ("conv state", "scan state")
ONE_CELL = Layout(((Text(3), Vision(0, (1, 1, 1)), Text(2)), (Text(3), Vision(4, (1, 1, 1)), Text(2))))
WITHOUT_A_GAP = Layout(((Text(3), Vision(0, (1, 2, 4)), Text(2)), (Text(13),)))
LONG_GAP, GAP_OF_A_LOOP = 2200, 50  # tokens
A_WORD = Layout(((Text(1),),))
TWO_ROWS = Layout(((Vision(0, (2, 2, 2)), Text(2)), (Text(1), Vision(0, (1, 3, 3)))))


def arguments_of(case: ModuleCase, part: slice) -> dict:
    """Layout, mask and angles of a part of the sequence."""
    angles = tuple(angle[:, part] for angle in case.position_embeddings())
    layout = VisionLayout(case.layout.coords[:, part].contiguous())
    return {"layout": layout, "valid": case.layout.valid[:, part], "position_embeddings": angles}


def check_causality(module: nn.Module, name: str, case: ModuleCase) -> None:
    """The gradient from every token to every token it must not see is zero, to padding exactly."""
    u = case.hidden_states().requires_grad_()
    output = run(module, name, case, u)["output"]
    sees = case.layout.sees()
    for t in range(u.shape[1]):
        kept = case.layout.valid[:, t, None]
        (found,) = torch.autograd.grad((output[:, t] * kept).sum(), u, retain_graph=True)
        what = f"gradient from token {t} to what it must not see"
        assert_negligible(found[~sees[:, t]], found, case, what)
        assert_zero(found[~case.layout.valid], case, f"gradient from token {t} to padding")


def check_padding_changes_nothing(module: nn.Module, name: str, case: ModuleCase) -> None:
    """Padding on both sides of every row, of random content, leaves outputs and state as they were."""
    wanted, u = run(module, name, case), case.hidden_states()
    left, right = 3, 2
    wider = case.layout.padded(left, right)
    around = (case.hidden_states(draw=1)[:, :1].expand(-1, n, -1) for n in (left, right))
    before, after = around
    cos, sin = (pad_tokens(angle, left, right) for angle in case.position_embeddings())
    arguments = {
        "layout": VisionLayout(wider.coords),
        "valid": wider.valid,
        "position_embeddings": (cos, sin),
    }
    found = run(module, name, case, torch.cat([before, u, after], dim=1), **arguments)
    found["output"] = found["output"][:, left : left + u.shape[1]]
    assert_same(only_valid(found, case.layout), only_valid(wanted, case.layout), case)
    others = case.hidden_states(draw=1)
    edited = torch.where(case.layout.valid[..., None], u, others)
    assert_same(
        only_valid(run(module, name, case, edited), case.layout), only_valid(wanted, case.layout), case
    )


def check_batch_mates_change_nothing(module: nn.Module, name: str, case: ModuleCase) -> None:
    """Each row by itself."""
    together, u = run(module, name, case), case.hidden_states()
    for row in range(u.shape[0]):
        one = slice(row, row + 1)
        angles = tuple(angle[one] for angle in case.position_embeddings())
        alone = {"layout": VisionLayout(case.layout.only(row).coords), "position_embeddings": angles}
        alone |= {"valid": case.layout.valid[one]}
        found = run(module, name, case, u[one], **alone)
        wanted = {key: result[one] for key, result in together.items()}
        assert_same(only_valid(found, case.layout.only(row)), only_valid(wanted, case.layout.only(row)), case)


def check_splitting_changes_nothing(module: nn.Module, name: str, case: ModuleCase) -> None:
    """Two pieces, cut where no span is cut, the state handed over; and the gradient that it hands back."""
    u, valid = case.hidden_states().requires_grad_(), case.layout.valid[..., None]
    whole = run(module, name, case, u)
    for cut in case.layout.cuts()[::3]:
        first, state = module(u[:, :cut], **arguments_of(case, slice(0, cut)))
        second, state = module(u[:, cut:], **arguments_of(case, slice(cut, None)), state=state)
        found = named(torch.cat([first, second], dim=1), state)
        assert_same(only_valid(found, case.layout), only_valid(whole, case.layout), case)
    if case.layout.cuts():
        grads = []
        for output in (whole["output"], found["output"]):
            asked = (output * valid)[:, cut:]
            (grad,) = torch.autograd.grad(asked, u, quarters(asked, case.seed))
            grads.append({"grad hidden_states": grad})
        of_sums = partial(sizes, reference, name, case, module.state_dict())
        assert_same(grads[1], grads[0], case, 10, of_sums, "the same backend in one piece")


def check_one_vision_token_behind_a_state(backend: Any, name: str, case: ModuleCase) -> None:
    """Text, an image of one token, text: a piece of one token with a layout is no step of text."""
    module, u = random_module(backend, name, case), case.hidden_states()
    whole, state, outputs = run(module, name, case), None, []
    for span in (slice(0, 3), slice(3, 4), slice(4, None)):
        output, state = module(u[:, span], **arguments_of(case, span), state=state)
        outputs.append(output)
    assert_same(named(torch.cat(outputs, dim=1), state), whole, case)


def check_angles_of_one_row(backend: Any, name: str, case: ModuleCase) -> None:
    """Of batch 1 they are those of every row, whatever the order of its tokens."""
    module = random_module(backend, name, case)
    one = tuple(angle[:1] for angle in case.position_embeddings())
    for_all = tuple(angle.expand(case.layout.shape[0], -1, -1) for angle in one)
    narrow = run(module, name, case, position_embeddings=one)
    assert_same(narrow, run(module, name, case, position_embeddings=for_all), case)


def check_steps_equal_prefill(module: nn.Module, name: str, case: ModuleCase) -> None:
    """Prefill of three tokens, then one by one without a layout; the last row ends on the way. The gradient
    goes back through the states that steps hand on.
    """
    u, (cos, sin) = case.hidden_states().requires_grad_(), case.position_embeddings()
    length = u.shape[1]
    valid = torch.ones(u.shape[:2], dtype=torch.bool)
    valid[-1, 6:] = False
    whole = run(module, name, case, u, valid=valid)
    first, state = module(u[:, :3], position_embeddings=(cos[:, :3], sin[:, :3]))
    outputs, shapes = [first], {shapes_of(state)}
    for t in range(3, length):
        now = slice(t, t + 1)
        angles = (cos[:, now], sin[:, now])
        output, state = module(u[:, now], valid=valid[:, now], position_embeddings=angles, state=state)
        outputs.append(output)
        shapes.add(shapes_of(state))
    assert len(shapes) == 1, f"the state must not grow, got shapes {shapes}: {case!r}"
    found = named(torch.cat(outputs, dim=1), state)
    kept, grads = valid[..., None], []
    for results in (found, whole):
        results["output"] = results["output"] * kept
        asked = results["output"][:, 3:]
        (grad,) = torch.autograd.grad(asked, u, quarters(asked, case.seed), retain_graph=True)
        grads.append({"grad hidden_states": grad})
    assert_same(found, whole, case, factor=2)
    of_sums = partial(sizes, reference, name, case, module.state_dict())
    assert_same(grads[0], grads[1], case, 10, of_sums, "the same backend in one piece")


def large_cases_of(name: str) -> Callable:
    """One test for each case of a size that people run: outputs, states and every gradient."""

    def check(backend: Any, case: ModuleCase) -> None:
        check_module(random_module(backend, name, case), reference, name, case)

    cases = [pytest.param(case, id=key) for key, case in large_cases(name).items()]
    return pytest.mark.needs(name)(pytest.mark.parametrize("case", cases)(check))


def check_step_behind_a_full_window(backend: Any, name: str, case: ModuleCase) -> None:
    """One token behind a window of which nothing is missing: with gradients, and without."""
    module, before = random_module(backend, name, case), case.config.text_window - 1
    numbers, size = Numbers(case.seed + 13), (len(case.layout.rows), before, case.config.groups)
    k, v = (numbers.normal(*size, case.config.head_dim, dtype=case.torch_dtype) for _ in range(2))
    state = reference.WindowState(k, v, torch.ones(size[:2], dtype=torch.bool))
    if name == "MMATE":
        _, of_flex = module.flex_ma(
            case.hidden_states(draw=1), position_embeddings=case.position_embeddings()
        )
        state = reference.MMATEState(*(part.detach() for part in of_flex), state)
    given = {"layout": None, "state": state}
    check_module(module, reference, name, case, **given)
    wanted = run(module, name, case, **given)
    with torch.no_grad():
        assert_same(run(module, name, case, **given), wanted, case)


def around_a_gap(tokens: int) -> Layout:
    """`WITHOUT_A_GAP`, with so much padding in the picture of one row and in the text of the other."""
    picture = Vision(0, (1, 2, 4), "row", Pad(tokens))
    return Layout(((Text(3), picture, Text(2)), (Text(6), Pad(tokens), Text(7))))


def check_a_gap_is_as_if_absent(backend: Any, name: str, case: ModuleCase) -> None:
    """Padding of thousands of tokens, of fewer where the reference is on trial, which is a loop."""
    module = random_module(backend, name, case)
    wide = around_a_gap(LONG_GAP if type(module) is not getattr(reference, name) else GAP_OF_A_LOOP)
    cut = wide.valid.nonzero()[:, 1].view(case.layout.shape)
    numbers = Numbers(case.seed + 17)

    def spread(tensor: Tensor) -> Tensor:
        noise = numbers.normal(*wide.shape, tensor.shape[2], dtype=tensor.dtype)
        return noise.scatter(1, cut[..., None].expand_as(tensor), tensor)

    def run_wide(u: Tensor) -> dict[str, Tensor]:
        angles = tuple(spread(angle) for angle in case.position_embeddings())
        given = {"layout": VisionLayout(wide.coords), "valid": wide.valid, "position_embeddings": angles}
        output, state = module(spread(u), **given)
        return named(output.gather(1, cut[..., None].expand_as(u)), state)

    parameters = module.state_dict()
    truth, in_own_dtypes = truth_and_reference(reference, name, case, parameters)
    of_sums = partial(sizes, reference, name, case, parameters)
    assert_matches(with_gradients(module, case, run_wide), truth, in_own_dtypes, case, of_sums)


def check_the_state_is_left(module: nn.Module, name: str, case: ModuleCase) -> None:
    """A state that is handed over may be handed over again: nothing is written to it."""
    u, (cos, sin) = case.hidden_states(), case.position_embeddings()
    _, state = module(u[:, :-1], position_embeddings=(cos[:, :-1], sin[:, :-1]))
    copies = [part.detach().clone() for part in tensors_of(state)]
    for mode in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with mode:
            module(u[:, -1:], position_embeddings=(cos[:, -1:], sin[:, -1:]), state=state)
    for part, copy in zip(tensors_of(state), copies, strict=True):
        assert_exact(part.detach(), copy, case, f"{name}'s state after the call")


def tensors_of(state: Any) -> list:
    """All tensors of a state."""
    return [tensor for name, tensor in named(torch.empty(0), state).items() if name != "output"]


def shapes_of(state: Any) -> tuple:
    """Of every tensor of a state."""
    return tuple(tensor.shape for tensor in tensors_of(state))


def only_valid(results: dict, layout: Layout) -> dict:
    """Outputs on padding are nobody's: left out of comparisons."""
    return {**results, "output": results["output"] * layout.valid[..., None]}


def pad_tokens(tensor: Tensor, left: int, right: int) -> Tensor:
    """Zeros before and after the token axis of (B, L, ·)."""
    return torch.nn.functional.pad(tensor, (0, 0, left, right))
