"""One line of a table, and the loop that measures lines within a budget.

Whatever goes wrong in a line is written into that line, and the loop goes on: a missing peer, memory that
runs out, a kernel that fails, a length that the time left would not cover, a compilation that takes too long.
"""

from __future__ import annotations

import gc
import math
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch

from .timing import Timing

OK = "ok"
FAULT = "failed: AcceleratorError"  # after which no kernel of the process runs
RUNS = 2  # of a call that takes long: one before it is timed, one timed


class OutOfTimeError(BaseException):
    """The budget ended within a line; not an Exception, so that no library takes it for its own."""


class LeftOutError(Exception):
    """Why a line cannot be measured here: a missing peer, a known limit, a wrong result."""


@dataclass(frozen=True)
class Case:
    """One line: what is measured, and how.

    Args:
        benchmark: scan, windows, ttft, decode or training.
        method: LinMU, a peer, or the teacher.
        size: of the heads or of the model.
        passes: what one call does: "forward", "batch 1", "stage ii" ...
        length: tokens.
        measure: does it; returns the line's values, `seconds` among them.
        priority: lower is measured first.
        growth: power of the length that the time grows with at most; foretells what does not fit the budget.
        once_from: seconds from which on a call is run once only.
    """

    benchmark: str
    method: str
    size: str
    passes: str
    length: int
    measure: Callable[[], dict[str, Any]]
    priority: int = 0
    growth: float = 1.0
    once_from: float = math.inf

    @property
    def series(self) -> tuple[str, str, str, str]:
        """What all lengths of one curve have in common."""
        return (self.benchmark, self.method, self.size, self.passes)

    def key(self) -> dict[str, Any]:
        """The line's own names."""
        return dict(zip(("benchmark", "method", "size", "passes"), self.series, strict=True)) | {
            "length": self.length
        }


def values_of(timing: Timing, **more: Any) -> dict[str, Any]:
    """A line's values from a timing."""
    return {
        "seconds": timing.seconds,
        "low": timing.low,
        "high": timing.high,
        "spread": timing.spread,
        "runs": timing.runs,
        "memory": timing.memory,
    } | more


def measure_all(
    cases: Iterable[Case],
    keep: Callable[[dict[str, Any]], None],
    budget: float | None = None,
    prepare: Callable[[Case], None] = lambda case: None,
) -> None:
    """Measure cases in the order of their priority, shorter prompts first.

    Args:
        cases: all that was asked for.
        keep: takes each line as soon as it is there.
        budget: seconds; None = as long as it takes.
        prepare: is told of each case that will be measured.
    """
    start = time.perf_counter()
    before: dict[tuple, dict[str, Any]] = {}
    fault = None
    for case in sorted(cases, key=lambda case: (case.priority, case.length)):
        left = None if budget is None else budget - (time.perf_counter() - start)
        reason = fault or reason_to_skip(case, before.get(case.series), left)
        if reason is None:
            prepare(case)
        line = case.key() | ({"status": reason} if reason else attempt(case, left))
        before[case.series] = line
        if fault is None and line["status"].startswith(FAULT):
            fault = f"not reached: {case.method} at {case.length} tokens has broken this process's GPU"
        print(f"{time.perf_counter() - start:6.0f} s  {in_short(line)}", file=sys.stderr, flush=True)
        keep(line)


def reason_to_skip(case: Case, before: dict[str, Any] | None, left: float | None) -> str | None:
    """Why not even to try: no time, or a shorter prompt has failed already."""
    if left is not None and left <= 0:
        return "not reached: the budget was spent"
    if before is None:
        return None
    if "seconds" not in before:
        if before["status"].startswith(("out of memory", "not tried")) and case.length > before["length"]:
            return "not tried: " + before["status"].removeprefix("not tried: ")
        return None
    foretold = before["seconds"] * (case.length / before["length"]) ** case.growth
    foretold *= RUNS if foretold < case.once_from else 1
    if left is not None and foretold > left:
        return f"left out: about {foretold:.0f} s foretold, {left:.0f} s of the budget left"
    return None


def attempt(case: Case, left: float | None = None) -> dict[str, Any]:
    """The values of one line, or what went wrong, after `left` seconds at the latest."""
    try:
        with at_most(left):
            return {"status": OK} | case.measure()
    except OutOfTimeError:
        return {"status": "cut off: the budget ended within it"}
    except LeftOutError as reason:
        return {"status": str(reason)}
    except (torch.OutOfMemoryError, MemoryError):
        return {"status": f"out of memory at {case.length} tokens"}
    except Exception as error:  # a line must not end the run, whatever a peer or a kernel raises
        return {"status": f"failed: {type(error).__name__}: {first_line(error)}"}
    finally:
        clear_memory()


@contextmanager
def at_most(left: float | None) -> Iterator[None]:
    """Raise OutOfTimeError within when that many seconds have passed."""
    if left is None:
        yield
        return

    def stop(*_: Any) -> None:
        raise OutOfTimeError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, left)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def clear_memory() -> None:
    """Give back the GPU's memory that no one holds any more."""
    if torch.cuda.is_available():
        gc.collect()
        with suppress(RuntimeError):  # of a kernel that failed: its line tells
            torch.cuda.empty_cache()


def first_line(error: BaseException) -> str:
    """The first line of a message, shortened."""
    lines = str(error).strip().splitlines() or [""]
    return lines[0][:160]


def in_short(line: dict[str, Any]) -> str:
    """A line for stderr."""
    name = " · ".join(str(line[part]) for part in ("benchmark", "size", "passes", "length", "method"))
    if "seconds" not in line:
        return f"{name}: {line['status']}"
    return f"{name}: {line['seconds'] * 1e3:.3g} ms ± {line['spread']:.0%}"
