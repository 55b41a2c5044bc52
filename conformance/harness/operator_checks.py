"""Properties that hold however an operator is called: strides, autocast, in-place writes, which gradients.

Each takes a backend and a case of any operator; the files of the operators turn them into tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from linmu import reference

from .cancellation import sizes_of_sums
from .compare import assert_exact, assert_matches, assert_same, evaluate, in_float64, is_float, quarters


def operator_of(backend: Any, case: Any) -> Callable:
    """The operator that the case is for, called with tensors alone; its outputs always as a tuple of them."""
    operator = getattr(backend, case.operator)
    operator = case.flat(operator) if hasattr(case, "flat") else operator

    def call(**given: Any) -> tuple[Tensor, ...]:
        outputs = operator(**given)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    return call


def check_matches_the_reference(backend: Any, case: Any, gradients: bool = True) -> None:
    """Values, states and, if asked, the gradient of every input, within the bounds of `assert_matches`."""
    inputs, sound = case.inputs(), operator_of(reference, case)
    truth = evaluate(sound, in_float64(inputs), gradients)
    own = evaluate(sound, inputs, gradients)
    sizes = partial(sizes_of_gradients, case, inputs) if gradients else None
    assert_matches(evaluate(operator_of(backend, case), inputs, gradients), truth, own, case, sizes)


def sizes_of_gradients(case: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """`sizes_of_sums` of the reference's operator."""
    wide, sound = in_float64(inputs), operator_of(reference, case)
    return sizes_of_sums(lambda draw: evaluate(sound, wide, gradients=True, draw=draw))


def check_strides_do_not_matter(backend: Any, case: Any) -> None:
    """P8: inputs with their last axis first in memory, in a larger buffer; the expanded gradient of a sum."""
    operator, inputs = operator_of(backend, case), case.inputs()

    def total(**given: Any) -> Tensor:
        return sum(
            output.to(torch.promote_types(output.dtype, torch.float32)).sum() for output in operator(**given)
        )

    def found(given: dict[str, Any]) -> dict[str, Tensor]:
        leaves = {name: value.detach().requires_grad_() for name, value in given.items() if is_float(value)}
        result = total(**{**given, **leaves})
        if not result.requires_grad:  # nothing depends on the inputs: no token takes part
            return {}
        gradients = torch.autograd.grad(result, list(leaves.values()))
        return dict(zip(leaves, gradients, strict=True))

    strided = {name: with_odd_strides(value) if is_float(value) else value for name, value in inputs.items()}
    assert_same(found(strided), found(inputs), case)
    values = evaluate(operator, strided), evaluate(operator, inputs)
    assert_same(*values, case)


def with_odd_strides(tensor: Tensor) -> Tensor:
    """The same values, last axis first in memory, every second element of a larger buffer."""
    buffer = tensor.new_zeros(*tensor.shape[::-1], 2)
    view = buffer[..., 0].permute(*range(tensor.ndim)[::-1])
    view.copy_(tensor)
    return view


def check_inputs_are_left_as_they_were(backend: Any, case: Any) -> None:
    """Nothing is modified in place, forward or backward."""
    inputs = case.inputs()
    leaves = {name: value.requires_grad_() for name, value in inputs.items() if is_float(value)}
    copies = {name: leaf.detach().clone() for name, leaf in leaves.items()}
    total = sum(output.sum() for output in operator_of(backend, case)(**inputs))
    if total.requires_grad:
        total.backward()
    for name, leaf in leaves.items():
        assert_exact(leaf.detach(), copies[name], case, name)


def check_autocast_changes_nothing(backend: Any, case: Any) -> None:
    """P17: the operator chooses its own dtypes, whatever the training loop asks for."""
    operator, inputs = operator_of(backend, case), case.inputs()
    plain = evaluate(operator, inputs)
    gpu = torch.cuda.is_available()
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cuda", torch.bfloat16, enabled=gpu):
        cast = evaluate(operator, inputs)
    assert_same(cast, plain, case)


def check_one_gradient_alone_equals_its_share_of_all(backend: Any, case: Any) -> None:
    """P18: one input's gradient, from one output, is what asking for all of them gives."""
    operator, inputs = operator_of(backend, case), case.inputs()
    floats = [name for name, value in inputs.items() if is_float(value)]
    for index, output in enumerate(operator(**inputs)):
        together = evaluate(lambda index=index, **given: operator(**given)[index], inputs, gradients=True)
        name = floats[(case.seed + index) % len(floats)]
        one = inputs[name].clone().requires_grad_()
        result = operator(**{**inputs, name: one})[index]
        alone = torch.zeros_like(one)
        if result.requires_grad:
            (given,) = torch.autograd.grad(result, one, quarters(output, 0), allow_unused=True)
            alone = alone if given is None else given
        key = f"gradient of {name}"
        assert_same({key: alone}, {key: together[key]}, case)


def check_uninitialised_memory_is_never_read(backend: Any, case: Any) -> None:
    """P19, P23: the same results whatever `torch.empty` finds in memory: NaN, or a large number."""
    operator, inputs = operator_of(backend, case), case.inputs()
    wanted = evaluate(operator, inputs, gradients=True)
    for garbage in (float("nan"), 1e30):
        with poisoned_memory(garbage):
            found = evaluate(operator, inputs, gradients=True)
        assert_same(found, wanted, case)


@contextmanager
def poisoned_memory(garbage: float) -> Iterator[None]:
    """Fill every tensor that is born without values with `garbage`."""

    def filling(create: Callable) -> Callable:
        def create_filled(*args: Any, **kwargs: Any) -> Tensor:
            tensor = create(*args, **kwargs)
            if tensor.is_floating_point():
                with torch.no_grad():
                    tensor.fill_(garbage)
            return tensor

        return create_filled

    makers = ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (Tensor, "new_empty"))
    with ExitStack() as stack:
        for owner, name in makers:
            stack.enter_context(mock.patch.object(owner, name, filling(getattr(owner, name))))
        yield
