"""Modules remember nothing: between two calls parameters may change, and so may all that a call is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import cycle, product
from typing import Any

import torch
from torch import Tensor, nn

from linmu.reference import VisionLayout

from .compare import Results, assert_exact, assert_same
from .layouts import Layout, Pad, Text, Vision
from .module_cases import ModuleCase, named, random_module, run_with_gradients
from .module_checks import tensors_of

REMEMBERED = Layout(
    ((Text(1), Vision(0, (2, 2, 3)), Text(1)), (Text(3), Vision(0, (1, 2, 4)), Text(1), Vision(1, (1, 1, 2))))
)
OF_THE_SAME_SHAPE = Layout(
    ((Vision(0, (1, 3, 3)), Text(2), Vision(1, (1, 1, 3))), (Pad(4), Text(1), Vision(0, (3, 1, 3))))
)
WAYS = tuple(product((False, True), (torch.no_grad, torch.inference_mode, torch.enable_grad)))
NEW = "a new module on new tensors"


def loaded(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """As a checkpoint is."""
    module.load_state_dict(values)


def written_over(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """As an optimiser does."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(values[name])


def written_over_uncounted(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """The same, and torch does not count it."""
    for name, parameter in module.named_parameters():
        parameter.data.copy_(values[name])


def given_other_memory(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """As some sharded trainers do."""
    for name, parameter in module.named_parameters():
        parameter.data = values[name].clone()


def replaced(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """As whoever ties or adapts weights does."""
    for name in dict(module.named_parameters()):
        parent, _, own = name.rpartition(".")
        setattr(module.get_submodule(parent), own, nn.Parameter(values[name].clone()))


CHANGES = (loaded, written_over, written_over_uncounted, given_other_memory, replaced)


def check_nothing_is_remembered(backend: Any, name: str, case: ModuleCase) -> None:
    """Neither parameters nor arguments; and what a call gave stays as it was."""
    check_parameters_are_not_remembered(backend, name, case)
    check_arguments_are_not_remembered(backend, name, case)


def check_parameters_are_not_remembered(backend: Any, name: str, case: ModuleCase) -> None:
    """In training and evaluation, with gradients and without."""
    modules = [random_module(backend, name, replace(case, seed=case.seed + draw)) for draw in (0, 1)]
    values = [module.state_dict() for module in modules]
    wanted = [prompt_and_step(module, arguments_of(case)) for module in modules]
    of_gradients = [run_with_gradients(module, name, case) for module in modules]
    for training, mode in WAYS:
        module = random_module(backend, name, case).train(training)
        turn = cycle((1, 0))
        before, copies = kept(module, case, mode)
        for change in CHANGES:
            now = next(turn)
            change(module, values[now])
            told = f"{NEW}, after parameters were {change.__name__}, {described(training, mode)}"
            found, copies_of_these = kept(module, case, mode)
            assert_same(found, wanted[now], case, source=told)
            if mode is torch.enable_grad:
                grads = run_with_gradients(module, name, case)
                assert_same(grads, of_gradients[now], case, source=told)
            for key, tensor in before.items():
                assert_exact(
                    tensor, copies[key], case, f"{key} after another call, {described(training, mode)}"
                )
            before, copies = found, copies_of_these


def described(training: bool, mode: Any) -> str:
    """The way of a call."""
    return f"in {'train' if training else 'eval'}() and {mode.__name__}()"


def kept(module: nn.Module, case: ModuleCase, mode: Any) -> tuple[Results, Results]:
    """What a prompt and a step give, and copies of it."""
    with mode():
        found = prompt_and_step(module, arguments_of(case))
        return found, {key: tensor.clone() for key, tensor in found.items()}


def check_arguments_are_not_remembered(backend: Any, name: str, case: ModuleCase) -> None:
    """Other tokens, angles, masks and layouts of one shape, and other states, in the same memory: prompts one
    after the other, and each with a step behind it."""
    cases = (case, replace(case, seed=case.seed + 1, layout=OF_THE_SAME_SHAPE), case)
    wanted = [prompt_and_step(random_module(backend, name, case), arguments_of(each)) for each in cases]
    module = random_module(backend, name, case)
    for training, mode in WAYS:
        module.train(training)
        with mode():
            memory, state = [tensor.clone() for tensor in arguments_of(case)], []
            for call, (each, expected) in product((prompt, prompt_and_step), zip(cases, wanted, strict=True)):
                for own, tensor in zip(memory, arguments_of(each), strict=True):
                    own.data.copy_(tensor)  # torch does not count it
                found = call(module, memory, state)
                source = f"{NEW}, {described(training, mode)}"
                assert_same(found, {key: expected[key] for key in found}, case, source=source)


def arguments_of(case: ModuleCase) -> list[Tensor]:
    """Hidden states, cos, sin, coordinates and mask."""
    return [case.hidden_states(), *case.position_embeddings(), case.layout.coords, case.layout.valid]


def prompt(module: nn.Module, given: list[Tensor], memory: list[Any] | None = None) -> Results:
    """What the module gives for a prompt; `memory` gets the state if it has none, or has it written over."""
    u, cos, sin, coords, valid = given
    output, state = module(u, layout=VisionLayout(coords), valid=valid, position_embeddings=(cos, sin))
    if memory:
        for own, tensor in zip(tensors_of(memory[0]), tensors_of(state), strict=True):
            own.data.copy_(tensor)
    elif memory is not None:
        memory.append(copied(state))
    return {key: tensor.detach() for key, tensor in named(output, state).items()}


def prompt_and_step(module: nn.Module, given: list[Tensor], memory: list[Any] | None = None) -> Results:
    """The same, and what it gives for one more token behind the state in `memory`."""
    memory = [] if memory is None else memory
    results, (u, cos, sin, *_) = prompt(module, given, memory), given
    output, state = module(u[:, :1], position_embeddings=(cos[:, :1], sin[:, :1]), state=memory[0])
    return results | {f"{key} of a step": tensor.detach() for key, tensor in named(output, state).items()}


def copied(state: Any) -> Any:
    """The same state in memory of its own."""
    if isinstance(state, Tensor):
        return state.detach().clone()
    return state if state is None else type(state)(*(copied(part) for part in state))
