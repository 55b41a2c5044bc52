"""The scan of a part of a prompt in two steps: what it adds to the states, then, once known what enters, y.

    left = decay · entering + added                                                                       (1)

in both directions, with `added` the states that the tokens leave when none enters. Between the steps, parts
on other processes exchange their (1); the larger step waits for nothing. Without gradients. Letters: B batch,
L tokens, H query heads, N state size, P head dim.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ..engine.operator import Engines, lazy
from .operator import ScanInputs, scan


class Begun(NamedTuple):
    """The first step.

    Args:
        inputs: of the scan.
        added: (directions, B, H, N, P) in the accumulation dtype; the reverse direction, if there is one,
            last.
        decay: (directions, B, H), in the same dtype.
        kept: what the engine needs in the second step, which may overwrite it.
    """

    inputs: ScanInputs
    added: Tensor
    decay: Tensor
    kept: Any


def begin(inputs: ScanInputs) -> Begun:
    """What these tokens make of the states: eq. (1).

    Args:
        inputs: without an initial state. Where tokens follow whose segment may be cut, `openings` says so.
    """
    return scan.run(BEGIN, inputs)


def finish(begun: Begun, entering: list[Tensor | None]) -> Tensor:
    """`scan`'s y, (B, L, H, P).

    Args:
        begun: used once.
        entering: of each direction (B, H, N, P), the state that enters; None = zeros.
    """
    return scan.run(FINISH, begun.inputs, begun, entering)


BEGIN, FINISH = (
    Engines(lazy(f"{__package__}.torch_engine.forward", name), lazy(f"{__package__}.kernels", name))
    for name in ("begin", "finish")
)
