"""Modules under `torch.autocast`, which rounds their projections as it does any `nn.Linear`, and no more."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from linmu import reference

from .compare import assert_matches
from .module_cases import (
    ModuleCase,
    RoundedCase,
    branches_of,
    initial,
    random_module,
    run_with_gradients,
    sizes,
)


@contextmanager
def autocast() -> Iterator[None]:
    """bfloat16 on every device there is."""
    gpu = torch.cuda.is_available()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mismatch dtype")  # of q/k norms, which torch does not fuse then
        with torch.autocast("cpu", torch.bfloat16), torch.autocast("cuda", torch.bfloat16, enabled=gpu):
            yield


WITH_AND_WITHOUT_AUTOCAST = (nullcontext, autocast)


def with_autocast(module: nn.Module) -> nn.Module:
    """The module, whose forward pass runs under autocast, and not its backward pass, as torch wants it."""
    forward = module.forward

    def call(*given: Any, **named: Any) -> Any:
        with autocast():
            return forward(*given, **named)

    module.forward = call
    return module


class ExactCase(ModuleCase):
    """A case whose hidden states are eighths of at most 2, and whose angles are 0: bfloat16 holds them, and
    what `exact_projections` make of them."""

    @property
    def case(self) -> ModuleCase:
        """The one that was drawn."""
        return ModuleCase(**vars(self))

    def hidden_states(self, draw: int = 0) -> Tensor:
        return (8 * super().hidden_states(draw).double()).round().div(8).clamp(-2, 2).to(self.torch_dtype)

    def position_embeddings(self) -> tuple[Tensor, Tensor]:
        cos, sin = super().position_embeddings()
        return torch.ones_like(cos), torch.zeros_like(sin)


def exact_projections(module: nn.Module) -> None:
    """q, k and v take one channel, or its negative, twice in q; k is shifted by 24, which changes all scores
    of a token by a number that softmax takes off again, but not what bfloat16 takes off them first."""
    with torch.no_grad():
        for branch in branches_of(module):
            for name, factor, bias in (("q_proj", 2, 0), ("k_proj", 1, 24), ("v_proj", 1, 0)):
                projection = getattr(branch, name)
                rows, columns = projection.weight.shape
                own = torch.arange(columns) == torch.arange(rows)[:, None] % columns
                projection.weight.copy_(factor * own * projection.weight.sign())
                projection.bias.fill_(bias)
            branch.o_proj.weight.sign_()


def check_autocast(backend: Any, name: str, case: ModuleCase) -> None:
    """Values, states and gradients are those without autocast, up to what the reference loses to it: of any
    numbers, and of numbers that projections do not round."""
    compare_under_autocast(random_module(backend, name, case), name, case)
    module, exact = random_module(backend, name, case), ExactCase(**vars(case))
    exact_projections(module)
    compare_under_autocast(module, name, exact)


def compare_under_autocast(module: nn.Module, name: str, case: ModuleCase) -> None:
    """The module under autocast, the reference with its parameters under autocast, and that in float64."""
    parameters = module.state_dict()
    own, wide = (initial(reference, name, case) for _ in range(2))
    for each in (own, wide):
        each.load_state_dict(parameters)
    truth = run_with_gradients(wide.double(), name, RoundedCase(case))
    rounded = run_with_gradients(with_autocast(own), name, case)
    found = run_with_gradients(with_autocast(module), name, case)
    assert_matches(found, truth, rounded, case, partial(sizes, reference, name, case, parameters))
