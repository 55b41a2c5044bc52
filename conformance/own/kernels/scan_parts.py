"""A scan of a prompt in parts, each in two steps, equals the scan of the whole prompt."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from linmu.optimized.layout.segments import openings, vision_mask
from linmu.optimized.scan import ScanInputs, scan
from linmu.optimized.scan.two_steps import begin, finish

PER_TOKEN = ("x", "dt", "B", "C", "gate", "segment", "valid")


def scan_inputs(coords: Tensor, dtype: torch.dtype, *, masked: bool, vision: bool = True) -> ScanInputs:
    """Of 4 heads in 2 groups, in scan order, with a norm; half-lives from 2 tokens to 40."""
    torch.manual_seed(len(coords))
    batch, length, scalars = *coords.shape[:2], torch.promote_types(dtype, torch.float32)
    x, B = (torch.randn(batch, length, 2, 16).to(dtype) for _ in range(2))
    dt, gate = (torch.rand(batch, length, 4, dtype=scalars) for _ in range(2))
    valid = torch.ones(batch, length, dtype=torch.bool) if masked else None
    if masked:
        valid[0, -3:] = valid[1, :5] = False
    segment = coords[..., 0].contiguous()
    return ScanInputs(
        x,
        dt,
        -torch.logspace(-2, 0, 4, dtype=scalars),
        B,
        torch.randn(batch, length, 4, 16).to(dtype),
        gate=gate if vision else None,
        segment=segment if vision else None,
        valid=valid,
        D=torch.rand(4),
        initial_state=torch.randn(batch, 4, 16, 16, dtype=scalars),
        norm_weight=torch.rand(64).to(dtype),
        eps=1e-6,
    )


def in_parts(inputs: ScanInputs, cuts: list[int]) -> tuple[Tensor, Tensor]:
    """y and the final state, each part's scan begun before any is finished."""
    parts = [part(inputs, slice(*edges)) for edges in pairwise([0, *cuts, inputs.x.shape[1]])]
    begun = [begin(each) for each in parts]
    entering: list[list[Tensor | None]] = [[] for _ in begun]
    final = inputs.initial_state
    for direction in range(len(begun[0].added)):
        state = None if direction else inputs.initial_state
        for place in reversed(range(len(begun))) if direction else range(len(begun)):
            entering[place].append(state)
            added, decay = begun[place].added[direction], begun[place].decay[direction]
            state = added if state is None else added + decay[..., None, None] * state
        final = final if direction else state
    return torch.cat([finish(each, states) for each, states in zip(begun, entering, strict=True)], 1), final


def part(inputs: ScanInputs, where: slice) -> ScanInputs:
    """Tokens of a scan, which know the segment that opens behind them, written back in their part's order."""
    own = {n: None if t is None else t[:, where] for n, t in inputs._asdict().items() if n in PER_TOKEN}
    order = torch.arange(where.stop - where.start).flip(0).expand(len(inputs.x), -1)
    opens = None
    if inputs.segment is not None:
        segment = torch.where(vision_mask(inputs.segment, inputs.valid), inputs.segment, -1)
        behind = F.pad(segment[:, where.stop :], (0, 1), value=-1)
        opens = openings(
            segment[:, where], behind.gather(1, (behind >= 0).int().argmax(1, keepdim=True))[:, 0]
        )
    return inputs._replace(**own, initial_state=None, openings=opens, order=order)


def check(coords: Tensor, dtype: torch.dtype, cuts: list[int], tolerance: float, **options: bool) -> None:
    """Raises if the parts are not the whole."""
    inputs = scan_inputs(coords, dtype, **options)
    wanted, end = scan(inputs)
    found, last = in_parts(inputs, cuts)
    back = torch.cat([each.flip(1) for each in found.tensor_split(cuts, 1)], 1)
    valid = torch.ones(back.shape[:2], dtype=torch.bool) if inputs.valid is None else inputs.valid
    torch.testing.assert_close(back[valid], wanted[valid], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(last, end, rtol=tolerance, atol=tolerance)
