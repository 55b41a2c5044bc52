"""Every operator with arguments on the GPU, at the sizes of real models, and the torch engine beside it.

The torch engine in float64 is the truth here: it is held against the reference by the rest of the suite, and
unlike the reference it can walk 65,536 tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from linmu import optimized
from linmu.optimized.scan import ScanInputs, scan

from ...harness.cancellation import sizes_of_sums
from ...harness.compare import Results, assert_matches, evaluate, in_float64, is_float, quarters
from ...harness.devices import moved
from ...harness.layouts import Layout, Pad, Text, Vision
from ...harness.operator_cases import BidirectionalCase, ConvCase, LossCase, ScanCase, WindowCase

DTYPES = ("bfloat16", "mixed", "float16", "float32")
OPERATORS = (
    "bidirectional_scan",
    "selective_scan",
    "scan_step",
    "causal_conv",
    "window_attention",
    "logit_loss",
)
Arguments = dict[str, Any]


def prompt(length: int) -> Layout:
    """Two rows: text, images with text between rows, a video; images side by side behind padding."""
    image, video = Vision(1, (1, 7, 9), "row"), Vision(0, (4, 6, 5))
    first = (Text(11), image, Text(3), video)
    second = (Pad(17), Vision(0, (1, 9, 10)), Vision(1, (2, 5, 4)))
    if length < 203:
        first, second = (Text(3), Vision(0, (1, 3, 4), "row")), (Pad(5), Vision(0, (2, 2, 2)))
    fill = [length - sum(len(part.cells()) for part in row) for row in (first, second)]
    return Layout(((*first, Text(fill[0])), (*second, Text(fill[1]))))


def arguments(
    operator: str, dtype: str, *, heads: int, groups: int, head_dim: int, length: int, device: str = "cuda"
) -> Arguments:
    """The arguments of one call."""
    sizes = {"heads": heads, "groups": groups, "state": head_dim, "head_dim": head_dim}
    common = {"dtype": dtype, "seed": length}
    if operator == "bidirectional_scan":
        case = BidirectionalCase(prompt(length), initial_state=True, skip=True, **sizes, **common)
    elif operator in ("selective_scan", "scan_step"):
        case = ScanCase(2, length, mask="some", initial_state=True, reverse=False, **sizes, **common)
    elif operator == "causal_conv":
        channels = (2 * groups + heads) * head_dim
        case = ConvCase(2, length, channels, 4, True, "some", True, **common)
    elif operator == "window_attention":
        case = WindowCase(2, length, windows=1 + length // 250, scale=None, **sizes, **common)
    else:
        case = LossCase(2, min(length, 40), 5003 if length > 100 else 37, "some", 2.0, **common)
    given = moved(case.inputs(), device)
    if dtype == "float16" and "A" in given:  # its gradient, over all tokens, overflows
        given["A"] = given["A"].float()
    if operator == "scan_step":
        tokens = {name: given[name][:, 0] for name in ("x", "dt", "B", "C")}
        skip = torch.linspace(-1, 1, heads, device=device)
        given = tokens | {"A": given["A"], "state": given["initial_state"], "D": skip, "valid": None}
    return given | ({"temperature": 2.0} if operator == "logit_loss" else {})


def kernels(operator: str) -> Callable:
    """The operator on the Triton engine, which must be the one that runs."""

    def call(**given: Any) -> Tensor | tuple[Tensor, ...]:
        with engine("triton"):
            return getattr(optimized, operator)(**given)

    return call


@contextmanager
def engine(name: str) -> Iterator[None]:
    optimized.set_engine(name)
    try:
        yield
    finally:
        optimized.set_engine(None)


def results(operator: str, given: Arguments, name: str = "triton", draw: int | None = None) -> Results:
    """Values and every gradient on one engine."""
    with engine(name):
        return evaluate(getattr(optimized, operator), given, gradients=True, draw=draw)


def assert_kernels_match(operator: str, given: Arguments, case: Any) -> None:
    """Values, states and every gradient of the kernels against the torch engine's."""
    truth, own = results(operator, in_float64(given), "torch"), results(operator, given, "torch")
    sizes = partial(sizes_of_sums, lambda draw: results(operator, in_float64(given), "torch", draw))
    assert_matches(results(operator, given), truth, own, case, sizes)


def left_by_the_norm(dtype: torch.dtype, device: str) -> float:
    """The gradient that reaches x through the norm of heads of one number, as a share of what it would be if
    the norm's factor were constant. Their norm is 1 or -1 whatever x is, so nothing is left.
    """
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(2, 40, *shape, generator=generator).to(device)

    x, B, C = (numbers(*shape).to(dtype) for shape in ((1, 1), (1, 4), (2, 4)))
    given = {"x": x.requires_grad_(), "dt": numbers(2).sigmoid(), "A": -torch.ones(2, device=device), "B": B}
    given |= {"C": C, "gate": numbers(2).sigmoid(), "D": torch.ones(2, device=device), "initial_state": None}
    given |= {"segment": torch.zeros(2, 40, dtype=torch.int64, device=device), "valid": None, "order": None}
    y, normed = (
        scan(ScanInputs(**given, norm_weight=weight, eps=1e-12))[0]
        for weight in (None, torch.ones_like(given["D"]))
    )
    asked = numbers(2, 1).to(dtype)
    left, sent = torch.autograd.grad(normed, x, asked), torch.autograd.grad(y, x, asked / y.detach().abs())
    return (left[0].float().norm() / sent[0].float().norm()).item()


FAR = {  # operator -> the tensors whose slices lie far apart, and the axis that is sliced
    "bidirectional_scan": (("x", "B", "C"), 1),
    "selective_scan": (("x", "B", "C"), 0),
    "scan_step": (("x", "B", "C"), 0),
    "causal_conv": (("u",), 1),
    "window_attention": (("q", "k", "v"), 1),
    "logit_loss": (("student", "teacher"), 1),
}


def far_apart(operator: str, given: Arguments, fill: bool) -> Arguments:
    """The same values, the last slices of some tensors more than 2^31 elements behind the first.

    The memory between them is NaN with `fill`; without it a CPU never touches it.
    """
    names, axis = FAR[operator]
    first = given[names[0]]
    size = first.shape[axis]
    step = -(-(2**31 + 2**20) // (size - 1) // 16) * 16
    memory = torch.empty(step * (size - 1) + 2**22, dtype=first.dtype, device=first.device)
    if fill:
        memory.fill_(float("nan"))
    far, start = dict(given), 0
    for name in names:
        strides = list(torch.empty(given[name].select(axis, 0).shape).stride())
        strides.insert(axis, step)
        far[name] = memory.as_strided(given[name].shape, strides, start).copy_(given[name])
        start += given[name].select(axis, 0).numel() + 16
    return far


def results_of_views(operator: str, given: Arguments) -> Results:
    """`results` without the copies of the inputs, which would bring views back together."""
    leaves = {name: value.detach().requires_grad_() for name, value in floats_of(given).items()}
    outputs = kernels(operator)(**{**given, **leaves})
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    asked = [quarters(output, place) for place, output in enumerate(outputs)]
    grads = torch.autograd.grad(outputs, list(leaves.values()), asked, allow_unused=True)
    found = dict(zip(("y", "final_state"), (output.detach() for output in outputs), strict=False))
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        found[f"grad {name}"] = torch.zeros_like(leaf) if grad is None else grad
    return found


def floats_of(given: Arguments) -> dict[str, Tensor]:
    """The arguments that may need a gradient."""
    return {name: value for name, value in given.items() if is_float(value)}


def block(dtype: torch.dtype, device: str = "cuda", **options: Any) -> Callable:
    """The forward of an M-MATE block with random parameters, over a layout of 300 tokens that is there."""
    config = optimized.LinMUConfig(width=256, heads=8, groups=2, head_dim=64, qkv_bias=True, **options)
    torch.manual_seed(0)
    module = optimized.MMATE(config, layer_index=1).to(device)
    for name, parameter in module.named_parameters():
        if any(part in name for part in ("q_", "k_", "v_", "o_", "z_", "mix_", "gate_")):
            torch.nn.init.normal_(parameter, std=0.05)
            parameter.data = parameter.data.to(dtype)
    where = prompt(300)
    layout, valid = optimized.VisionLayout(where.coords.to(device)), where.valid.to(device)
    angles = torch.rand(2, 300, 32, device=device).repeat(1, 1, 2)
    embeddings = (angles.cos(), angles.sin())

    def run(hidden_states: Tensor) -> Tensor:
        return module(hidden_states, layout, valid=valid, position_embeddings=embeddings)[0]

    return run
