"""How large the terms are that a gradient sums over tokens: what its error is measured by where they cancel.

The gradient of a parameter is a sum over all tokens. Its terms may cancel, and then the sum resolves less
than its terms do, however it is computed: each term's rounding stays.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .compare import PER_TOKEN, Results

DRAWS = 8


def sizes_of_sums(run: Callable[[int], Results]) -> Results:
    """Twice the root of the summed squares of the terms of every gradient that has no tokens, by its name.

    With random signs for the tokens of the output, the mean of a sum's square is the sum of its terms'
    squares. Twice, as the rounding of a state is not one token's own but reaches all that the state passes.

    Args:
        run: the function under test in float64, as `evaluate(..., draw=draw)`: draw -> its results.
    """
    drawn = [run(draw) for draw in range(DRAWS)]
    summed = [name for name in drawn[0] if is_summed(name)]
    return {
        name: 2 * torch.stack([results[name] for results in drawn]).square().mean(0).sqrt() for name in summed
    }


def is_summed(name: str) -> bool:
    """Whether a result is the gradient of something that all tokens share."""
    kind, _, of = name.rpartition(" of ")
    return kind == "gradient" and of not in PER_TOKEN and not of.endswith("state")
