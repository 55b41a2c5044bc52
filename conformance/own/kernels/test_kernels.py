"""The Triton kernels, run by Triton's interpreter on the CPU, equal the reference: values, states, every
gradient.

Guards against offsets that wrap, exponents that overflow, ragged tails, masks, initial states, groups,
dtypes, reads out of bounds and undefined values. Each operator runs in a process of its own:
TRITON_INTERPRET is read when kernels are defined.
"""

from __future__ import annotations

import subprocess
from itertools import product
from pathlib import Path

import pytest

from ..forks import INTERPRETER, TRIALS, run_forked

OPERATORS = (
    "bidirectional_scan",
    "selective_scan",
    "scan_step",
    "causal_conv",
    "window_attention",
    "logit_loss",
)


def interpreted(program: str | Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run a trial, by its name, or a file under Triton's interpreter."""
    if isinstance(program, str):
        program = f"{TRIALS}.{program}"
    return run_forked(INTERPRETER, program, *arguments)


@pytest.mark.parametrize(
    ("operator", "dtype"),
    [
        *product(OPERATORS, ("float32", "bfloat16")),
        ("bidirectional_scan", "float16"),
        ("window_attention", "float16"),
    ],
)
def test_kernels_equal_the_reference_in_the_interpreter(operator, dtype):
    done = interpreted("trial", operator, dtype)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "linmu.optimized: triton engine" in done.stderr


def test_a_servers_warm_up_leaves_its_prompts_nothing_to_compile():
    done = interpreted("trial_warm_up")
    assert done.returncode == 0, done.stdout + done.stderr


SUMS = """
import torch
from linmu.optimized.scan import ScanInputs
from linmu.optimized.scan.kernels.scalars import scan_scalars

torch.manual_seed(0)
dt = torch.where(torch.rand(1, 64, 2) < 0.1, 1e4, torch.rand(1, 64, 2))
A, gate, segment = torch.tensor([-0.032, -0.7]), torch.rand(1, 64, 2), torch.zeros(1, 64, dtype=torch.int64)
found = scan_scalars(ScanInputs(None, dt, A, None, None, gate, segment), 64)
steps = (dt.double() * A.double())[0].T  # (H, C)
forward = steps.cumsum(1)
assert torch.equal(found.sums[0, 0, 0], forward.float())
assert torch.equal(found.sums[1, 0, 0], (forward - steps).float())
left = (forward[:, -1:] - forward).exp().float() * dt[0].T  # of each write at the chunk's end
torch.testing.assert_close(found.write_weight[0, 0, 0], left, rtol=1e-6, atol=1e-30)
"""


def test_sums_of_steps_are_rounded_once(tmp_path):
    """The exponents' sums are those in float64, whatever order a GPU would add them up in."""
    script = tmp_path / "sums.py"
    script.write_text(SUMS)
    done = interpreted(script)
    assert done.returncode == 0, done.stdout + done.stderr


NORMS = """
import torch
from linmu.conformance.own.kernels.gpu_cases import left_by_the_norm
from linmu.conformance.own.kernels.interpreter import mend_bfloat16, mend_scalars
from linmu.conformance.own.kernels.interpreter.trial import shrink_blocks

shrink_blocks()
mend_bfloat16()
mend_scalars()
left = left_by_the_norm(torch.bfloat16, "cpu")
assert left < 1e-5, left
"""


def test_the_norm_of_a_head_takes_off_all_that_a_gradient_has_along_it(tmp_path):
    """As in test_precision.py."""
    script = tmp_path / "norms.py"
    script.write_text(NORMS)
    done = interpreted(script)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "linmu.optimized: triton engine" in done.stderr


@pytest.mark.parametrize("dtype", ["float32", "mixed"])
def test_a_block_of_kernels_equals_the_reference_in_the_interpreter(dtype):
    """Scan order, heads' norm and its gradient included, which the block fuses into its kernels."""
    done = interpreted("trial_block", dtype)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "linmu.optimized: triton engine" in done.stderr


def test_pairs_of_kernels_of_windows_share_the_tokens_in_the_interpreter():
    """Blocks of one window and all others: every o, lse and gradient is written once."""
    done = interpreted("trial_windows")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_kernels_of_sliding_windows_equal_the_reference_in_the_interpreter(dtype):
    """Forward, backward and one token: ragged tiles, padding, packed rows, states; twice the same."""
    done = interpreted("trial_sliding_window", dtype)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "linmu.optimized: triton engine" in done.stderr


@pytest.mark.parametrize("operator", OPERATORS)
def test_offsets_may_exceed_two_to_the_31(operator):
    """64-bit addresses: an offset that wraps leaves its tensor, which the watch sees."""
    done = interpreted("trial_far", operator)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("operator", OPERATORS)
def test_strides_do_not_matter_to_kernels(operator):
    done = interpreted("trial_strides", operator)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "linmu.optimized: triton engine" in done.stderr


WRAPPING = """
import torch, triton, triton.language as tl
from linmu.conformance.own.kernels.interpreter import watch_memory

@triton.jit
def kernel(X, Y, stride):
    place = tl.arange(0, 4)
    if {wide}:
        place = place.to(tl.int64)
    tl.store(Y + tl.arange(0, 4), tl.load(X + place * stride))

x = torch.empty(2**32, dtype=torch.int8).as_strided((4,), (2**30,)).fill_(1)
y = torch.zeros(4, dtype=torch.int8)
with watch_memory():
    kernel[(1,)](x, y, 2**30)
print(y.tolist())
"""


@pytest.mark.parametrize("wide", [True, False])
def test_the_interpreter_catches_an_offset_that_wraps(tmp_path, wide):
    script = tmp_path / "wrapping.py"
    script.write_text(WRAPPING.format(wide=wide))
    done = interpreted(script)
    assert (done.returncode == 0 and done.stdout == "[1, 1, 1, 1]\n") == wide, done.stdout + done.stderr
    assert wide or "outside every argument" in done.stderr


FAULTY = """
import torch, triton, triton.language as tl
from linmu.conformance.own.kernels.interpreter import watch_memory

@triton.jit
def kernel(X, Y, size, SHIFT: tl.constexpr, SAME: tl.constexpr, MASKED: tl.constexpr):
    place = tl.program_id(0) * 4 + tl.arange(0, 4)
    if MASKED:
        x = tl.load(X + place + SHIFT, mask=place < 6)
    else:
        x = tl.load(X + place + SHIFT)
    if SAME:
        place = tl.arange(0, 4)
    tl.store(Y + place, x)

x, y = torch.ones(8), torch.zeros(8)
with watch_memory():
    kernel[(2,)](x, y, 8, SHIFT={shift}, SAME={same}, MASKED={masked})
print(int(y.isnan().sum()))
"""


@pytest.mark.parametrize(
    ("shift", "same", "masked", "complaint"),
    [
        (1, False, False, "outside every argument"),
        (-(2**31), False, False, "outside every argument"),
        (0, True, False, "stored by more than one program"),
    ],
)
def test_the_interpreter_catches_what_a_gpu_lets_pass(tmp_path, shift, same, masked, complaint):
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY.format(shift=shift, same=same, masked=masked))
    done = interpreted(script)
    assert done.returncode != 0
    assert complaint in done.stderr


def test_the_interpreter_poisons_masked_loads_that_give_no_other_value(tmp_path):
    script = tmp_path / "poisoned.py"
    script.write_text(FAULTY.format(shift=0, same=False, masked=True))
    done = interpreted(script)
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr


BFLOAT16 = """
import torch, triton, triton.language as tl
from linmu.conformance.own.kernels.interpreter import mend_bfloat16
mend_bfloat16()

@triton.jit
def kernel(X, W, OUT, SUM):
    row, column = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    x, w = tl.load(X + row * 16 + column), tl.load(W + row * 16 + column)
    tl.store(OUT + row * 16 + column, tl.dot(x, w).to(tl.bfloat16))
    tl.store(SUM + row * 16 + column, x + w)

x, w = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16()
out, total = torch.empty_like(x), torch.empty_like(x)
kernel[(1,)](x, w, out, total)
assert torch.equal(total, x + w)
assert torch.equal(out, (x.double() @ w.double()).float().bfloat16()) or (
    (out.double() - x.double() @ w.double()).abs().max() <= 2**-8 * (x.double() @ w.double()).abs().max()
)
"""


def test_bfloat16_in_the_interpreter_is_that_of_torch(tmp_path):
    script = tmp_path / "bfloat16.py"
    script.write_text(BFLOAT16)
    done = interpreted(script)
    assert done.returncode == 0, done.stderr
