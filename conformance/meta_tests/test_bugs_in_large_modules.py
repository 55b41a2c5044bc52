"""Modules that are right up to a size, and wrong from there on: the sizes that people run are tried."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from linmu import reference
from linmu.reference import flex_ma, local_swin

from ..harness.backends import Backend
from ..harness.module_cases import large_cases
from ..properties import test_flex_ma, test_local_swin, test_m_mate

SIZES = {"FlexMA": test_flex_ma, "LocalSwin": test_local_swin, "MMATE": test_m_mate}


def patched(module, name, change):
    """The class, while whose forward pass runs the operator `name` is `change(operator, *arguments)`."""

    def broken(kind):
        class Broken(kind):
            def forward(self, *given, **named):
                right = getattr(module, name)
                with mock.patch.object(module, name, lambda *a, **k: change(right, *a, **k)):
                    return super().forward(*given, **named)

        return Broken

    return broken


def scaled_by_the_padded_size(attend, q, k, v, *rest, **named):
    """Heads of 65 to 127 numbers are padded to 128, and their scores divided by its root."""
    size = q.shape[3]
    return attend(q * (size / 128) ** 0.5 if 64 < size < 128 else q, k, v, *rest, **named)


def rows_of_the_state_lost(scan, x, dt, A, B, C, **rest):
    """Beyond the last whole 16, in heads of 17 to 127."""
    size = B.shape[3]
    keep = torch.arange(size) < (size // 16 * 16 if 16 < size < 128 else size)
    return scan(x, dt, A, B * keep, C, **rest)


def columns_lost(scan, x, dt, A, B, C, **rest):
    """Beyond 128 numbers of a head."""
    return scan(x * (torch.arange(x.shape[3]) < 128), dt, A, B, C, **rest)


def tiles_lost(size):
    """Heads of this size are taken for those of the next smaller power of two."""

    def change(attend, q, k, v, *rest, **named):
        kept = 1 << (size.bit_length() - 1)
        kept = kept // 2 if kept == size else kept
        v = v * (torch.arange(v.shape[3]) < kept) if v.shape[3] == size else v
        return attend(q, k, v, *rest, **named)

    return change


def groups_of(ratio):
    """Of so many heads, the last reads the next group."""

    def change(scan, x, dt, A, B, C, **rest):
        if C.shape[2] // x.shape[2] == ratio and x.shape[2] > 1:
            C = C.clone()
            C[:, :, ratio - 1] = 0
        return scan(x, dt, A, B, C, **rest)

    return change


def channels_lost(kind):
    """Beyond 4,096 of the hidden states."""

    class Broken(kind):
        def forward(self, hidden_states, *given, **named):
            there = torch.arange(hidden_states.shape[2]) < 4096
            return super().forward(hidden_states * there, *given, **named)

    return Broken


def window_of_1024(attend, q, k, v, window, **rest):
    """A window of text is no longer."""
    output, _ = attend(q, k, v, min(window, 1024), **rest)
    return output, attend(q, k, v, window, **rest)[1]


SCAN, WINDOWS = (flex_ma, "bidirectional_scan"), (local_swin, "window_attention")
TEXT = (local_swin, "sliding_window_attention")
BUGS = {
    "a scale of 128": ("LocalSwin", patched(*WINDOWS, scaled_by_the_padded_size), "N=P=96"),
    "a scale of 128 in text": ("LocalSwin", patched(*TEXT, scaled_by_the_padded_size), "N=P=66"),
    "a scale of 128 in a block": ("MMATE", patched(*WINDOWS, scaled_by_the_padded_size), "N=P=80"),
    "rows lost": ("FlexMA", patched(*SCAN, rows_of_the_state_lost), "N=P=72"),
    "rows lost in a block": ("MMATE", patched(*SCAN, rows_of_the_state_lost), "N=P=40"),
    "columns lost": ("FlexMA", patched(*SCAN, columns_lost), "N=P=256"),
    "no 32": ("LocalSwin", patched(*WINDOWS, tiles_lost(32)), "N=P=32"),
    "no 64": ("LocalSwin", patched(*TEXT, tiles_lost(64)), "N=P=64"),
    "no 112": ("MMATE", patched(*WINDOWS, tiles_lost(112)), "N=P=112"),
    "channels lost": ("FlexMA", channels_lost, "width 5,120"),
    "channels lost in windows": ("LocalSwin", channels_lost, "width 5,120"),
    "channels lost in a block": ("MMATE", channels_lost, "width 5,120"),
    "a window of 1,024": (
        "LocalSwin",
        patched(*TEXT, window_of_1024),
        "a text longer than its window of 1,030",
    ),
}
BUGS |= {
    f"{ratio} heads": ("FlexMA", patched(*SCAN, groups_of(ratio)), f"{2 * ratio} heads, {ratio} to a group")
    for ratio in (5, 7, 9, 12, 16)
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_that_begins_at_a_size_is_caught(bug):
    """By the case of that size; and smaller ones pass."""
    name, change, where = BUGS[bug]
    broken, cases = Backend(bug, reference, **{name: change(getattr(reference, name))}), large_cases(name)
    check = SIZES[name].test_sizes_that_people_run
    with pytest.raises(AssertionError):
        check(broken, cases[where])
    check(broken, cases["an image of 323 tokens"])
