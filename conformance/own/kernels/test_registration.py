"""A registered operator is gone round only where nobody looks on, and gives the same tensors either way."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from linmu import optimized
from linmu.optimized.engine import operator as registration
from linmu.optimized.engine.operator import is_plain, is_watched
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
    return lambda: monkeypatch.setattr(registration, "is_watched", lambda: True)


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
    """Inside autograd's own backward pass nobody looks on."""
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


def test_whoever_watches_calls_is_noticed():
    assert not is_watched()
    for watcher in (SeesOperators(), SeesFunctions(), torch.device("cpu"), forward_ad.dual_level()):
        with watcher:
            assert is_watched(), watcher
    seen = []
    torch.vmap(lambda x: (seen.append(is_watched()), x)[1])(torch.zeros(2))
    torch.func.grad(lambda x: (seen.append(is_watched()), x)[1])(torch.zeros(()))
    torch.jit.trace(lambda x: (seen.append(is_watched()), x + 1)[1], torch.zeros(2), check_trace=False)
    assert seen == [True] * 3
    assert not is_watched()


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
        layer(token, state=DonatedState(*state))  # whose versions nobody counts
