"""How a bug is planted: a small change around the reference, and the properties that must notice it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from hypothesis import Phase, given, settings
from torch import Tensor

from ..harness.backends import Backend


@dataclass(frozen=True)
class Bug:
    """A broken version of one name of a backend.

    Args:
        name: what is wrong, as a sentence.
        target: the name it replaces.
        change: (reference, *arguments) -> result for an operator; (reference) -> class for a module.
        caught_by: tests, each of which must fail with it.
    """

    name: str
    target: str
    change: Callable
    caught_by: tuple[Callable, ...]

    def plant(self, backend: Backend) -> Backend:
        """The backend with this bug in it."""
        reference = getattr(backend, self.target)
        broken = self.change(reference) if isinstance(reference, type) else partial(self.change, reference)
        return Backend(f"{backend.name} where {self.name}", backend.module, **{self.target: broken})


BUGS: list[Bug] = []


def planted(target: str, *caught_by: Callable) -> Callable:
    """Register a function as a bug of `target`; its name says what is wrong."""

    def register(change: Callable) -> Callable:
        BUGS.append(Bug(change.__name__, target, change, caught_by))
        return change

    return register


def run_quietly(test: Callable, backend: Backend) -> None:
    """Run a test on as many cases as the default run has, but stop at the first failure, unshrunk."""
    quiet = settings(
        max_examples=test.examples,
        derandomize=True,
        phases=(Phase.explicit, Phase.generate),
        report_multiple_bugs=False,
    )
    quiet(given(case=test.cases)(test.check))(backend)


def grow(tensor: Tensor, factor: float) -> Tensor:
    """The same values; gradients come back multiplied by `factor`."""
    return tensor.detach() + factor * (tensor - tensor.detach())


def spans_filled(segment: Tensor) -> Tensor:
    """segment with the text inside each span given the id of its segment."""
    filled = segment.clone()
    for row in filled:
        for number in set(row.tolist()) - {-1}:
            own = (row == number).nonzero().squeeze(-1)
            row[own[0] : own[-1] + 1] = number
    return filled


def per_head(tensor: Tensor, C: Tensor) -> Tensor:
    """(B, L, G, ·) -> (B, L, H, ·)."""
    return tensor.repeat_interleave(C.shape[2] // tensor.shape[2], dim=2)
