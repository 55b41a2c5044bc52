"""What only a GPU can show: compiled kernels at real sizes, beyond 65,536 tokens and 2^31 elements; bitwise
determinism, no host synchronisation, one graph.

The rest of the suite runs on the GPU too, as the backend linmu.optimized@cuda.
"""

from __future__ import annotations

import fcntl
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

from linmu import optimized
from linmu.reference.flex_ma import DonatedState

from ...harness.compare import assert_exact, assert_matches, assert_same, evaluate, in_float64, quarters
from .gpu_cases import (
    DTYPES,
    OPERATORS,
    arguments,
    assert_kernels_match,
    block,
    far_apart,
    floats_of,
    kernels,
    left_by_the_norm,
    prompt,
    results,
    results_of_views,
)

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU here: kernels cannot be compiled"
)
EVERY = pytest.mark.parametrize("operator", OPERATORS)
HALF_AND_FULL = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture
def whole_gpu() -> Iterator[None]:
    """One such test at a time, however many processes test: each takes tens of GB."""
    with open(Path(tempfile.gettempdir()) / "linmu-conformance.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            torch.cuda.empty_cache()


@HALF_AND_FULL
@EVERY
@pytest.mark.parametrize("head_dim", [128, 80, 16])
def test_kernels_equal_the_torch_engine_at_real_sizes(operator, head_dim, dtype):
    """Values, states, every gradient, of tiles that tensor cores multiply."""
    given = arguments(operator, dtype, heads=6, groups=2, head_dim=head_dim, length=517)
    assert_kernels_match(operator, given, f"{operator}, {dtype}, N = P = {head_dim}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_norm_of_a_head_takes_off_all_that_a_gradient_has_along_it(dtype):
    """As in test_precision.py."""
    assert left_by_the_norm(dtype, "cuda") < 1e-5


@pytest.mark.parametrize("length", [65_537])
@HALF_AND_FULL
@pytest.mark.parametrize("operator", [name for name in OPERATORS if name not in ("scan_step", "logit_loss")])
def test_no_token_is_lost_beyond_65536(operator, dtype, length, whole_gpu):
    """More tokens than a grid's second axis has programs; the last ones, and gradients through them."""
    given = arguments(operator, dtype, heads=2, groups=1, head_dim=16, length=length)
    assert_kernels_match(operator, given, f"{operator}, {dtype}, L = {length}")


@HALF_AND_FULL
@EVERY
def test_offsets_may_exceed_two_to_the_31(operator, dtype, whole_gpu):
    """Slices of a tensor so large that their last tokens lie beyond 2^31 elements."""
    given = arguments(operator, dtype, heads=4, groups=2, head_dim=16, length=300)
    far = far_apart(operator, given, fill=True)
    assert_same(results_of_views(operator, far), results(operator, given), f"{operator}, {dtype}")


def test_results_may_exceed_two_to_the_31(whole_gpu):
    """Outputs and gradients of more elements than an int32 counts; the tail is that of its own scan."""
    heads, groups, dim, length, tail = 28, 4, 16, 4_800_000, 6_400
    generator = torch.Generator("cuda").manual_seed(0)

    def numbers(*shape, dtype=torch.bfloat16):
        return torch.randn(shape, generator=generator, device="cuda", dtype=dtype)

    given = {"x": numbers(1, length, groups, dim), "B": numbers(1, length, groups, dim)}
    given |= {"C": numbers(1, length, heads, dim), "dt": numbers(1, length, heads).sigmoid_().float()}
    given |= {"gate": numbers(1, length, heads).sigmoid_().float(), "A": -torch.rand(heads, device="cuda")}
    place = torch.arange(length, device="cuda")
    given["segment"] = torch.where(place % 1600 < 1000, place // 1600, -1)[None]
    assert length * heads * dim > 2**31
    per_token = ("x", "B", "C", "dt", "gate")
    first = {k: v[:, : length - tail] if k != "A" else v for k, v in given.items()}
    with torch.no_grad():
        state = kernels("bidirectional_scan")(**first)[1]
    last = {k: v[:, length - tail :].clone() if k != "A" else v for k, v in given.items()}
    wanted = evaluate(kernels("bidirectional_scan"), last | {"initial_state": state}, gradients=True)
    leaves = {name: given[name].requires_grad_() for name in per_token}
    y, final = kernels("bidirectional_scan")(**given)
    asked = torch.zeros_like(y)
    asked[:, length - tail :] = quarters(wanted["y"], 0)
    grads = torch.autograd.grad([y, final], list(leaves.values()), [asked, quarters(final, 1)])
    found = {"y": y[:, length - tail :], "final_state": final}
    found |= {f"grad {k}": g[:, length - tail :] for k, g in zip(leaves, grads, strict=True)}
    wanted = {name: wanted[name] for name in found}
    assert_same({k: v.detach() for k, v in found.items()}, wanted, "the last tokens of 4.8 million")


def test_a_gradient_of_logits_may_exceed_two_to_the_31(whole_gpu):
    """(B, L, V) of a real vocabulary; the last tokens' gradient is what they alone get."""
    length, size, tail = 14_300, 151_936, 5
    generator = torch.Generator("cuda").manual_seed(0)
    student, teacher = (
        torch.randn(1, length, size, generator=generator, device="cuda", dtype=torch.bfloat16) for _ in "st"
    )
    assert student.numel() > 2**31
    ends = [logits[:, -tail:].clone() for logits in (student, teacher)]
    (grad,) = torch.autograd.grad(optimized.logit_loss(student.requires_grad_(), teacher) * length, student)
    (small,) = torch.autograd.grad(optimized.logit_loss(ends[0].requires_grad_(), ends[1]) * tail, ends[0])
    assert_same({"gradient": grad[:, -tail:]}, {"gradient": small}, "14,300 tokens, V = 151,936")


@HALF_AND_FULL
@EVERY
def test_runs_repeat_bit_for_bit(operator, dtype):
    """No float is added atomically: values and gradients of two runs are equal."""
    given = arguments(operator, dtype, heads=8, groups=2, head_dim=64, length=1_500)
    first = results(operator, given)
    for name, result in results(operator, given).items():
        assert_exact(result, first[name], f"{operator}, {dtype}", name)


@EVERY
def test_operators_never_wait_for_the_device(operator):
    """Forward and backward are queued without asking the GPU for a value."""
    given = arguments(operator, "bfloat16", heads=4, groups=2, head_dim=64, length=300)
    floats = {name: value.requires_grad_() for name, value in floats_of(given).items() if name != "teacher"}
    outputs = kernels(operator)(**given)
    asked = [torch.ones_like(out) for out in (outputs if isinstance(outputs, tuple) else (outputs,))]
    torch.autograd.grad(outputs, list(floats.values()), asked)  # everything is compiled now
    with no_waiting():
        torch.autograd.grad(kernels(operator)(**given), list(floats.values()), asked)


@pytest.mark.parametrize("options", [{}, {"scan_rope": True, "output_gate": True, "qk_norm": True}])
def test_a_block_never_waits_for_the_device(options):
    """A whole M-MATE block, forward and backward, over a layout that an earlier layer has used."""
    run = block(torch.bfloat16, **options)
    u = torch.randn(2, 300, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    run(u).sum().backward()
    with no_waiting():
        run(u).sum().backward()


def test_a_layout_waits_for_the_device_once():
    """Orders, windows and their plans are queued: only the check of the coordinates has asked."""
    coords = prompt(300).coords.cuda()
    optimized.VisionLayout(coords)  # loads the kernels of torch
    layout = optimized.VisionLayout(coords)
    for layer in range(4):
        with no_waiting():
            layout.order(layer), layout.window_plan((2, 3, 3), layer)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3, 7])
def test_a_step_never_waits_and_replays_from_a_graph(batch):
    """Outputs and states of three steps in a CUDA graph, the state overwritten, are those of eager ones."""
    config = optimized.LinMUConfig(width=256, heads=8, groups=2, head_dim=64, qkv_bias=True, output_gate=True)
    torch.manual_seed(0)
    module = optimized.FlexMA(config, 0).to("cuda")
    for name, parameter in module.named_parameters():
        if any(part in name for part in ("q_", "k_", "v_", "o_", "z_")):
            parameter.data = parameter.data.bfloat16()
    u = torch.randn(batch, 4, 256, device="cuda", dtype=torch.bfloat16)
    _, start = module(u[:, :1])

    def steps(scan):
        outputs, state = [], DonatedState(start.conv, scan)
        for t in range(1, 4):
            y, state = module(u[:, t : t + 1], state=DonatedState(*state))
            outputs.append(y)
        return torch.cat(outputs, dim=1), state

    wanted, last = steps(start.scan.clone())
    with no_waiting():
        steps(start.scan.clone())
    scan = start.scan.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found, state = steps(scan)
    scan.copy_(start.scan)
    graph.replay()
    assert state.scan is scan
    assert_exact(found, wanted, batch, "outputs")
    for name, got, want in zip(state._fields, state, last, strict=True):
        assert_exact(got, want, batch, name)


@pytest.fixture(autouse=True)
def synchronisation_allowed() -> Iterator[None]:
    yield
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("default")


class no_waiting:  # noqa: N801  reads as a statement
    """An error for whatever makes the host wait for the GPU."""

    def __enter__(self) -> None:
        torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *_) -> None:
        torch.cuda.set_sync_debug_mode("default")


@EVERY
def test_operators_compile_into_one_graph(operator):
    """torch.compile(fullgraph=True), inductor: the results of eager, gradients included."""
    given = arguments(operator, "float32", heads=4, groups=2, head_dim=16, length=233)
    compiled = torch.compile(getattr(optimized, operator), fullgraph=True)
    found, wanted = evaluate(compiled, given, gradients=True), results(operator, given)
    assert_same(found, wanted, f"{operator}, compiled")


def test_a_block_compiles_into_one_graph():
    """The same of an M-MATE block with a layout that is there already."""
    run = block(torch.float32)
    u = {"hidden_states": torch.randn(2, 300, 256, device="cuda")}
    wanted = evaluate(run, u, gradients=True)
    found = evaluate(torch.compile(run, fullgraph=True), u, gradients=True)
    assert_same(found, wanted, "an M-MATE block, compiled")


TILES = [
    ("scan.kernels.tiles.CHUNKS", {torch.bfloat16: 32, torch.float32: 32}),
    ("scan.kernels.tiles.CHUNKS", {torch.bfloat16: 16, torch.float32: 64}),
    ("scan.kernels.tiles.GRADIENT_CHUNKS", {torch.bfloat16: 32, torch.float32: 32}),
    ("scan.kernels.tiles.STEPS", dict.fromkeys((torch.bfloat16, torch.float32), 16)),
    ("scan.kernels.states.BLOCKS", dict.fromkeys((torch.bfloat16, torch.float32), 16)),
    ("scan.kernels.states.RUN", 3),
    ("scan.kernels.states.RUN", 64),
    ("scan.kernels.states.ENOUGH", 1),
    ("scan.kernels.states.ENOUGH", 10**9),
    ("scan.kernels.states.NARROWEST", 64),
    ("scan.kernels.output.LARGEST_HELD", 16),
    ("causal_conv.kernels.ROWS", 8),
    ("causal_conv.kernels.COLUMNS", 128),
    ("losses.kernels.BLOCK", 256),
    ("layout.plan.BLOCK", 64),
    *[
        (table, sizes)
        for table in (
            "window_attention.kernels.FORWARD",
            "window_attention.kernels_backward.QUERY_GRADIENT",
            "window_attention.kernels_backward.KEY_GRADIENT",
        )
        for sizes in ((16, 32, 4, 2), (32, 16, 4, 1))
    ],
    ("window_attention.kernels_backward.QUERY_HELD", (32, 256, 8, 1)),
    ("window_attention.kernels_backward.KEY_HELD", (64, 32, 4, 2)),
]


@pytest.mark.parametrize(("name", "value"), TILES, ids=[f"{name}={value}" for name, value in TILES])
@HALF_AND_FULL
def test_tiles_do_not_change_the_results(dtype, name, value):
    """Chunks, runs and blocks of other sizes, within the bounds of the truth."""
    operators = {"scan": "bidirectional_scan", "losses": "logit_loss", "layout": "window_attention"}
    operator = operators.get(name.split(".")[0], name.split(".")[0])
    given = arguments(operator, dtype, heads=4, groups=2, head_dim=32, length=700)
    truth, own = results(operator, in_float64(given), "torch"), results(operator, given, "torch")
    if operator == "window_attention" and isinstance(value, tuple):
        from linmu.optimized.window_attention.tiles import Tiles

        kinds = (torch.bfloat16, torch.float16, torch.float32)
        value = dict.fromkeys(kinds[:2] if name.endswith("HELD") else kinds, Tiles(*value))
    with mock.patch(f"linmu.optimized.{name}", value):
        found = results(operator, given)
    assert_matches(found, truth, own, f"{operator}, {dtype}, {name} = {value}")


@EVERY
def test_expanded_gradients_are_read_by_their_strides(operator):
    """What .sum() and a permuted loss send back has strides 0, or the last axis not last in memory."""
    given = arguments(operator, "float32", heads=4, groups=2, head_dim=16, length=233)
    floats = {name: value.requires_grad_() for name, value in floats_of(given).items() if name != "teacher"}
    outputs = kernels(operator)(**given)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)

    def gradients(cotangents):
        return torch.autograd.grad(outputs, list(floats.values()), cotangents, retain_graph=True)

    for odd in (lambda out: out.new_ones(()).expand_as(out), lambda out: turned(quarters(out, 0))):
        cotangents = [odd(output) for output in outputs]
        found, wanted = gradients(cotangents), gradients([each.contiguous() for each in cotangents])
        assert_same(dict(zip(floats, found, strict=True)), dict(zip(floats, wanted, strict=True)), operator)


def turned(tensor):
    """The same values, first axis last in memory."""
    backwards = tuple(range(tensor.ndim))[::-1]
    return tensor.permute(backwards).contiguous().permute(backwards)
