"""A registered operator is bypassed only where nothing observes a call, with the same tensors either way."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from linmu import optimized
from linmu.optimized.engine import operator as operator_module
from linmu.optimized.engine.torch_state import allow_shortcuts, has_no_hooks, is_observed, is_plain
from linmu.reference.flex_ma import DonatedState

from ...harness.compare import assert_same
from .gpu_cases import OPERATORS, arguments, block


class SeesOperators(TorchDispatchMode):
    """Notes which operators are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.name())
        return func(*args, **(kwargs or {}))


class SeesFunctions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


@pytest.fixture
def long_way(monkeypatch):
    """Sends every call through the dispatcher when it is called."""
    return lambda: monkeypatch.setattr(operator_module, "is_observed", lambda: True)


@pytest.fixture
def without_shortcuts():
    allow_shortcuts(False)
    yield
    allow_shortcuts(True)


@pytest.mark.parametrize("operator", OPERATORS)
def test_operators_give_the_same_tensors_either_way(operator, long_way):
    given = arguments(operator, "float32", heads=4, groups=2, head_dim=6, length=233, device="cpu")
    run = getattr(optimized, operator)
    short = run(**given)
    long_way()
    for found, wanted in zip(as_tuple(short), as_tuple(run(**given)), strict=True):
        assert torch.equal(found, wanted)


def as_tuple(output) -> tuple[torch.Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


@torch.no_grad()
def test_a_block_gives_the_same_tensors_either_way(long_way):
    run, u = block(torch.float32, "cpu"), torch.randn(2, 300, 256)
    short = run(u)
    long_way()
    assert torch.equal(short, run(u))


def test_gradients_are_the_same_whichever_way_the_backward_pass_takes(long_way):
    """Inside autograd's own backward pass nothing observes a call."""
    given = arguments("bidirectional_scan", "float32", heads=4, groups=2, head_dim=6, length=50, device="cpu")
    floats = {name: given[name].detach().requires_grad_() for name in ("x", "dt", "A", "B", "C", "gate", "D")}

    def gradients():
        y, state = optimized.bidirectional_scan(**given | floats)
        return dict(
            zip(floats, torch.autograd.grad(y.sin().sum() + state.sum(), [*floats.values()]), strict=True)
        )

    short = gradients()
    long_way()
    assert_same(short, gradients(), "backward")


MODES = {
    "a dispatch mode": SeesOperators,
    "a function mode": SeesFunctions,
    "a default device": lambda: torch.device("cpu"),
    "forward-mode autograd": forward_ad.dual_level,
}


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_around_a_call_is_noticed(mode):
    assert not is_observed()
    with MODES[mode]():
        assert is_observed()
    assert not is_observed()


def traced(function, x):
    return torch.jit.trace(function, x, check_trace=False)


def compiled(function, x):
    torch.compile(function, backend="eager")(x)


TRANSFORMS = {
    "vmap": lambda function, x: torch.vmap(function)(x),
    "grad": lambda function, x: torch.func.grad(lambda x: function(x).sum())(x),
    "jvp": lambda function, x: torch.func.jvp(function, (x,), (x,)),
    "a tracer": traced,
    "a compiler": compiled,
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_transform_of_a_function_is_noticed(transform):
    """By what the function does, as a tracer and a compiler run it once."""
    seen = []

    def function(x):
        seen.append(is_observed())
        return x + 1

    TRANSFORMS[transform](function, torch.zeros(2))
    assert seen and all(seen)
    assert not is_observed()


def test_the_switch_turns_shortcuts_off(without_shortcuts):
    """Every operator goes through the dispatcher, every module is called."""
    assert is_observed() and not has_no_hooks(torch.nn.Linear(2, 2))
    run, u = block(torch.float32, "cpu"), torch.randn(2, 300, 256)
    with torch.no_grad():
        found = run(u)
        allow_shortcuts(True)
        assert_same({"y": found}, {"y": run(u)}, "without shortcuts")


def test_the_switch_asks_nothing_private(without_shortcuts, monkeypatch):
    """A release of torch may have renamed it all."""
    monkeypatch.delattr(torch._C, "_len_torch_dispatch_stack")
    monkeypatch.delattr(torch._C._functorch, "peek_interpreter_stack")
    monkeypatch.delattr(forward_ad, "_current_level")
    assert is_observed()


HOOKS = {
    "forward": lambda module: module.register_forward_hook(print),
    "before forward": lambda module: module.register_forward_pre_hook(print),
    "backward": lambda module: module.register_full_backward_hook(print),
    "before backward": lambda module: module.register_full_backward_pre_hook(print),
    "put over forward": lambda module: setattr(module, "forward", print),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_of_a_module_is_noticed(hook):
    linear = torch.nn.Linear(2, 2)
    HOOKS[hook](linear)
    assert not has_no_hooks(linear)


def test_whatever_is_more_than_memory_is_noticed():
    x = torch.zeros(2)
    weight = torch.nn.Parameter(x)
    more = [x.as_subclass(Subclass), x.to("meta"), torch.zeros(2, dtype=torch.cfloat).conj().imag, object()]
    assert not any(is_plain(each) for each in (*more, weight, [x, weight], [more[0]]))
    with torch.no_grad():
        assert not any(map(is_plain, more))
        assert is_plain(weight) and is_plain([x, None, weight])
    assert all(map(is_plain, (x, x.detach(), None, 1, 1.0, True, [1, 2])))


@pytest.mark.parametrize("context", [nullcontext, torch.no_grad])
def test_a_mode_sees_the_operator_and_not_what_is_in_it(context):
    given = arguments("causal_conv", "float32", heads=4, groups=2, head_dim=6, length=9, device="cpu")
    with context(), SeesOperators() as mode:
        optimized.causal_conv(**given)
    assert {name for name in mode.seen if name.startswith("linmu")} == {"linmu::causal_conv"}


@torch.no_grad()
def test_autograd_is_told_of_what_an_operator_overwrites():
    """Or a graph that saved the state before would take its gradient from another token's."""
    layer = optimized.FlexMA(optimized.LinMUConfig(width=16, heads=2, groups=1, head_dim=8), 0)
    prompt, token = torch.randn(1, 3, 16), torch.randn(1, 1, 16)
    _, state = layer(prompt)
    before = state.scan._version
    layer(token, state=DonatedState(*state))
    assert state.scan._version > before
    with torch.inference_mode():
        _, state = layer(prompt)
        layer(token, state=DonatedState(*state))  # whose versions autograd does not count
