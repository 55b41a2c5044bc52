"""Cases of the sizes that people run, and a truth for them that does not walk token by token.

The truth is a second formulation in float64, in chunks where it would need L × L numbers; meta tests hold it
against the reference. It is computed once a case.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from linmu import reference

from . import second_formulation, second_sliding_window
from .cancellation import is_summed, sizes_in_attention, sizes_in_divergence, sizes_of_sums
from .compare import Results, assert_matches, evaluate, in_float64, is_float
from .layouts import Layout, Pad, Text, Vision
from .operator_cases import (
    BidirectionalCase,
    Case,
    ConvCase,
    HiddenLossCase,
    LogitLossCase,
    ScanCase,
    StepCase,
    WindowCase,
    run,
)
from .sliding_window_cases import SlidingWindowCase
from .strides import cut_from_wider_rows

CHUNK = 128
SMALL = 2**14  # elements of the largest argument
LOOPED = 20_000  # tokens in a row; the reference would walk along more for half a minute


def selective_scan(
    x, dt, A, B, C, *, mask=None, initial_state=None, reverse=False, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """The scan as one matrix a chunk, the state handed over."""
    state, outputs = initial_state, []
    starts = range(0, x.shape[1], chunk)
    for start in reversed(starts) if reverse else starts:
        now = slice(start, start + chunk)
        part = {"mask": None if mask is None else mask[:, now], "initial_state": state, "reverse": reverse}
        y, state = second_formulation.selective_scan(x[:, now], dt[:, now], A, B[:, now], C[:, now], **part)
        outputs.append(y)
    return torch.cat(outputs[::-1] if reverse else outputs, dim=1), state


def bidirectional_scan(
    x, dt, A, B, C, *, gate, segment=None, valid=None, D=None, initial_state=None, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """A forward scan over the valid tokens and a masked reverse scan over the span of each segment."""
    heads = C.shape[2]
    valid = torch.ones(x.shape[:2], dtype=torch.bool) if valid is None else valid
    y, state = selective_scan(x, dt, A, B, C, mask=valid, initial_state=initial_state, chunk=chunk)
    if segment is not None:
        vision = (segment >= 0) & valid
        rows = []
        for row in range(x.shape[0]):
            reverse = torch.zeros_like(y[row : row + 1])
            for number in segment[row][vision[row]].unique():
                own = vision[row] & (segment[row] == number)
                places = own.nonzero().squeeze(-1)
                span = slice(int(places[0]), int(places[-1]) + 1)
                part = [tensor[row : row + 1, span] for tensor in (x, dt, B, C)]
                of_span, _ = selective_scan(
                    part[0], part[1], A, part[2], part[3], mask=own[None, span], reverse=True, chunk=chunk
                )
                reverse = reverse.clone()
                reverse[:, span] += of_span
            rows.append(reverse)
        share = torch.where(vision[..., None], gate, torch.ones_like(gate))[..., None]
        y = share * y + (1 - share) * torch.cat(rows)
    if D is not None:
        y = y + D[:, None] * second_formulation.heads_of(x, heads) * valid[..., None, None]
    return y, state


FORMULATIONS: dict[str, Callable] = {
    "selective_scan": selective_scan,
    "bidirectional_scan": bidirectional_scan,
    "scan_step": reference.scan_step,
    "window_attention": second_formulation.window_attention,
    "sliding_window_attention": second_sliding_window.sliding_window_attention,
    "causal_conv": second_formulation.causal_conv,
    "hidden_loss": reference.hidden_loss,
    "logit_loss": reference.logit_loss,
}


@lru_cache(maxsize=16)
def inputs_of(case: Case) -> dict[str, Any]:
    """The arguments, drawn once, for what leaves them as they are."""
    return case.inputs()


@cache
def truth_of(case: Case, of: tuple[str, ...] | None = None, draw: int | None = None) -> Results:
    """Results and gradients of the second formulation in float64."""
    wide = in_float64(inputs_of(case))
    formulation = case.flat(FORMULATIONS[case.operator])
    return evaluate(formulation, wide, gradients=True, draw=draw, names=case.results, of=of)


def rounded(case: Case, truth: Results) -> Results:
    """The truth in the dtypes that results must have."""
    given = inputs_of(case)
    tokens = given["x" if "x" in given else "q" if "q" in given else "u" if "u" in given else "student"]
    wide = torch.float64 if tokens.dtype == torch.float64 else torch.float32
    found = {}
    for name, tensor in truth.items():
        if name.startswith("grad "):
            dtype = given[name.removeprefix("grad ")].dtype
        else:
            dtype = wide if name in ("final_state", "state", "loss") else tokens.dtype
            dtype = torch.bool if tensor.dtype == torch.bool else dtype
        found[name] = tensor.to(dtype)
    return found


def check_large(backend: Any, case: Case) -> None:
    """Values, and gradients of all results and of the first alone, against the second formulation; of the
    smaller ones also with gaps between the rows of the arguments in memory."""
    own = getattr(backend, case.operator) is getattr(reference, case.operator)  # autograd has one way back
    loops = case.operator in ("selective_scan", "bidirectional_scan", "causal_conv")
    if own and loops and case.shape[1] > LOOPED:
        pytest.skip("the reference is a loop over tokens, in which nothing begins at a size")
    for of in (None, case.results[:1]) if len(case.results) > 1 and not own else (None,):
        truth = truth_of(case, of)
        found = run(backend, case, gradients=True, of=of)
        assert_matches(found, truth, rounded(case, truth), case, partial(sizes_of_terms, case, of))
        if (
            of is None
            and not own
            and max(t.numel() for t in inputs_of(case).values() if is_float(t)) <= SMALL
        ):
            strided = case.changed(**{k: cut_from_wider_rows(v) for k, v in inputs_of(case).items()})
            found = run(backend, strided, gradients=True)
            assert_matches(found, truth, rounded(case, truth), case, partial(sizes_of_terms, case, of))


@cache
def sizes_of_terms(case: Case, of: tuple[str, ...] | None = None) -> Results:
    """As `operator_checks.sizes_of_gradients`, of the second formulation."""
    formulas = {"window_attention": sizes_in_attention, "logit_loss": sizes_in_divergence}
    formulas["sliding_window_attention"] = second_sliding_window.sizes_in_window
    sizes = {}
    if any(is_summed(f"grad {name}") for name in inputs_of(case)):
        sizes = sizes_of_sums(lambda draw: truth_of.__wrapped__(case, of, draw))
    if case.operator in formulas:
        sizes |= formulas[case.operator](**in_float64(inputs_of(case)))
    return sizes


def scan(
    length: int, heads: int, groups: int, state: int, head_dim: int, batch: int = 1, **fixed
) -> ScanCase:
    """A scan of this size, with an initial state."""
    rest = {"mask": "none", "initial_state": True, "reverse": False, "dtype": "float32", "seed": length}
    return ScanCase(batch, length, heads, groups, state, head_dim, **{**rest, **fixed})


def both(rows: tuple, heads: int, groups: int, state: int, head_dim: int, **fixed) -> BidirectionalCase:
    """Both directions over these rows, with an initial state and a skip."""
    rest = {"initial_state": True, "skip": True, "dtype": "float32", "seed": state}
    return BidirectionalCase(Layout(rows), heads, groups, state, head_dim, **{**rest, **fixed})


def windows(
    length: int, heads: int, groups: int, size: int | tuple[int, int], count: int, batch: int = 1, **fixed
) -> WindowCase:
    """Attention in `count` windows, with heads of `size` numbers: N in q and k, P in v, or both."""
    rest = {"scale": None, "dtype": "float32", "seed": length}
    state, head_dim = size if isinstance(size, tuple) else (size, size)
    return WindowCase(batch, length, heads, groups, state, head_dim, count, **{**rest, **fixed})


def sliding(
    length: int, heads: int, groups: int, size: int | tuple[int, int], window: int, batch: int = 1, **fixed
) -> SlidingWindowCase:
    """Attention in a sliding window, behind a state, with heads of `size` numbers, as in `windows`."""
    rest = {"asks": "none", "valid": "none", "packed": False, "initial_state": True, "scale": None}
    rest |= {"dtype": "float32", "seed": length}
    state, head_dim = size if isinstance(size, tuple) else (size, size)
    return SlidingWindowCase(batch, length, heads, groups, state, head_dim, window, **{**rest, **fixed})


def rising(case: Case, step: float) -> Case:
    """The same with scores that rise by `step` from key to key, exactly so: whoever subtracts a maximum of
    the first ones alone overflows.
    """
    given = case.inputs()
    q, k = torch.zeros_like(given["q"]), torch.zeros_like(given["k"])
    q[..., 0] = 1
    k[..., 0] = step * torch.arange(k.shape[1])[:, None]
    return case.changed(q=q, k=k, scale=1.0)


def without(case: Case, mask: str, start: int, end: int) -> Case:
    """The same with a mask of this name that leaves out the tokens from `start` to `end` of each row."""
    there = torch.ones(case.batch, case.length, dtype=torch.bool)
    there[:, start:end] = False
    return case.changed(**{mask: there})


MODEL_PROMPT = (
    (Text(9), Vision(1, (1, 4, 6), "row"), Text(2), Vision(0, (2, 3, 4), "frame"), Text(11)),
    (Pad(20), Vision(0, (1, 5, 5)), Vision(1, (1, 3, 4)), Text(17)),
)
LONG_IMAGE = ((Text(40), Vision(0, (1, 26, 27)), Text(29), Vision(1, (3, 10, 12), "frame"), Pad(130)),)
LONG_TEXT = ((Vision(0, (1, 3, 5)), Text(3800), Vision(1, (1, 9, 30), "row"), Text(70)),)
VERY_LONG_TEXT = ((Vision(0, (1, 3, 5)), Text(33_000), Vision(1, (1, 2, 3))),)
WIDE_GAP = ((Text(9), Vision(0, (1, 2, 3)), Pad(2300), Vision(1, (1, 2, 2)), Text(3)),)

PADDED = ((Pad(300), Text(9), Vision(0, (1, 6, 7)), Text(3)),)
WHOLE_CHUNKS = ((Text(64), Vision(1, (1, 16, 16)), Text(64), Vision(0, (2, 8, 8))),)

# Between the small ones that are drawn and the large ones below: kernels pad them to a power of two.
HEAD_DIMS = (20, 24, 32, 40, 48, 64, 72, 80, 96, 112, 120)


def of_head_dims(make: Callable[..., Case]) -> dict[str, Case]:
    """A few tokens with each of these head dims, in float32 and bfloat16 in turn."""
    kinds = ("float32", "bfloat16")
    return {f"N=P={n}": make(n, dtype=kinds[i % 2]) for i, n in enumerate(HEAD_DIMS)}


# Around the tiles of kernels: the last one holds a single token, or all of them but one.
AROUND_TILES = (15, 17, 31, 33, 63, 65, 127, 129, 255, 257)


def of_lengths(make: Callable[[int], Case]) -> dict[str, Case]:
    """Rows, or windows, of each of these lengths."""
    return {f"{length} tokens": make(length) for length in AROUND_TILES}


LARGE: dict[str, dict[str, Case]] = {
    "selective_scan": {
        **of_lengths(lambda length: scan(length, 1, 1, 2, 3)),
        **of_head_dims(lambda n, dtype: scan(9, 2, 1, n, n, dtype=dtype)),
        "N=P=128": scan(70, 4, 2, 128, 128, batch=2),
        "N=136 P=144, reverse": scan(33, 2, 1, 136, 144, reverse=True),
        "N=200 P=264": scan(9, 2, 1, 200, 264),
        "N=16 P=144": scan(20, 2, 1, 16, 144),
        "N=192 P=64": scan(20, 2, 1, 192, 64),
        "N=P=128, mixed": scan(40, 4, 1, 128, 128, dtype="mixed", mask="some"),
        "4,133 tokens, slow decay": scan(4133, 2, 1, 3, 5, decay=-1e-3),
        "2,309 tokens, slow decay, reverse, masks": scan(
            2309, 2, 2, 4, 3, batch=2, reverse=True, mask="some", decay=-1e-3
        ),
        "700 tokens, the last 300 masked": scan(700, 2, 1, 4, 4, mask="tail", decay=-1e-3),
        "300 tokens, the first 171 masked": scan(300, 2, 1, 3, 4, mask="head", decay=-1e-3),
        "512 tokens": scan(512, 2, 1, 16, 8),
        "128 tokens": scan(128, 2, 1, 3, 4, batch=2),
        "300 tokens, bfloat16": scan(300, 2, 1, 3, 4, dtype="bfloat16", mask="some", decay=-1e-3),
        "256 tokens, reverse": scan(256, 2, 2, 8, 16, batch=2, reverse=True),
        "300 rows": scan(3, 2, 1, 3, 2, batch=300),
        "28 heads, 7 to a group": scan(9, 28, 4, 3, 2, mask="some"),
        "272 heads, 8 to a group": scan(3, 272, 34, 3, 2, mask="some"),
        "48 heads, 16 to a group": scan(3, 48, 3, 3, 2, mask="some"),
        "66,000 tokens, slow decay": scan(66_000, 1, 1, 1, 2, decay=-1e-4),
        "a gap of 2,300 tokens": without(scan(2320, 2, 1, 3, 2, decay=-1e-3), "mask", 9, 2309),
        "a gap of 2,300 tokens, reverse": without(
            scan(2320, 2, 1, 3, 2, decay=-1e-3, reverse=True), "mask", 9, 2309
        ),
        "66,000 rows of heads": scan(2, 30, 15, 1, 2, batch=2200),
    },
    "bidirectional_scan": {
        **of_lengths(lambda length: both(((Vision(0, (1, 1, length)), Text(2)),), 1, 1, 2, 3)),
        **of_head_dims(lambda n, dtype: both(((Text(3), Vision(0, (1, 2, 2))),), 2, 1, n, n, dtype=dtype)),
        "N=P=128": both(MODEL_PROMPT, 4, 2, 128, 128),
        "N=136 P=144": both((MODEL_PROMPT[0],), 2, 1, 136, 144),
        "N=200 P=264": both(((Text(3), Vision(0, (1, 2, 2))),), 2, 1, 200, 264),
        "N=16 P=144": both(((Text(3), Vision(0, (1, 2, 2))),), 2, 1, 16, 144),
        "N=192 P=64": both(((Text(3), Vision(0, (1, 2, 2))),), 2, 1, 192, 64),
        "N=P=128, mixed": both((MODEL_PROMPT[1],), 4, 1, 128, 128, dtype="mixed"),
        "702 tokens in an image, slow decay": both(LONG_IMAGE, 2, 1, 4, 5, decay=-1e-3),
        "3,800 tokens of text, slow decay": both(LONG_TEXT, 2, 1, 5, 4, decay=-1e-3),
        "300 tokens of padding first": both(PADDED, 2, 1, 3, 4, decay=-1e-3),
        "512 tokens": both(WHOLE_CHUNKS, 2, 1, 8, 16),
        "512 tokens, bfloat16": both(WHOLE_CHUNKS, 2, 1, 3, 4, dtype="bfloat16", decay=-1e-3),
        "300 images": both((tuple(Vision(i, (1, 1, 2)) for i in range(300)),), 2, 1, 2, 3),
        "1,100 images": both((tuple(Vision(i, (1, 1, 1)) for i in range(1100)),), 1, 1, 1, 2),
        "28 heads, 7 to a group": both(((Text(2), Vision(0, (1, 1, 3))),), 28, 4, 3, 2),
        "272 heads, 8 to a group": both(((Text(2), Vision(0, (1, 1, 3))),), 272, 34, 3, 2),
        "48 heads, 16 to a group": both(((Text(2), Vision(0, (1, 1, 3))),), 48, 3, 3, 2),
        "33,000 tokens of text, slow decay": both(VERY_LONG_TEXT, 1, 1, 1, 2, decay=-1e-4),
        "a gap of 2,300 tokens": both(WIDE_GAP, 2, 1, 3, 2, decay=-1e-3),
        "20,164 tokens in an image": both(((Vision(0, (1, 142, 142)),),), 1, 1, 1, 2, decay=-1e-4),
        "300 rows": both(((Text(1), Vision(0, (1, 1, 3))),) * 300, 2, 1, 2, 3),
    },
    "scan_step": {
        **of_head_dims(lambda n, dtype: StepCase(2, 2, 1, n, n, True, True, dtype, n)),
        "N=P=128": StepCase(4, 8, 2, 128, 128, True, True, "float32", 1),
        "N=136 P=144": StepCase(2, 4, 1, 136, 144, True, False, "float32", 2),
        "N=200 P=264": StepCase(2, 2, 1, 200, 264, True, False, "float32", 6),
        "N=16 P=144": StepCase(2, 2, 1, 16, 144, True, False, "float32", 8),
        "N=192 P=64": StepCase(2, 2, 1, 192, 64, True, False, "float32", 9),
        "N=P=128, mixed": StepCase(3, 4, 2, 128, 128, True, True, "mixed", 3),
        "300 rows": StepCase(300, 2, 1, 3, 2, True, True, "float32", 4),
        "28 heads, 7 to a group": StepCase(2, 28, 4, 3, 2, True, True, "float32", 7),
        "272 heads, 8 to a group": StepCase(2, 272, 34, 3, 2, True, True, "float32", 5),
        "48 heads, 16 to a group": StepCase(2, 48, 3, 3, 2, True, True, "float32", 10),
        "66,000 rows of heads": StepCase(2200, 30, 15, 2, 1, True, True, "float32", 11),
    },
    "window_attention": {
        **of_lengths(lambda length: windows(length, 1, 1, 3, 1, everywhere=True)),
        **of_head_dims(lambda n, dtype: windows(9, 2, 1, n, 2, dtype=dtype)),
        "windows of 256 and more, N=P=128": windows(640, 2, 1, 128, 2, everywhere=True),
        "N=P=144": windows(60, 4, 2, 144, 3, batch=2, scale=0.1),
        "N=P=264": windows(12, 2, 1, 264, 2),
        "N=64 P=192": windows(12, 2, 1, (64, 192), 2),
        "N=192 P=64": windows(12, 2, 1, (192, 64), 2),
        "N=1 P=129": windows(12, 2, 1, (1, 129), 2),
        "N=P=128, bfloat16": windows(300, 4, 2, 128, 5, dtype="bfloat16"),
        "2,200 tokens in one window": windows(2200, 1, 1, 3, 1, everywhere=True),
        "2,200 tokens in 1,500 windows": windows(2200, 2, 1, 4, 1500),
        "256 tokens in one window": windows(256, 2, 1, 64, 1, everywhere=True),
        "128 tokens in one window": windows(128, 2, 1, 3, 1, everywhere=True),
        "64 tokens in one window": windows(64, 2, 1, 3, 1, batch=2, everywhere=True, dtype="float64"),
        "1,100 scores that rise": rising(windows(1100, 1, 1, 2, 1, everywhere=True), 0.25),
        "1,100 scores that rise, float64": rising(
            windows(1100, 1, 1, 2, 1, everywhere=True, dtype="float64"), 3
        ),
        "28 heads, 7 to a group": windows(20, 28, 4, 3, 2),
        "272 heads, 8 to a group": windows(20, 272, 34, 3, 2),
        "48 heads, 16 to a group": windows(20, 48, 3, 3, 2),
        "66,000 rows of heads": windows(3, 30, 15, 1, 2, batch=2200),
        "520 rows of 128 tokens": windows(128, 1, 1, 3, 2, batch=520),
    },
    "sliding_window_attention": {
        **of_lengths(lambda length: sliding(length + 2, 1, 1, 3, length)),
        **of_head_dims(lambda n, dtype: sliding(9, 2, 1, n, 4, dtype=dtype)),
        "window of 129, N=P=144": sliding(300, 4, 2, 144, 129, scale=0.1),
        "N=P=128, bfloat16": sliding(260, 4, 2, 128, 128, dtype="bfloat16", asks="some"),
        "N=P=256": sliding(12, 2, 1, 256, 5),
        "N=64 P=192": sliding(12, 2, 1, (64, 192), 5),
        "N=192 P=64": sliding(12, 2, 1, (192, 64), 5),
        "one token behind a window of 300, N=P=128": sliding(1, 4, 2, 128, 300, batch=3),
        "2,200 tokens in a window of 1,500": sliding(2200, 1, 1, 3, 1500),
        "window of 256, packed, padding": sliding(700, 2, 2, 3, 256, valid="some", packed=True),
        "2,200 tokens, padding": sliding(2200, 2, 1, 4, 70, valid="some", packed=True),
        "520 scores that rise": rising(sliding(600, 1, 1, 2, 520), 0.375),
        "520 scores that rise, float64": rising(sliding(600, 1, 1, 2, 520, dtype="float64"), 3),
        "28 heads, 7 to a group": sliding(20, 28, 4, 3, 5),
        "272 heads, 8 to a group": sliding(20, 272, 34, 3, 5),
        "48 heads, 16 to a group": sliding(20, 48, 3, 3, 5),
        "66,000 rows of heads": sliding(3, 30, 15, 1, 2, batch=2200),
        "one token behind a window of 2,100": sliding(1, 1, 1, 3, 2100),
        "seven tokens behind a window of 1,024": sliding(7, 1, 1, 3, 1024),
        "8,300 tokens": sliding(8300, 1, 1, 1, 2),
        "a gap of 2,300 tokens": without(sliding(2320, 2, 1, 3, 5), "valid", 9, 2309),
        "2,300 tokens of padding behind a state": without(sliding(2305, 1, 1, 3, 5), "valid", 0, 2300),
        "520 rows of 128 tokens": sliding(128, 1, 1, 3, 3, batch=520, valid="left"),
    },
    "causal_conv": {
        **of_lengths(lambda length: ConvCase(1, length, 3, 4, True, "none", True, "float32", length)),
        "5,003 channels": ConvCase(2, 9, 5003, 4, True, "some", True, "float32", 1),
        "4,200 tokens": ConvCase(1, 4200, 20, 4, True, "none", True, "float32", 2),
        "2,200 tokens, masks": ConvCase(2, 2200, 3, 4, True, "some", True, "float32", 3),
        "700 tokens, the last 300 masked": ConvCase(1, 700, 5, 4, True, "tail", True, "float32", 4),
        "300 tokens, the first 171 masked": ConvCase(1, 300, 3, 4, True, "head", True, "float64", 9),
        "512 tokens, 256 channels": ConvCase(1, 512, 256, 4, True, "none", True, "float32", 7),
        "bfloat16": ConvCase(1, 40, 2200, 4, True, "left", True, "bfloat16", 5),
        "300 rows": ConvCase(300, 3, 4, 4, True, "some", True, "float32", 6),
        "19 taps": ConvCase(2, 30, 5, 19, True, "some", True, "float32", 8),
        "66,000 tokens": ConvCase(1, 66_000, 1, 4, True, "some", True, "float32", 10),
        "a gap of 2,300 tokens": without(
            ConvCase(1, 2320, 2, 4, True, "none", True, "float32", 13), "mask", 9, 2309
        ),
        "2,300 tokens of padding behind a state": without(
            ConvCase(2, 2305, 2, 4, True, "none", True, "float32", 14), "mask", 0, 2300
        ),
        "66,000 channels": ConvCase(1, 2, 66_000, 4, True, "none", False, "float32", 11),
        "2,100 rows": ConvCase(2100, 2, 1, 3, True, "some", True, "float32", 12),
    },
    "hidden_loss": {
        "5,003 channels": HiddenLossCase(2, 14, 5003, "some", 1.0, "float32", 1),
        "9,001 tokens": HiddenLossCase(1, 9001, 33, "some", 1.0, "float32", 2),
        "64 tokens, 1,024 channels": HiddenLossCase(1, 64, 1024, "none", 1.0, "float32", 5),
        "300 rows, bfloat16": HiddenLossCase(300, 3, 20, "some", 1.0, "bfloat16", 3),
        "66,000 tokens, float16": HiddenLossCase(3, 22_000, 2, "none", 1.0, "float16", 6),
        "2,300 tokens, the last third masked": HiddenLossCase(1, 2300, 7, "tail", 1.0, "float32", 4),
        "66,000 channels": HiddenLossCase(1, 3, 66_000, "some", 1.0, "float32", 7),
        "66,000 tokens": HiddenLossCase(1, 66_000, 5, "some", 1.0, "float32", 8),
    },
    "logit_loss": {
        "a vocabulary of 151,000": LogitLossCase(1, 3, 151_000, "some", 2.0, "float32", 1),
        "a vocabulary of 70,000, bfloat16": LogitLossCase(1, 2, 70_000, "none", 1.0, "bfloat16", 2),
        "9,001 tokens": LogitLossCase(1, 9001, 33, "some", 1.0, "float32", 3),
        "64 tokens, a vocabulary of 1,024": LogitLossCase(1, 64, 1024, "none", 1.0, "float32", 6),
        "300 rows": LogitLossCase(300, 3, 20, "some", 1.0, "float32", 4),
        "66,000 tokens, float16": LogitLossCase(3, 22_000, 2, "none", 1.0, "float16", 7),
        "2,300 tokens, the last third masked": LogitLossCase(1, 2300, 7, "tail", 1.0, "float32", 5),
        "17 million logits": LogitLossCase(1, 113, 151_936, "none", 1.5, "float32", 8),
        "66,000 tokens": LogitLossCase(1, 66_000, 5, "some", 1.5, "float32", 9),
    },
}
