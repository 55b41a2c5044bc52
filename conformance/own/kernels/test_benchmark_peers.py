"""What the benchmark compares with: peers, called as they document, chosen right, left out where wrong.

No peer is installed here: modules with their names stand in for them.
"""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch.nn.attention import flex_attention as torch_flex

from linmu import optimized
from linmu.optimized.benchmarks import kernels, peers, window_peers
from linmu.optimized.benchmarks.problems import scan_problem, window_problem

from .test_benchmark import CPU, SIZES


def test_a_peer_chooses_among_tiles_that_are_right(monkeypatch):
    sizes = [(128, 64), (64, 64), (32, 32)]
    tiles = [types.SimpleNamespace(kwargs={"BLOCK_SIZE_M": m, "BLOCK_SIZE_K": k}) for m, k in sizes]
    kernel = types.SimpleNamespace(configs=tiles)
    module = types.SimpleNamespace(_chunk_scan_fwd_kernel=kernel)
    peers.leave_out_wrong_tiles()  # where it is not installed
    monkeypatch.setitem(sys.modules, "ssd.bi.ssd_chunk_scan", module)
    peers.leave_out_wrong_tiles()
    assert kernel.configs == tiles[1:]


def fake_fla() -> types.ModuleType:
    """What fla documents of `chunk_simple_gla`: S decays by exp(g), takes k vᵀ, and q reads it."""

    def chunk_simple_gla(q, k, v, g, *, scale):
        state = torch.zeros(q.shape[0], q.shape[2], k.shape[3], v.shape[3])
        rows = []
        for t in range(q.shape[1]):
            state = g[:, t].exp()[..., None, None] * state + k[:, t, :, :, None] * v[:, t, :, None]
            rows.append(torch.einsum("bhn,bhnp->bhp", q[:, t] * scale, state))
        return torch.stack(rows, 1), None

    return types.SimpleNamespace(chunk_simple_gla=chunk_simple_gla)


def fake_mamba() -> types.SimpleNamespace:
    """`mamba_chunk_scan_combined`: a scan with as many groups as heads."""

    def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size):
        return optimized.selective_scan(x, dt, A, B, C, mask=(dt > 0).all(-1))[0]

    return types.SimpleNamespace(mamba_chunk_scan_combined=mamba_chunk_scan_combined)


def fake_bimamba(shared: bool) -> types.SimpleNamespace:
    """`bimamba_chunk_scan_combined`: the sum of both directions, the token itself in both or in one."""

    def bimamba_chunk_scan_combined(x, dt, A, B, C, chunk_size):
        both = [optimized.selective_scan(x, dt, A, B, C, reverse=reverse)[0] for reverse in (False, True)]
        own = (C * B).sum(-1, keepdim=True) * dt[..., None] * x
        return both[0] + both[1] - (own if shared else 0)

    return types.SimpleNamespace(bimamba_chunk_scan_combined=bimamba_chunk_scan_combined)


INSTALLED = [
    ("fla", fake_fla(), True),
    ("mamba_ssm", fake_mamba(), True),
    ("Bi-Mamba2", fake_bimamba(False), False),
    ("Bi-Mamba2", fake_bimamba(True), False),
]


@pytest.mark.parametrize(("name", "module", "backward"), INSTALLED)
def test_a_peer_that_works_as_documented_gives_our_result(name, module, backward, monkeypatch):
    """Flips, gate, text and repeated groups around a peer are right, gradients included."""
    (peer,) = (peer for peer in peers.PEERS if peer.name == name)
    parts = peer.module.split(".")
    for end in range(1, len(parts) + 1):
        path = ".".join(parts[:end])
        monkeypatch.setitem(sys.modules, path, module if end == len(parts) else types.ModuleType(path))
    flags = types.SimpleNamespace(IS_NVIDIA_HOPPER=True, TRITON_ABOVE_3_4_0=True, TRITON_ABOVE_3_7_1=True)
    monkeypatch.setitem(sys.modules, "fla.ops.common.chunk_o", flags)
    problem, method = scan_problem(320, SIZES, torch.float32, CPU, seed=1), kernels.from_peer(peer)
    assert kernels.why_wrong(method, problem, backward, torch.float32) is None
    flags.TRITON_ABOVE_3_7_1 = False
    reason = kernels.why_wrong(method, problem, True, torch.float32) if name == "fla" else "refused"
    assert reason.startswith("refused")


def test_a_wrong_peer_is_left_out_and_a_missing_one_is_named():
    wrong = kernels.Method("wrong", lambda _: lambda problem: 1.1 * peers.scan(problem), kernels.scan_truth)
    problem = scan_problem(320, SIZES, torch.float32, CPU)
    assert "differs from the truth by 1.0e-01" in kernels.why_wrong(wrong, problem, False, torch.float32)
    nowhere = peers.Peer("nowhere", "package_that_is_nowhere", peers.scan, "")
    reason = kernels.why_wrong(kernels.from_peer(nowhere), problem, False, torch.float32)
    assert reason.startswith("not installed: package_that_is_nowhere")


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("method", kernels.WINDOWS, ids=lambda method: method.name)
def test_the_ways_to_attend_in_windows_agree(method, monkeypatch):
    """flex_attention runs uncompiled here, and has no backward pass on a CPU."""
    monkeypatch.setattr(window_peers, "compiled_flex", lambda: torch_flex.flex_attention)
    problem = window_problem(640, SIZES, torch.float32, CPU)
    backward = "flex" not in method.name
    assert kernels.why_wrong(method, problem, backward, torch.float32) is None
