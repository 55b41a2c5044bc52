"""How large the terms are that a gradient is a sum of: what its error is measured by where they cancel.

The gradient of a parameter is a sum over all tokens. Its terms may cancel, and then the sum resolves less
than its terms do, however it is computed: each term's rounding stays. The gradient of attention's scores is a
difference, dS = P (dP - δ) with δ = Σ P dP, exactly 0 for a token that is alone in its window. So is that of
a gate between two scans, dy · (y_f - y_r), which are almost equal where a step forgets all before it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from linmu.reference import bidirectional_scan

from .compare import PER_TOKEN, Results, cotangent

DRAWS = 8


def sizes_of_sums(run: Callable[[int], Results], also: tuple[str, ...] = ()) -> Results:
    """Twice the root of the summed squares of the terms of every gradient that has no tokens, by its name.

    With random signs for the tokens of the output, the mean of a sum's square is the sum of its terms'
    squares. Twice, as the rounding of a state is not one token's own but reaches all that the state passes.

    Args:
        run: the function under test in float64, as `evaluate(..., draw=draw)`: draw -> its results.
        also: results to be measured like these although they have tokens.
    """
    drawn = [run(draw) for draw in range(DRAWS)]
    summed = [name for name in drawn[0] if is_summed(name) or name in also]
    return {
        name: 2 * torch.stack([results[name] for results in drawn]).square().mean(0).sqrt() for name in summed
    }


def is_summed(name: str) -> bool:
    """Whether a result is the gradient of something that all tokens share."""
    kind, _, of = name.partition(" ")
    return kind == "grad" and of not in PER_TOKEN and not of.endswith("state")


def sizes_of_gate(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    gate: Tensor,
    segment: Tensor | None = None,
    D: Tensor | None = None,
    **given: Tensor | None,
) -> Results:
    """The sum of the absolute terms of the gradient of the gate, |dy| (|y_f| + |y_r|).

    Args:
        x, dt, A, B, C, gate, segment, D, given: as for `bidirectional_scan`, in float64; the cotangent is
            `evaluate`'s.
    """
    one_way = partial(bidirectional_scan, x, dt, A, B, C, segment=segment, **given)
    y_f, y_r = (one_way(gate=torch.full_like(gate, share))[0] for share in (1.0, 0.0))
    return {"grad gate": (cotangent(y_f, 0).abs() * (y_f.abs() + y_r.abs())).sum(-1)}


def sizes_in_attention(
    q: Tensor, k: Tensor, v: Tensor, window_id: Tensor, scale: float | None = None
) -> Results:
    """The sums of the absolute terms of the gradients of q and k, P (|dP| + |δ|) · scale · |k| or |q|.

    Args:
        q, k, v, window_id, scale: as for `window_attention`, in float64; the cotangent is `evaluate`'s.
    """
    ratio = q.shape[2] // k.shape[2]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    k, v = k.repeat_interleave(ratio, dim=2), v.repeat_interleave(ratio, dim=2)
    inside = window_id >= 0
    q, k, v = (torch.where(inside[..., None, None], tensor, 0.0) for tensor in (q, k, v))
    mates = (window_id[:, :, None] == window_id[:, None, :]) & inside[:, :, None]  # (B, L, L)
    scores = scale * torch.einsum("bihn,bjhn->bhij", q, k)
    weights = torch.nan_to_num(scores.masked_fill(~mates[:, None], -torch.inf).softmax(-1))
    asked = cotangent(v.new_empty(*q.shape[:3], v.shape[3]), 0)
    sent = torch.einsum("bihp,bjhp->bhij", asked, v)
    delta = (weights * sent).sum(-1, keepdim=True)
    terms = scale * weights * (sent.abs() + delta.abs())
    of_keys = torch.einsum("bhij,bihn->bjhn", terms, q.abs())
    return {
        "grad q": torch.einsum("bhij,bjhn->bihn", terms, k.abs()),
        "grad k": of_keys.unflatten(2, (-1, ratio)).sum(3),
    }


def sizes_in_divergence(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, temperature: float = 1.0
) -> Results:
    """The sums of the absolute terms of the divergence, p (|log p| + |log q|), and of its gradient, q + p.

    Args:
        student, teacher, mask, temperature: as for `logit_loss`, in float64; the cotangent is `evaluate`'s.
    """
    counted = torch.ones(student.shape[:2], dtype=torch.bool) if mask is None else mask
    log_p, log_q = (
        torch.where(counted[..., None], tensor / temperature, 0.0).log_softmax(-1)
        for tensor in (teacher, student)
    )
    share = counted[..., None] / counted.sum().clamp_min(1)
    asked = cotangent(student.new_empty(()), 0).abs()
    return {
        "loss": temperature**2 * (log_p.exp() * (log_p.abs() + log_q.abs()) * share).sum(),
        "grad student": asked * temperature * (log_p.exp() + log_q.exp()) * share,
    }
