"""Cases of `sliding_window_attention`, and the operator on tensors alone: its state is three of them.

Letters: B batch, L tokens, W window, H query heads, G groups, N head dim of q and k, P head dim of v.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import wraps
from typing import Any, ClassVar

import torch
from hypothesis import strategies as st
from torch import Tensor

from linmu.reference import WindowState

from .operator_cases import DTYPES, EXACT, MASKS, SEEDS, Case, Numbers, dtypes, row_mask, sizes

STATE = ("initial_k", "initial_v", "present")


@dataclass(frozen=True)
class SlidingWindowCase(Case):
    """Arguments of `sliding_window_attention`; `asks` and `valid` are kinds of `row_mask`."""

    operator: ClassVar[str] = "sliding_window_attention"
    results: ClassVar[tuple[str, ...]] = ("o", "state k", "state v", "state present")
    tokens: ClassVar[tuple[str, ...]] = ("q", "k", "v")
    masks: ClassVar[tuple[str, ...]] = ("asks", "valid", "sequence")
    rows: ClassVar[tuple[str, ...]] = STATE
    batch: int
    length: int
    heads: int
    groups: int
    state: int
    head_dim: int
    window: int
    asks: str
    valid: str
    packed: bool
    initial_state: bool
    scale: float | None
    dtype: str
    seed: int

    def inputs(self, draw: int = 0) -> dict[str, Any]:
        """All arguments by name, the state's tensors by `STATE`; another `draw` gives other numbers only."""
        numbers, dtype = Numbers(self.seed + 7919 * draw), DTYPES[self.dtype][0]
        tokens, before = (self.batch, self.length), (self.batch, self.window - 1)
        given = {
            "q": numbers.normal(*tokens, self.heads, self.state, dtype=dtype),
            "k": numbers.normal(*tokens, self.groups, self.state, dtype=dtype),
            "v": numbers.normal(*tokens, self.groups, self.head_dim, dtype=dtype),
            "window": self.window,
            "asks": row_mask(self.asks, *tokens, Numbers(self.seed + 1)),
            "valid": row_mask(self.valid, *tokens, Numbers(self.seed + 2)),
            "sequence": self.sequence,
            "scale": self.scale,
        }
        if self.initial_state:
            start = {
                "initial_k": numbers.normal(*before, self.groups, self.state, dtype=dtype),
                "initial_v": numbers.normal(*before, self.groups, self.head_dim, dtype=dtype),
                "present": self.present,
            }
            absent = ~start["present"][..., None, None]
            given |= {k: v if k == "present" else v.masked_fill(absent, 0) for k, v in start.items()}
        else:
            given |= dict.fromkeys(STATE)
        return given

    @property
    def sequence(self) -> Tensor | None:
        """Ids of the samples of a packed row; of padding, any.

        They rise, beyond 2^31, or equal modulo 2^32 and as float32; or they fall, from 1 to the negative; or
        they are the largest and the lowest there are, in turn.
        """
        if not self.packed:
            return None
        tokens, numbers = (self.batch, self.length), Numbers(self.seed + 3)
        starts = numbers.some(*tokens, share=min(0.25, 3 / self.length))
        first, factor = (2**59, 2**32) if self.seed % 2 else (3_000_000_019, 1000)
        place = starts.cumsum(1)
        sequence = first + factor * place
        if self.seed % 5 == 1:
            sequence = 1 - place
        elif self.seed % 5 == 2:
            sequence = torch.where(place % 2 == 0, 2**63 - 1 - place, place - 2**63)
        valid = row_mask(self.valid, *tokens, Numbers(self.seed + 2))
        return sequence if valid is None else sequence.masked_fill(~valid, -7)

    @property
    def present(self) -> Tensor:
        """What there is of a state, (B, W-1): another number of tokens in each row, the last ones."""
        generator = Numbers(self.seed + 4).generator
        count = torch.randint(0, self.window, (self.batch, 1), generator=generator)
        return torch.arange(self.window - 1) >= self.window - 1 - count

    @staticmethod
    def flat(operator: Callable) -> Callable:
        """The operator on `inputs()`: (o, the state's k, v and present)."""

        @wraps(operator)
        def call(**given: Any) -> tuple[Tensor, ...]:
            start = [given.pop(name, None) for name in STATE]
            state = None if start[2] is None else WindowState(*start)
            o, state = operator(**given, initial_state=state)
            return (o, *state)

        return call


@st.composite
def sliding_window_cases(draw: st.DrawFn, names: Iterable[str] = EXACT, **fixed: Any) -> SlidingWindowCase:
    heads, groups = draw(sizes("heads"))
    drawn = {
        "batch": draw(sizes("batch")),
        "length": draw(sizes("length")),
        "heads": heads,
        "groups": groups,
        "state": draw(sizes("size")),
        "head_dim": draw(sizes("size")),
        "window": draw(sizes("text_window")),
        "asks": draw(MASKS),
        "valid": draw(MASKS),
        "packed": draw(st.booleans()),
        "initial_state": draw(st.booleans()),
        "scale": draw(st.sampled_from((None, 0.3))),
        "dtype": draw(dtypes(names)),
        "seed": draw(SEEDS),
    }
    return SlidingWindowCase(**{**drawn, **fixed})


def selected(case: Case, tokens: Tensor | slice) -> Case:
    """Some of the tokens of all rows, behind the same state."""
    given = case.inputs()
    names = (*case.tokens, *case.masks)
    return case.changed(**{name: given[name][:, tokens] for name in names if given[name] is not None})
