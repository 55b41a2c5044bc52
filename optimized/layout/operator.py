"""The plans of window attention as registered operators: `linmu::window_plan` and `linmu::layout_plan`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..engine.operator import Operator
from . import plan
from .sorts import Sorted


class WindowPlanInputs(NamedTuple):
    """window_id: (B, L) int64; -1 = in no window."""

    window_id: Tensor


class LayoutPlanInputs(NamedTuple):
    """The fields of a layout's `Sorted`, its vision tokens, its windows, and whether text has a place."""

    token: Tensor
    columns: Tensor
    segment: Tensor
    segments: int
    largest: list[int]
    narrow: bool
    vision: int
    window_thw: list[int]
    shifted: bool
    text: bool


class Plan(NamedTuple):
    """places (2, tokens) and blocks (1 + most_blocks, 4), int32: see `plan.window_plan`."""

    places: Tensor
    blocks: Tensor


def planned_layout(inputs: LayoutPlanInputs) -> Plan:
    """The plan of a layout's windows."""
    prompt, (vision, window_thw, shifted, text) = Sorted(*inputs[:6]), inputs[6:]
    return Plan(*plan.layout_plan(prompt, vision, window_thw, shifted, text))


def empty_plan(like: Tensor, tokens: int) -> Plan:
    """Shapes and dtypes of a plan of so many tokens."""
    places = like.new_empty((2, tokens), dtype=torch.int32)
    return Plan(places, like.new_empty((1 + plan.most_blocks(tokens), 4), dtype=torch.int32))


window_plan = Operator(
    "window_plan",
    WindowPlanInputs,
    Plan,
    forward=lambda inputs: Plan(*plan.window_plan(inputs.window_id)),
    fake=lambda inputs: empty_plan(inputs.window_id, inputs.window_id.shape[0] * inputs.window_id.shape[1]),
)
layout_plan = Operator(
    "layout_plan",
    LayoutPlanInputs,
    Plan,
    forward=planned_layout,
    fake=lambda inputs: empty_plan(inputs.token, inputs.token.shape[0] if inputs.text else inputs.vision),
)
