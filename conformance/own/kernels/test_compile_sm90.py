"""Every Triton kernel compiles for Hopper without a GPU: no spills, tensor cores for products, shared memory
that fits.

At the shapes of a 7B model (H=28, G=4, N=P=128) and at N=P=64, in bfloat16 and float32, whose IEEE products
no tensor core computes; with --thorough at small ones and in float16, too, and every kernel of packed rows,
of which the one with the fewest registers left stands for all otherwise. A transposed product of the tensor
cores, which some compilers get wrong on Hopper, shows as a linear layout in Triton's intermediate code and is
refused too. A kernel compiles in a process without TRITON_INTERPRET, which would take the compiler's place.
"""

from __future__ import annotations

import json

import pytest

from ..forks import TRIALS, Start, run_forked

SHARED_MEMORY = 227 * 1024
PRODUCTS = {
    "scalars": 0,
    "sweep": 1,
    "sweep_runs": 1,
    "sweep_partner": 1,
    "rates": 0,
    "output": 3,
    "reader": 5,
    "reader_packed": 5,
    "writer_x": 4,
    "writer_b": 4,
    "attend": 2,
    "attend_held": 2,
    "query_gradient": 3,
    "key_gradient": 4,
    "query_gradient_held": 3,
    "key_gradient_held": 4,
    "sliding": 2,
    "sliding_query": 5,
    "sliding_key": 4,
    "sliding_step": 0,
    "sliding_ring": 2,
    "sliding_move": 0,
    "conv_forward": 0,
    "conv_backward": 0,
    "divergence": 0,
    "divergence_gradient": 0,
    "step": 0,
    "mix": 0,
    "parts": 0,
    "mix_gradient": 0,
    "rope": 0,
    "add_norm": 0,
    "norm_backward": 0,
    "gate": 0,
    "gate_backward": 0,
    "errors": 0,
    "errors_gradient": 0,
    "text_step": 0,
    "text_step_pooled": 0,
    "project_one": 0,
    "project_four": 0,
    "output_one": 0,
    "output_four": 0,
    "heads": 0,
    "link": 0,
    "norm_gradient": 0,
}  # products of tiles, each at least one tensor-core instruction
SCAN = (  # float16 goes through their float32 kernels
    "scalars",
    "sweep",
    "sweep_runs",
    "sweep_partner",
    "rates",
    "output",
    "reader",
    "writer_x",
    "writer_b",
)
SIZES = {"bf16": (128, 64), "fp32": (128,)}  # float16 compiles as bfloat16 does: --thorough
OF_ROWS = (
    "divergence",
    "divergence_gradient",
    "mix",
    "parts",
    "heads",
    "mix_gradient",
    "add_norm",
    "norm_backward",
    "gate",
)
OF_ROWS += ("gate_backward", "errors", "errors_gradient")  # which know nothing of heads
ALL_SIZES = dict.fromkeys(("bf16", "fp16", "fp32"), (128, 64, 32, 16))
OF_PACKED_ROWS = ("scalars", "rates", "output", "writer_x", "writer_b", "conv_forward", "conv_backward")
WIDE = {"bf16": (256, 128, 64), "fp32": (128,)}  # of sliding windows, whose kernels hold head dims up to 256
ALL_WIDE = {dtype: (256, *sizes) for dtype, sizes in ALL_SIZES.items()}
# Bytes spilled. The first on purpose: so two programs share a multiprocessor, and the kernel takes 1.25 ms
# instead of 1.6 without spills (64k tokens, H=28, G=4, N=P=128, bfloat16, one H200, triton 3.6, 2026-11-24).
# The second by IEEE products, which no tensor core computes. The others are outside the loop over pairs or
# heads: one register, which triton 3.9 and 3.6 spill at one size each, and what both keep around a loop that
# takes all registers.
SPILLED = {("output", "bf16", 128): 32, ("writer_b", "fp32", 128): 40}
SPILLED |= {("writer_b_packed", "fp32", 128): 40}
SPILLED |= {("attend_held", "bf16", 64): 4, ("attend_held", "bf16", 32): 4}
SPILLED |= {("key_gradient_held", "bf16", 128): 88, ("key_gradient_held", "fp16", 128): 88}
SPILLED |= {("query_gradient_held", kind, size): 8 for kind in ("bf16", "fp16") for size in (128, 64)}
# Head dims of 256, beyond the kernels' measure: a register, and IEEE products once more.
SPILLED |= {("sliding_key", "bf16", 256): 4, ("sliding_key", "fp16", 256): 4}
SPILLED |= {("sliding_query", "fp32", 256): 288}


def compiled(kernel: str, sizes: dict[str, tuple[int, ...]]) -> dict[str, dict[str, dict[str, int]]]:
    """What the compiler says by dtype and size."""
    asked = (f"{dtype}:{','.join(map(str, each))}" for dtype, each in sizes.items())
    # the second is what triton 3.9 does anyway, said aloud to keep it quiet
    variables = ("TRITON_INTERPRET", "0"), ("TRITON_DEFAULT_FP_FUSION", "1")
    start = Start(("linmu.optimized", f"{TRIALS}.hasten_compile"), variables)
    done = run_forked(start, f"{TRIALS}.compile_sm90", kernel, *asked)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def sizes_of(kernel: str, thorough: bool) -> dict[str, tuple[int, ...]]:
    """The dtypes that a kernel runs in, and the sizes to compile it at."""
    scans = kernel.removesuffix("_packed") in SCAN
    left_out = {"fp32"} if kernel.endswith("_held") else {"fp16"} if scans else set()
    sizes = ALL_SIZES if thorough else {"bf16": (64,)} if kernel.endswith("_packed") else SIZES
    if kernel in OF_ROWS:
        sizes = {dtype: each[:1] for dtype, each in sizes.items()}
    if kernel.startswith("sliding"):
        sizes = ALL_WIDE if thorough else WIDE
    return {dtype: each for dtype, each in sizes.items() if dtype not in left_out}


@pytest.mark.parametrize("kernel", PRODUCTS)
def test_kernels_fit_a_hopper_multiprocessor(kernel, record_property, request):
    """No spills but those known, wgmma for every product, at most 227 KB of shared memory."""
    thorough = request.config.getoption("thorough")
    for name in (kernel, f"{kernel}_packed") if thorough and kernel in OF_PACKED_ROWS else (kernel,):
        for dtype, by_size in compiled(name, sizes_of(name, thorough)).items():
            for size, found in by_size.items():
                record_property("sm_90", (name, dtype, int(size), found))
                check_fit(name, dtype, int(size), found)


def check_fit(kernel: str, dtype: str, size: int, found: dict[str, int]) -> None:
    """One kernel as compiled."""
    case = f"{kernel}, {dtype}, N = P = {size}: {found}"
    spilled = SPILLED.get((kernel, dtype, size), 0)
    assert max(found["spill_stores"], found["spill_loads"]) <= spilled, case
    products = PRODUCTS[kernel.removesuffix("_packed")]
    assert found["wgmma"] + found["mma_sync"] >= (0 if dtype == "fp32" else products), case
    assert found["mma_sync"] == 0 or size < 64 or kernel == "sliding_ring", case  # of too few rows for wgmma
    assert found["linear_layouts"] == 0 or not products, case
    assert found["shared"] <= SHARED_MEMORY, case
