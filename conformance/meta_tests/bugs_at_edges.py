"""Modules and losses that are wrong at the ends of what they meet, or for what a layout keeps, by kind.

Each bug replaces something that the reference's modules call, while they run.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linmu.reference import VisionLayout, flex_ma, local_swin, m_mate, scan_order, window_ids

from ..properties import test_flex_ma, test_hidden_loss, test_local_swin, test_logit_loss, test_m_mate
from .planting import BUGS, Bug, planted

FILES = {"FlexMA": test_flex_ma, "LocalSwin": test_local_swin, "MMATE": test_m_mate}


class Instead:
    """A module of functions, some of which are others."""

    def __init__(self, module: Any, **functions: Callable) -> None:
        self.module, self.functions = module, functions

    def __getattr__(self, name: str) -> Any:
        return self.functions[name] if name in self.functions else getattr(self.module, name)


def calling(*replaced: tuple[Any, str, Any]) -> Callable:
    """A class in whose forward pass these names, each (owner, name, what it is instead), are replaced."""

    def change(reference: type) -> type:
        class Broken(reference):
            def forward(self, *args, **given):
                with ExitStack() as stack:
                    for each in replaced:
                        stack.enter_context(mock.patch.object(*each))
                    return super().forward(*args, **given)

        return Broken

    return change


def plant(kind: str, change: Callable, test: str, targets: tuple[str, ...]) -> None:
    """One bug for each of these modules."""
    for target in targets:
        name = f"{kind.replace(' ', '_')}_in_{target}"
        BUGS.append(Bug(name, target, change, (getattr(FILES[target], test),)))


BOTH, ALL = ("FlexMA", "MMATE"), ("FlexMA", "LocalSwin", "MMATE")
STEPS, GATES = "test_steps_at_both_ends_match_the_reference", "test_gates_at_both_ends_match_the_reference"

SOFTPLUS = {
    "softplus is log(1 + e^z)": (lambda z: (1 + z.exp()).log(), BOTH),
    "softplus is log1p(e^z)": (lambda z: z.exp().log1p(), ("FlexMA",)),
    "softplus has an unused branch that overflows": (lambda z: z.where(z > 20, z.exp().log1p()), ("MMATE",)),
    "softplus is a maximum and log(1 + e^-|z|)": (
        lambda z: z.clamp_min(0) + (1 + (-z.abs()).exp()).log(),
        ("FlexMA",),
    ),
    "softplus is -log(sigmoid(-z))": (lambda z: -torch.sigmoid(-z).log(), ("MMATE",)),
}
for kind, (softplus, targets) in SOFTPLUS.items():
    plant(kind, calling((flex_ma, "F", Instead(F, softplus=softplus))), STEPS, targets)

SIGMOID = {
    "a ratio of exponentials": lambda z: z.exp() / (1 + z.exp()),
    "1 / (1 + e^-z)": lambda z: 1 / (1 + (-z).exp()),
}
for kind, sigmoid in SIGMOID.items():
    torch_instead = Instead(torch, sigmoid=sigmoid)
    plant(f"the scan gate is {kind}", calling((flex_ma, "torch", torch_instead)), GATES, ("FlexMA",))
    plant(f"the mix is {kind}", calling((m_mate, "torch", torch_instead)), GATES, ("MMATE",))

SILU = {
    "silu is z / (1 + e^-z) in the dtype of z": (lambda z: z / (1 + (-z).exp()), ("FlexMA",)),
    "silu is z e^z / (1 + e^z)": (lambda z: z * z.exp() / (1 + z.exp()), ("MMATE",)),
    "silu is made of tanh": (lambda z: 0.5 * z * (1 + (0.5 * z).tanh()), BOTH),
}
for kind, (silu, targets) in SILU.items():
    plant(kind, calling((flex_ma, "F", Instead(F, silu=silu))), GATES, targets)


def narrow_norm(y: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The mean of the squares in the dtype of y."""
    factor = torch.rsqrt(y.square().mean(-1, keepdim=True).float() + eps)
    return (y * factor * weight.view(y.shape[2:])).to(y.dtype)


def clamped_norm(y: Tensor, weight: Tensor, eps: float) -> Tensor:
    """No mean square is below 1e-4."""
    factor = torch.rsqrt(y.float().square().mean(-1, keepdim=True).clamp_min(1e-4) + eps)
    return (y * factor * weight.view(y.shape[2:])).to(y.dtype)


def narrow_rms_norm(x: Tensor, shape: Any, weight: Tensor, eps: float) -> Tensor:
    """The same of q and k."""
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True).float() + eps) * weight).to(x.dtype)


NORMED = "test_what_is_normed_may_have_any_size"
plant("heads are squared in their dtype", calling((flex_ma, "rms_norm_per_head", narrow_norm)), NORMED, BOTH)
plant("norms are clamped", calling((flex_ma, "rms_norm_per_head", clamped_norm)), NORMED, ("FlexMA",))
narrow_queries = calling((nn.modules.normalization, "F", Instead(F, rms_norm=narrow_rms_norm)))
plant("q and k are squared in their dtype", narrow_queries, NORMED, ALL)


def rope_of(cos_half: int, sin_half: int) -> Callable:
    """`apply_rope` that reads one half of cos, 0 or 1, and one of sin for both halves of a head."""

    def halves(angle: Tensor, which: int) -> Tensor:
        return angle.chunk(2, dim=-1)[which].repeat(1, 1, 2)

    def apply_rope(tensor: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        return right(tensor, (halves(angles[0], cos_half), halves(angles[1], sin_half)))

    right = flex_ma.apply_rope
    return calling((flex_ma, "apply_rope", apply_rope), (local_swin, "apply_rope", apply_rope))


HALVES = "test_the_halves_of_the_angles_may_differ"
plant("rope reads the first half of its angles", rope_of(0, 0), HALVES, ALL)
plant("rope reads the second half of its angles", rope_of(1, 1), HALVES, ("LocalSwin",))
plant("rope reads the halves of cos and sin that it has at hand", rope_of(0, 1), HALVES, ("FlexMA",))


def kept(method: str, key: Callable, make: Callable) -> Callable:
    """What a layout's method gives is kept under a key of its arguments that misses some of them."""

    def call(self: VisionLayout, *args: Any) -> Tensor:
        return self.once(("own", key(*args)), lambda: make(self.coords, *args))

    return calling((VisionLayout, method, call))


def of_the_first_call(argument: str) -> Callable:
    """The modules take an argument from the first call with a layout."""

    def change(reference: type) -> type:
        class Broken(reference):
            def forward(self, hidden_states, layout=None, **given):
                given[argument] = layout.once(("own", argument), lambda: given.get(argument))
                return super().forward(hidden_states, layout, **given)

        return Broken

    return change


def windows_of(coords: Tensor, sizes: tuple[int, int, int], layer: int) -> Tensor:
    return window_ids(coords, sizes, layer % 2 == 1)


SHARED = "test_layers_may_share_a_layout"
plant("a scan order is kept for all layers", kept("order", lambda layer: 0, scan_order), SHARED, BOTH)
plant(
    "scan orders are kept for even and odd layers",
    kept("order", lambda layer: layer % 2, scan_order),
    SHARED,
    ("FlexMA",),
)
plant(
    "windows are kept without their shift",
    kept("windows", lambda sizes, layer: sizes, windows_of),
    SHARED,
    ("LocalSwin", "MMATE"),
)
plant(
    "windows are kept without their sizes",
    kept("windows", lambda sizes, layer: layer % 2, windows_of),
    SHARED,
    ("LocalSwin",),
)
plant("a mask is kept with the layout", of_the_first_call("valid"), SHARED, ALL)
plant("angles are kept with the layout", of_the_first_call("position_embeddings"), SHARED, ("LocalSwin",))


@planted("hidden_loss", test_hidden_loss.test_half_precision_inputs_are_exact_to_float32)
def what_is_squared_is_clamped(reference, student, teacher, valid=None):
    if student.dtype != torch.float16:
        return reference(student, teacher, valid)
    return reference(*(each.float().clamp(-256, 256) for each in (student, teacher)), valid)


@planted("hidden_loss", test_hidden_loss.test_half_precision_inputs_are_exact_to_float32)
def a_small_teacher_is_given_an_eps(reference, student, teacher, valid=None):
    if valid is not None or student.dtype != torch.float16:
        return reference(student, teacher, valid)
    s, t = student.float(), teacher.detach().float()
    return (s - t).square().sum() / (t.square().sum() + 1e-8 * t.numel())


def divergence_behind(bounds: tuple[float, float]) -> Callable:
    """The maximum that is taken off before exponentials are summed stays within bounds; in half precision."""

    def change(reference, student, teacher, mask=None, temperature=1.0):
        if student.dtype == torch.float32:
            return reference(student, teacher, mask, temperature)
        s, t = student.float() / temperature, teacher.detach().float() / temperature
        log_s, log_t = (log_softmax(each) for each in (s, t))
        return temperature**2 * (log_t.exp() * (log_t - log_s)).sum(-1).mean()

    def log_softmax(logits: Tensor) -> Tensor:
        moved = logits - logits.amax(-1, keepdim=True).clamp(*bounds)
        return moved - moved.exp().sum(-1, keepdim=True).log()

    return change


for kind, bounds in (("are_not_moved", (0.0, 0.0)), ("are_moved_down_only", (0.0, torch.inf))):
    at_both_ends = (test_logit_loss.test_logits_at_both_ends_match_the_reference,)
    BUGS.append(Bug(f"logits_{kind}", "logit_loss", divergence_behind(bounds), at_both_ends))
