"""The lines of the scan and of window attention: ours and the peers', checked before they are timed.

A result is right if ‖y - truth‖ / ‖truth‖ is small, the truth being the torch engine in float32 on the same
numbers; with a backward pass, every gradient too. Small means below a bound of the dtype or, where that is
more, below three times the error of the torch engine in that dtype: a gradient may be a sum that cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from linmu import reference

from ..engine import set_engine, wanted_engine
from ..window_attention import window_attention
from . import peers, window_peers
from .cases import Case, LeftOutError, first_line, values_of
from .counts import Counts, Sizes, attention_counts, scan_counts, window_counts
from .problems import (
    WINDOW_TOKENS,
    ScanProblem,
    WindowProblem,
    is_float,
    prompt,
    scan_problem,
    window_problem,
    with_gradients,
)
from .timing import Ceilings, time_calls

CHECKED_LENGTH = 1536
SMALL = 2**30  # bytes of inputs up to which two sets of them take turns
TOLERANCE = {torch.bfloat16: 0.02, torch.float16: 0.01, torch.float32: 1e-3}
GRADIENT_TOLERANCE = {torch.bfloat16: 0.05, torch.float16: 0.02, torch.float32: 2e-3}
FORWARD, BOTH = "forward", "forward + backward"


@dataclass(frozen=True)
class Setting:
    """Where and how the lines of one run are measured."""

    device: torch.device
    dtype: torch.dtype
    ceilings: Ceilings
    seconds: float = 0.2


@dataclass(frozen=True)
class Method:
    """One way to do a job.

    Args:
        name: as in the tables.
        prepare: from a problem, what is done once per layout, to a function of such problems.
        truth: what the result must equal; None = nothing to compare with, it does another job.
        growth: power of the length that its time grows with.
        passes: the passes that can be timed.
        longest: tokens up to which it is worth waiting.
        refuses: why its backward pass will not run here, or None.
    """

    name: str
    prepare: Callable[[Any], Callable[[Any], Tensor]]
    truth: Callable[[Any], tuple[Tensor, ...]] | None
    growth: float = 1.0
    passes: tuple[str, ...] = (FORWARD, BOTH)
    longest: int | None = None
    refuses: Callable[[], str | None] = lambda: None


def scan_truth(problem: ScanProblem) -> tuple[Tensor, ...]:
    return (peers.scan(problem),)


def window_truth(problem: WindowProblem) -> tuple[Tensor, ...]:
    return (window_attention(problem.q, problem.k, problem.v, problem.window_id),)


def from_peer(peer: peers.Peer) -> Method:
    """A peer as a method that first asks whether it is installed."""

    def prepare(_: ScanProblem) -> Callable[[ScanProblem], Tensor]:
        peer.require()
        return peer.run

    passes = (FORWARD,) if peer.forward_only else (FORWARD, BOTH)
    truth = peer.expected or scan_truth
    return Method(peer.name, prepare, truth, passes=passes, refuses=peer.refuses)


def reference_scan(problem: ScanProblem) -> Tensor:
    inputs = (problem.x, problem.dt, problem.A, problem.B, problem.C)
    return reference.bidirectional_scan(*inputs, gate=problem.gate, segment=problem.segment)[0]


def reference_windows(problem: WindowProblem) -> Tensor:
    return reference.window_attention(problem.q, problem.k, problem.v, problem.window_id)


def causal_heads(problem: ScanProblem) -> Tensor:
    """Causal attention with C, B, x as queries, keys and values: what the scan stands in for."""
    window = WindowProblem(problem.prompt, problem.C, problem.B, problem.x, problem.segment, problem.segment)
    return window_peers.causal(window)


OURS = "LinMU"
ATTENTION = "causal attention"
SLOW = "reference"
SCAN = [Method(OURS, lambda _: peers.scan, scan_truth), *map(from_peer, peers.PEERS)]
WINDOWS = [
    Method(OURS, window_peers.kernel, window_truth),
    *(Method(name, prepare, window_truth) for name, prepare in window_peers.WINDOW_PEERS.items()),
]
QUICK_SCAN = [
    SCAN[0],
    Method(ATTENTION, lambda _: causal_heads, None, growth=2.0),
    Method(SLOW, lambda _: reference_scan, scan_truth, passes=(FORWARD,), longest=1024),
]
QUICK_WINDOWS = [
    *WINDOWS[:2],
    Method(SLOW, lambda _: reference_windows, window_truth, passes=(FORWARD,), longest=2048),
]


def operator_cases(
    benchmark: str,
    methods: Sequence[Method],
    sizes: Sizes,
    lengths: Sequence[int],
    passes: str,
    setting: Setting,
    priority: Callable[[str, int], int],
) -> Iterator[Case]:
    """The lines of one operator, one size and one kind of pass."""
    draw = scan_problem if benchmark == "scan" else window_problem
    for method in methods:
        checked: dict[str, str | None] = {}  # one check for all lengths
        for length in lengths:
            if passes not in method.passes or length > (method.longest or length):
                continue
            job = partial(draw, length, sizes, setting.dtype, setting.device)
            check = partial(draw, CHECKED_LENGTH, sizes, setting.dtype, setting.device)
            counts = counts_of(benchmark, method, sizes, length, setting.dtype, passes == BOTH)
            yield Case(
                benchmark,
                method.name,
                str(sizes),
                passes,
                length,
                partial(measure, method, passes == BOTH, job, check, checked, counts, setting),
                priority(method.name, length),
                method.growth,
            )


def counts_of(
    benchmark: str, method: Method, sizes: Sizes, length: int, dtype: torch.dtype, backward: bool
) -> Counts:
    """What the job needs; causal attention has its own."""
    vision, item = prompt(length).vision, dtype.itemsize
    if method.name == ATTENTION:
        return attention_counts(sizes, length, item, backward)
    if benchmark == "scan":
        return scan_counts(sizes, length, vision, item, backward)
    return window_counts(sizes, length, vision, WINDOW_TOKENS, item, backward)


def measure(
    method: Method,
    backward: bool,
    job: Callable[..., Any],
    check: Callable[..., Any],
    checked: dict[str, str | None],
    counts: Counts,
    setting: Setting,
) -> dict[str, Any]:
    """Check once, then time; the values of one line."""
    if method.truth is not None:
        if "reason" not in checked:
            checked["reason"] = why_wrong(method, check(seed=1), backward, setting.dtype)
        if checked["reason"]:
            raise LeftOutError(checked["reason"])
    problems = [job(seed=2)]
    if bytes_of(problems[0]) < SMALL:
        problems.append(job(seed=3))
    run = method.prepare(problems[0])
    calls = [call_of(run, problem, backward) for problem in problems]
    timing = time_calls(calls, setting.device, seconds=setting.seconds)
    return values_of(timing, **rates(counts, timing.seconds, setting.ceilings))


def rates(counts: Counts, seconds: float, ceilings: Ceilings) -> dict[str, Any]:
    """What a line says beside its time."""
    floor = ceilings.floor(counts.flops, counts.moved)
    return {
        "flops": counts.flops,
        "bytes": counts.moved,
        "tflops": counts.flops / seconds / 1e12,
        "gbps": counts.moved / seconds / 1e9,
        "floor": floor,
        "of_floor": floor / seconds,
    }


def call_of(run: Callable[[Any], Tensor], problem: Any, backward: bool) -> Callable[[], object]:
    """One call without arguments: the forward pass, or both with a random gradient of the output."""
    if not backward:
        return torch.no_grad()(lambda: run(problem))
    problem, leaves = with_gradients(problem)
    main = problem.C if isinstance(problem, ScanProblem) else problem.q
    asked = torch.randn_like(main)  # N = P, so the output has this shape

    def call() -> object:
        return torch.autograd.grad(run(problem), list(leaves.values()), asked, allow_unused=True)

    return call


def bytes_of(problem: Any) -> int:
    """Bytes of all tensors of a problem."""
    return sum(value.nbytes for value in vars(problem).values() if isinstance(value, Tensor))


def why_wrong(method: Method, problem: Any, backward: bool, dtype: torch.dtype) -> str | None:
    """The reason not to time a method, found once: it differs, refuses or fails; None if it is right."""
    try:
        method.prepare(problem)  # says first what is missing
        refusal = method.refuses() if backward else None
        return refusal or difference(method, problem, backward, dtype)
    except LeftOutError as reason:
        return str(reason)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of a peer, whatever it is
        return f"failed: {type(error).__name__}: {first_line(error)}"


def difference(method: Method, problem: Any, backward: bool, dtype: torch.dtype) -> str | None:
    """How a method's result differs from the truth, or None if it is right."""
    wide = replace(problem, **{k: v.float() for k, v in vars(problem).items() if is_float(v)})
    run = method.prepare(problem)
    with torch.no_grad():
        found = run(problem)
        with torch_engine():
            wanted = method.truth(wide)
            own = method.truth(problem)
    errors = [relative_error(found, each) for each in wanted]
    bounds = [bound(TOLERANCE[dtype], *pair) for pair in zip(own, wanted, strict=True)]
    if not any(error <= limit for error, limit in zip(errors, bounds, strict=True)):
        return f"left out: its result differs from the truth by {min(errors):.1e}"
    if backward:
        return gradient_difference(method, run, problem, wide, dtype)
    return None


def gradient_difference(
    method: Method, run: Callable[[Any], Tensor], problem: Any, wide: Any, dtype: torch.dtype
) -> str | None:
    """The same for the gradients of every input."""
    found = gradients(run, problem)
    with torch_engine():
        wanted, own = (gradients(lambda given: method.truth(given)[0], each) for each in (wide, problem))
    for name, grad in found.items():
        error = relative_error(grad, wanted[name])
        if not error <= bound(GRADIENT_TOLERANCE[dtype], own[name], wanted[name]):
            return f"left out: its gradient of {name} differs from the truth by {error:.1e}"
    return None


def gradients(run: Callable[[Any], Tensor], problem: Any) -> dict[str, Tensor]:
    """Gradients of a weighted sum of the result, by the inputs' names."""
    problem, leaves = with_gradients(problem)
    y = run(problem)
    weights = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape).sin().to(y.dtype)
    return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), weights), strict=True))


def bound(least: float, own: Tensor, wanted: Tensor) -> float:
    """The error allowed: `least`, or three times that of the torch engine in the dtype at hand."""
    return max(least, 3 * relative_error(own, wanted))


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """‖found - wanted‖ / ‖wanted‖; NaN if there is one in `found`."""
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


@contextmanager
def torch_engine() -> Iterator[None]:
    """Within, our operators run on the torch engine."""
    before = wanted_engine()
    set_engine("torch")
    try:
        yield
    finally:
        set_engine(before)
