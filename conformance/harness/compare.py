"""One comparison for all tests: how far a result may be from the truth, and what to say when it is further.

    error(got, truth) <= max(2 · error(reference, truth), floor · size of the truth, floor / 1000)

Three words: `got` is what the backend under test gives; `reference` is what linmu.reference gives for the
same inputs in the same dtypes; `truth` is what it gives for them in float64. The size of the truth is that
of what is summed where a test says so: a sum over tokens that cancels resolves less than its terms do. The
last part is absolute, for truths of exactly 0: tests draw numbers of size 1. Both the root mean square of the
error and its maximum are bounded, so that neither a small error everywhere nor one wrong row can hide. The
mean of few numbers scatters: of n of them, the floor of the first is 1 + 3/√n times as high, for a single one
that of the maximum.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

# Root mean square of the error over that of the truth; maximum over maximum may be four times as much.
FLOORS = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}
MAXIMUM_OVER_RMS = 4.0
ABSOLUTE = 1e-3  # of the floor, whatever the size of the truth
READABLE = 2400  # characters of a case in a message
PER_TOKEN = {"x", "dt", "B", "C", "gate", "u", "q", "k", "v", "student", "teacher", "hidden_states"}

Results = Mapping[str, Tensor]


def assert_matches(
    got: Results, truth: Results, reference: Results, case: Any, sizes: Callable[[], Results] | None = None
) -> None:
    """Each tensor of `got` equals `truth` about as well as that of `reference` does.

    Args:
        got: results of the backend under test by name, as `evaluate` returns them.
        truth: results of the reference on the same inputs in float64.
        reference: results of the reference on the same inputs in their own dtypes.
        case: what was run; its repr goes into the message.
        sizes: what `cancellation.sizes_of_sums` says of this case; asked if an error is large.
    Raises:
        AssertionError: naming shape, dtype, or the worst element, the case and a command that reproduces it.
    """
    assert set(got) == set(truth), report(f"results must be {sorted(truth)}, got {sorted(got)}", case)
    precision = coarsest(reference, case)
    for name, tensor in got.items():
        check_form(name, tensor, reference[name], case)
        bounds = {"floor": FLOORS[precision], "reference": reference[name]}
        check = partial(check_errors, name, tensor, truth[name], case, **bounds)
        check_sized(check, name, sizes)


def assert_same(
    got: Results,
    want: Results,
    case: Any,
    factor: float = 1.0,
    sizes: Callable[[], Results] | None = None,
    source: str = "",
) -> None:
    """Two results of one backend that must agree up to rounding, in shape and dtype exactly.

    `sizes` is as in `assert_matches`; `source` says in the message where `want` comes from.
    """
    assert set(got) == set(want), report(f"results must be {sorted(want)}, got {sorted(got)}", case)
    floor = factor * FLOORS[coarsest(want, case)]
    for name, tensor in got.items():
        check_form(name, tensor, want[name], case)
        check = partial(check_errors, name, tensor, want[name], case, floor=floor, source=source)
        check_sized(check, name, sizes)


def check_sized(check: Callable, name: str, sizes: Callable[[], Results] | None) -> None:
    """Run a `check_errors`; if it fails, again with the size of what is summed, if there is one."""
    try:
        check()
    except AssertionError:
        may_cancel = name.startswith("grad ") or name == "loss"
        size = sizes().get(name) if sizes is not None and may_cancel else None
        if size is None:
            raise
        check(size=size)


def assert_close(got: Results, want: Results, case: Any, tolerance: float) -> None:
    """Two float64 results agree to `tolerance`, relative to the size of `want`: for second formulations."""
    assert set(got) == set(want), report(f"results must be {sorted(want)}, got {sorted(got)}", case)
    for name, tensor in got.items():
        check_form(name, tensor, want[name], case)
        check_errors(name, tensor, want[name], case, floor=tolerance, maximum_over_rms=1.0)


def assert_exact(got: Tensor, want: Tensor, case: Any, what: str) -> None:
    """Equal bit by bit: integers, identities and zeros."""
    check_form(what, got, want, case, finite=False)
    wrong = (got != want).nonzero()
    if len(wrong):
        index = tuple(wrong[0].tolist())
        line = f"{what}: must be equal, at {index} got {got[index].item()!r}, expected {want[index].item()!r}"
        raise AssertionError(report(line, case))


def assert_zero(got: Tensor, case: Any, what: str) -> None:
    """Zero, bit by bit."""
    assert_exact(got, torch.zeros_like(got), case, what)


def assert_negligible(got: Tensor, beside: Tensor, case: Any, what: str) -> None:
    """Zero, but for what rounding leaves where a right backend subtracts two equal sums.

    Args:
        got: what must be zero.
        beside: numbers of the same kind that need not, whose size counts if it is above 1.
        case: as of `assert_matches`.
        what: says what `got` is.
    """
    size = max(1.0, maximum(beside.detach().double()) if beside.numel() else 0.0)
    bound = 10 * ABSOLUTE * FLOORS[got.dtype] * size
    found = got.detach().double().abs()
    if found.numel() and not maximum(found) <= bound:
        index = tuple(int(i) for i in torch.unravel_index(found.argmax(), found.shape))
        raise AssertionError(
            report(f"{what}: must be 0 within {bound:.1e}, at {index} got {got[index].item()!r}", case)
        )


def check_form(name: str, got: Tensor, want: Tensor, case: Any, finite: bool = True) -> None:
    """Shape, dtype and finiteness."""
    shapes, kinds = (tuple(got.shape), tuple(want.shape)), (got.dtype, want.dtype)
    assert shapes[0] == shapes[1], report(f"{name}: shape must be {shapes[1]}, got {shapes[0]}", case)
    assert kinds[0] == kinds[1], report(f"{name}: dtype must be {kinds[1]}, got {kinds[0]}", case)
    broken = (~torch.isfinite(got)).nonzero() if finite and got.is_floating_point() else ()
    if len(broken):
        index = tuple(broken[0].tolist())
        raise AssertionError(report(f"{name}: must be finite, got {got[index].item()} at {index}", case))


def check_errors(
    name: str,
    got: Tensor,
    truth: Tensor,
    case: Any,
    *,
    floor: float,
    reference: Tensor | None = None,
    size: Tensor | None = None,
    maximum_over_rms: float = MAXIMUM_OVER_RMS,
    source: str = "",
) -> None:
    """Root mean square and maximum of the error against their bounds."""
    if got.numel() == 0:
        return
    got, truth = got.detach().double().cpu(), truth.detach().double().cpu()
    error = got - truth
    rounding = torch.zeros_like(truth) if reference is None else reference.detach().double().cpu() - truth
    size = truth if size is None else torch.maximum(truth.abs(), size.double().cpu())
    of_few = min(1 + 3 / got.numel() ** 0.5, maximum_over_rms)
    for kind, measure, share in (("RMS", rms, of_few), ("maximum", maximum, maximum_over_rms)):
        bound = max(2 * measure(rounding), share * floor * measure(size), ABSOLUTE * floor)
        found = measure(error)
        if not found <= bound:
            index = tuple(int(i) for i in torch.unravel_index(error.abs().argmax(), error.shape))
            values = f"worst at {index}: got {got[index].item()!r}, expected {truth[index].item()!r}"
            line = (
                f"{name}: {kind} error {found:.3e} exceeds {bound:.3e} (size {measure(size):.3e}); {values}"
            )
            raise AssertionError(report(f"{line}; expected = {source}" if source else line, case))


def rms(tensor: Tensor) -> float:
    return tensor.square().mean().sqrt().item()


def maximum(tensor: Tensor) -> float:
    return tensor.abs().max().item()


def coarsest(results: Results, case: Any) -> torch.dtype:
    """The least precise dtype among results and inputs: what the result can be expected to resolve."""
    kinds = {tensor.dtype for tensor in results.values()} & FLOORS.keys()
    named = {"bfloat16": torch.bfloat16, "mixed": torch.bfloat16, "float16": torch.float16}
    return max(kinds | {named.get(getattr(case, "dtype", ""), torch.float64)}, key=FLOORS.__getitem__)


def evaluate(
    function: Callable,
    inputs: Mapping[str, Any],
    gradients: bool = False,
    seed: int = 0,
    draw: int | None = None,
    names: Sequence[str] = ("y", "final_state"),
    of: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """Call `function(**inputs)`; its results by name and, if asked, "grad NAME" of every float input.

    The cotangents are random quarters, exact in every dtype, so that all dtypes answer the same question. An
    input that takes no part has gradient zero, whether autograd says None or zeros. With `draw`, which
    numbers random signs, each token of the results has one. Gradients are those of the results `of`, of all
    if None. The inputs are handed over as they are, strides and memory included.
    """
    floats = {name: value for name, value in inputs.items() if is_float(value)}
    leaves = {name: value.detach().requires_grad_(gradients) for name, value in floats.items()}
    outputs = function(**{**inputs, **leaves})
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    results = dict(zip(names[: len(outputs)], outputs, strict=True))
    if not gradients:
        return results
    asked = {
        output: cotangent(output, seed + i, draw)
        for i, (name, output) in enumerate(results.items())
        if output.requires_grad and (of is None or name in of)
    }
    found = [None] * len(leaves)
    if asked:
        found = torch.autograd.grad(
            list(asked), list(leaves.values()), list(asked.values()), allow_unused=True
        )
    for (name, leaf), gradient in zip(leaves.items(), found, strict=True):
        results[f"grad {name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return {name: tensor.detach() for name, tensor in results.items()}


def quarters(like: Tensor, seed: int) -> Tensor:
    """Random multiples of 1/4 between -2 and 2, none of them 0, in shape and dtype of `like`."""
    generator = torch.Generator().manual_seed(seed)
    steps, signs = (
        torch.randint(low, high, like.shape, generator=generator) for low, high in ((1, 9), (0, 2))
    )
    return (steps * (2 * signs - 1) / 4).to(like)


def cotangent(like: Tensor, seed: int, draw: int | None = None) -> Tensor:
    """`quarters`; with `draw`, each token, (B, L), has a random sign."""
    if draw is None:
        return quarters(like, seed)
    generator = torch.Generator().manual_seed(draw * 97 + seed)
    shape = (*like.shape[:2], *(1,) * (like.ndim - 2))
    signs = 2 * torch.randint(0, 2, shape, generator=generator) - 1
    return quarters(like, seed) * signs.to(like)


def is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def in_float64(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The same inputs, float tensors widened to float64."""
    return {name: value.double() if is_float(value) else value for name, value in inputs.items()}


def report(line: str, case: Any) -> str:
    """The finding, the case, and a command that runs this case alone, where it is known which test runs."""
    command = f"\n  reproduce: {reproduction(RUNNING[-1], case)}" if RUNNING else ""
    return f"{line}\n  case: {shortened(repr(case))}{command}"


def shortened(text: str) -> str:
    """A text without its middle where it is too long to read: a layout of hundreds of images."""
    return text if len(text) <= READABLE else f"{text[: READABLE // 2]} ... {text[-READABLE // 2 :]}"


@dataclass(frozen=True)
class RunningTest:
    """The test that runs: its module below `linmu.conformance`, its name, its parameters, its backend.

    Its arguments are known if a call can give them all: each with its place in the table of parameters, or
    with its name there.
    """

    module: str
    name: str
    parameters: str
    backend: str
    drawn: bool
    arguments: Mapping[str, tuple[Any, int | str]] | None = None


RUNNING: list[RunningTest] = []  # conftest.py puts it there


def as_drawn(case: Any) -> Any:
    """The case that a changed or rounded one was made from: the test makes it from that again."""
    return as_drawn(case.case) if hasattr(case, "case") else case


def reproduction(test: RunningTest, case: Any) -> str:
    """The check of the running test on this case; without drawn cases, the whole test, called or run."""
    sources = ("backends", "layouts", "module_cases", "operator_cases", "sliding_window_cases", "compare")
    modules = [*(f"harness.{source}" for source in sources), test.module]
    names = "; ".join(f"from linmu.conformance.{module} import *" for module in modules)
    if test.drawn:
        return shell_quoted(f"{names}; {test.name}.check(load({test.backend!r}), {as_drawn(case)!r})")
    if test.backend and test.arguments is not None:
        given = ", ".join((f"load({test.backend!r})", *written(test)))
        return shell_quoted(f"import torch; {names}; {test.name}({given})")
    plugin, name = "-p linmu.conformance.pytest_plugin --pyargs", f"linmu.conformance.{test.module}"
    backend = f" --backend {test.backend}" if test.backend else ""
    return f"{sys.executable} -m pytest {plugin} '{name}::{test.name}{test.parameters}'{backend}"


def written(test: RunningTest) -> list[str]:
    """The arguments of a test as code: each as it is, or all by their rows, where these have names or there
    are tensors."""
    values = {name: repr(value) for name, (value, _) in test.arguments.items()}
    named = any(isinstance(row, str) for _, row in test.arguments.values())
    if not named and not any("tensor(" in value for value in values.values()):
        return [f"{name}={value}" for name, value in values.items()]
    rows = ", ".join(f"{name}={row!r}" for name, (_, row) in test.arguments.items())
    return [f"**rows_of({test.name}, {rows})"]


def rows_of(test: Callable, **rows: int | str) -> dict[str, Any]:
    """The arguments of a test that stand in these rows of its tables, given by place or name."""
    found: dict[str, Any] = {}
    for mark in test.pytestmark:
        if mark.name == "parametrize":
            table = list(table_of(mark))
            wanted = rows[next(iter(table[0][1]))]
            if isinstance(wanted, str):
                (values,) = (values for name, values in table if name == wanted)
            else:
                _, values = table[wanted]
            found |= values
    return found


def table_of(mark: Any) -> Iterator[tuple[str | None, dict[str, Any]]]:
    """Each row of a mark `parametrize`: its name, None = it has none, and its values by argument."""
    names, table = mark.args
    names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    for row in table:
        name = getattr(row, "id", None)
        values = row.values if hasattr(row, "marks") else row if len(names) > 1 else (row,)
        yield name if isinstance(name, str) else None, dict(zip(names, values, strict=True))


def shell_quoted(code: str) -> str:
    """A command line; between double quotes, for reprs hold single ones only."""
    quoted = code.replace('"', '\\"')
    return f'{sys.executable} -c "{quoted}"'
