"""bfloat16 in and out, float32 between; and 100,000 tokens of the worst decays and activations."""

from __future__ import annotations

import pytest
import torch
from accelerate.utils import send_to_device
from torch import Tensor

from linmu import optimized
from linmu.reference import LinMUConfig, VisionLayout
from linmu.reference.numerics import rms_norm_per_head

from .gpu_cases import left_by_the_norm

LONG = 100_000
BFLOAT16 = 2.0**-8  # its relative rounding error


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.needs("selective_scan", "bidirectional_scan")
@pytest.mark.parametrize("operator", ["selective_scan", "bidirectional_scan"])
def test_a_bfloat16_scan_adds_up_in_float32(backend, operator):
    """1,000 times 1 is 1,000; a sum in bfloat16 stands still at 256."""
    length = 1000
    one = torch.ones(1, length, 1, 1, dtype=torch.bfloat16)
    dt, A = torch.ones(1, length, 1), torch.tensor([-1e-9])
    extra = {"gate": torch.ones(1, length, 1)} if operator == "bidirectional_scan" else {}
    y, state = getattr(backend, operator)(one, dt, A, one, one, **extra)
    wanted = torch.arange(1.0, length + 1)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert ((y.float().flatten() - wanted) / wanted).abs().max() <= BFLOAT16
    assert abs(state.item() - length) < 1e-2


@pytest.mark.needs("scan_step")
def test_a_bfloat16_step_keeps_its_state_in_float32(backend):
    one = torch.ones(1, 1, 1, dtype=torch.bfloat16)
    state = torch.full((1, 1, 1, 1), 256.0)
    for _ in range(10):
        _, state = backend.scan_step(state, one, torch.ones(1, 1), torch.tensor([-1e-9]), one, one)
    assert state.dtype == torch.float32 and abs(state.item() - 266) < 1e-3


@pytest.mark.needs("window_attention")
def test_a_bfloat16_softmax_is_taken_in_float32(backend):
    """Equal to that of the same numbers in float32, but for the rounding of the result."""
    q, k, v = (torch.randn(1, 64, 2, 16, generator=generator(seed)).bfloat16() for seed in range(3))
    windows = torch.arange(64)[None] // 32
    got = backend.window_attention(4 * q, 4 * k, v, windows)
    want = backend.window_attention(4 * q.float(), 4 * k.float(), v.float(), windows)
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).norm() <= 2 * BFLOAT16 * want.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_norm_of_a_head_takes_off_all_that_a_gradient_has_along_it(dtype):
    """Next to it what is left may be small: a norm of y and a y that was rounded do not fit together."""
    assert left_by_the_norm(dtype, "cpu") < 1e-5


def test_a_bfloat16_norm_is_taken_in_float32():
    y = (1e3 * torch.randn(1, 64, 2, 16, generator=generator())).bfloat16()
    weight = torch.rand(32, generator=generator()).bfloat16()
    got, want = rms_norm_per_head(y, weight, 1e-6), rms_norm_per_head(y.float(), weight.float(), 1e-6)
    assert torch.equal(got, want.bfloat16())


def adversarial(shape: tuple[int, ...], low: float, high: float, seed: int) -> Tensor:
    """Numbers of all magnitudes from 10**low to 10**high, alike often."""
    return 10 ** (low + (high - low) * torch.rand(shape, generator=generator(seed)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_100_000_tokens_of_the_worst_decays_stay_finite(dtype):
    """Decays from none to at once, jumps between them, a video of 50,000 tokens, values up to 10,000."""
    heads, groups, size = 4, 2, 8
    signs = torch.randn(1, LONG, groups, size, generator=generator()).sign()
    x = (signs * adversarial((1, LONG, groups, size), -4, 4, 1)).to(dtype).requires_grad_()
    dt = adversarial((1, LONG, heads), -6, 4, 2)
    dt[:, 40_000:60_000, 0] = 1e-6  # remembers everything
    dt[:, 60_000:60_100, 1] = 1e4  # forgets everything
    dt.requires_grad_()
    A = -torch.tensor([1e-6, 1.0, 1e4, 1e-3])
    B = torch.randn(1, LONG, groups, size, generator=generator(3)).to(dtype)
    C = torch.randn(1, LONG, heads, size, generator=generator(4)).to(dtype)
    segment = torch.full((1, LONG), -1)
    segment[:, 20_000:70_000] = 0
    gate = torch.rand(1, LONG, heads, generator=generator(5))
    y, state = optimized.bidirectional_scan(x, dt, A, B, C, gate=gate, segment=segment)
    assert torch.isfinite(y).all() and torch.isfinite(state).all()
    (y.float().square().mean().sqrt() + state.square().mean().sqrt()).backward()
    assert torch.isfinite(x.grad).all() and torch.isfinite(dt.grad).all()


@torch.no_grad()
def test_a_bfloat16_block_stays_finite_over_100_000_tokens_of_large_activations():
    config = LinMUConfig(width=16, heads=2, groups=1, head_dim=8)
    torch.manual_seed(0)
    block = optimized.MMATE(config, layer_index=1)
    block.flex_ma.dt_proj.weight.normal_(std=3.0)
    block.flex_ma.A_log.copy_(torch.tensor([-14.0, 9.0]))
    block = block.bfloat16()
    coords = torch.full((1, LONG, 4), -1)
    coords[0, 25_000:75_000, 0] = 0
    coords[0, 25_000:75_000, 1:] = torch.cartesian_prod(*map(torch.arange, (50, 25, 40)))
    u = (torch.randn(1, LONG, 16, generator=generator()) * adversarial((1, LONG, 1), -3, 3, 1)).bfloat16()
    angle = torch.zeros(1, LONG, 8)
    y, state = block(u, VisionLayout(coords), position_embeddings=(angle.cos(), angle.sin()))
    assert y.dtype == torch.bfloat16 and torch.isfinite(y).all()
    assert {part.dtype for part in state.flex_ma} == {torch.float32}
    assert all(torch.isfinite(part).all() for part in state.tensors)


def test_a_layout_moves_with_its_layers():
    """Accelerate moves what has a `to`; a layout that is there already stays itself, memo and all."""
    layout = VisionLayout(torch.zeros(1, 1, 4, dtype=torch.int64))
    assert layout.to("cpu") is layout
    assert send_to_device({"linmu_layout": layout}, "cpu")["linmu_layout"] is layout
