"""What a user would call today for a scan in both directions. None of it is installed with this package.

Each peer computes `bidirectional_scan` of a `ScanProblem` as well as its interface allows. The prompt has one
video in one piece, so the reverse direction is a slice, not a gather: that favours the peers.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..scan import bidirectional_scan
from .cases import LeftOutError
from .problems import ScanProblem

MAMBA_CHUNK = 256  # Mamba2's own default
INT32 = 2**31


@dataclass(frozen=True)
class Peer:
    """Someone else's way.

    Args:
        name: as in the tables.
        module: what must be importable.
        run: computes y (B, L, H, P).
        limits: what is known not to work, for the report.
        forward_only: its gradients are known to be wrong.
        expected: what its result must equal; by default that of `bidirectional_scan`.
        refuses: why its backward pass will not run here, or None; asked first, since tuning takes long.
    """

    name: str
    module: str
    run: Callable[[ScanProblem], Tensor]
    limits: str
    forward_only: bool = False
    expected: Callable[[ScanProblem], tuple[Tensor, ...]] | None = None
    refuses: Callable[[], str | None] = lambda: None

    def require(self) -> None:
        """Raise LeftOutError if it cannot be imported."""
        try:
            importlib.import_module(self.module)
        except Exception as error:  # whatever a foreign package raises while it is imported
            raise LeftOutError(f"not installed: {self.module} ({type(error).__name__}: {error})") from error


def repeated(problem: ScanProblem) -> tuple[Tensor, Tensor]:
    """x and B for every head, (B, L, H, P) and (B, L, H, N): no peer has groups on one side only."""
    ratio = problem.C.shape[2] // problem.x.shape[2]
    return problem.x.repeat_interleave(ratio, 2), problem.B.repeat_interleave(ratio, 2)


def fla_both_ways(problem: ScanProblem) -> Tensor:
    """`chunk_simple_gla` over all tokens, again over the flipped video, mixed by the gate."""
    from fla.ops.simple_gla import chunk_simple_gla

    v, k = repeated(problem)
    k = (k * problem.dt[..., None]).to(v.dtype)
    decay, inside, ends = problem.dt * problem.A, problem.prompt.inside, problem.prompt
    forward = chunk_simple_gla(problem.C, k, v, decay, scale=1.0)[0]
    flipped = [tensor[:, inside].flip(1) for tensor in (problem.C, k, v, decay)]
    reverse = chunk_simple_gla(*flipped, scale=1.0)[0].flip(1)
    gate = problem.gate[:, inside, :, None].to(v.dtype)
    mixed = gate * forward[:, inside] + (1 - gate) * reverse
    return torch.cat([forward[:, : ends.start], mixed, forward[:, ends.start + ends.vision :]], 1)


def fla_refuses() -> str | None:
    """fla raises for gated gradients on Hopper with a Triton that computes them wrongly (fla #640)."""
    chunk = importlib.import_module("fla.ops.common.chunk_o")
    names = ("IS_NVIDIA_HOPPER", "TRITON_ABOVE_3_4_0", "TRITON_ABOVE_3_7_1")
    hopper, broken, mended = (getattr(chunk, name, False) for name in names)
    if hopper and broken and not mended:
        return "refused: fla's gated backward pass does not run on Hopper with this Triton (fla #640)"
    return None


def mamba_both_ways(problem: ScanProblem) -> Tensor:
    """`mamba_chunk_scan_combined` on a batch of the sequence and its flip, as Hydra calls it."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    pairs = 2 * problem.prompt.length * problem.C.shape[2] * MAMBA_CHUNK  # of its chunks, both ways
    if pairs >= INT32:
        reason = f"its int32 offsets overflow at 2·L·H·{MAMBA_CHUNK} >= 2^31 (mamba #1015)"
        raise LeftOutError(f"left out: {reason}")
    x, B = repeated(problem)
    is_vision = problem.segment >= 0
    dt = torch.where(is_vision[..., None], problem.dt, 0)  # text neither writes nor decays in reverse
    both = [torch.cat([tensor, tensor.flip(1)]) for tensor in (x, B, problem.C)]
    dt = torch.cat([problem.dt, dt.flip(1)])
    y = mamba_chunk_scan_combined(both[0], dt, problem.A, both[1], both[2], chunk_size=MAMBA_CHUNK)
    gate = torch.where(is_vision[..., None], problem.gate, 1)[..., None].to(x.dtype)
    return gate * y[:1] + (1 - gate) * y[1:].flip(1)


def bimamba_both_ways(problem: ScanProblem) -> Tensor:
    """The one fused kernel for both directions: their plain sum over all tokens, no gate, no text."""
    from ssd.bi.ssd_combined import bimamba_chunk_scan_combined

    leave_out_wrong_tiles()
    x, B = repeated(problem)
    return bimamba_chunk_scan_combined(x, problem.dt, problem.A, B, problem.C, MAMBA_CHUNK)


def leave_out_wrong_tiles() -> None:
    """Let Bi-Mamba2 choose among the tiles whose results are right: with more rows than columns, all columns
    but the first of a row lose the forward direction.
    """
    kernel = getattr(sys.modules.get("ssd.bi.ssd_chunk_scan"), "_chunk_scan_fwd_kernel", None)
    if kernel is not None:
        tiles = [(config, config.kwargs) for config in kernel.configs]
        right = [config for config, tile in tiles if tile["BLOCK_SIZE_M"] <= tile["BLOCK_SIZE_K"]]
        kernel.configs = right or kernel.configs


def plain_sums(problem: ScanProblem) -> tuple[Tensor, Tensor]:
    """Both directions added up over all tokens; once with the token itself in both, once in one of them."""
    gate, segment = torch.full_like(problem.gate, 0.5), torch.zeros_like(problem.segment)
    both = 2 * scan(replace(problem, gate=gate, segment=segment))
    ratio = problem.C.shape[2] // problem.x.shape[2]
    own = (problem.C * problem.B.repeat_interleave(ratio, 2)).sum(-1) * problem.dt
    return both, both - own[..., None] * problem.x.repeat_interleave(ratio, 2)


def scan(problem: ScanProblem) -> Tensor:
    """Our own operator on the same problem."""
    return bidirectional_scan(
        problem.x,
        problem.dt,
        problem.A,
        problem.B,
        problem.C,
        gate=problem.gate,
        segment=problem.segment,
    )[0]


PEERS = (
    Peer(
        "fla",
        "fla.ops.simple_gla",
        fla_both_ways,
        "fla: keys and values are repeated for every head; its backward pass refuses to run on Hopper with "
        "Triton 3.4 to 3.7.1 (fla #640) and keeps its states in float32.",
        refuses=fla_refuses,
    ),
    Peer(
        "mamba_ssm",
        "mamba_ssm.ops.triton.ssd_combined",
        mamba_both_ways,
        "mamba_ssm: B has as many groups as C; int32 offsets overflow (mamba #1015), first for pairs of a "
        f"chunk, at 2·L·H·{MAMBA_CHUNK} >= 2^31: a memory fault that no later line of the run survives.",
    ),
    Peer(
        "Bi-Mamba2",
        "ssd.bi.ssd_combined",
        bimamba_both_ways,
        "Bi-Mamba2: adds up both directions over all tokens, without gate, text or segments, so it does less "
        "here; its gradients of dt and A read memory that nothing wrote, so only its forward is timed; tiles "
        "with which its result is wrong (more rows than columns, in chunks longer than a tile) are left out.",
        forward_only=True,
        expected=plain_sums,
    ),
)
