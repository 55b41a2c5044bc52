"""A lesson on the Triton kernels, run by Triton's interpreter, teaches what the reference's teaches."""

from __future__ import annotations

import pytest
import torch

from linmu.optimized.elementwise.operator import GateInputs, NormInputs, frozen_norm, gate_product
from linmu.optimized.losses.operator import ErrorInputs, squared_errors

from ..forks import INTERPRETER, TRIALS, run_forked


@pytest.mark.parametrize("what", ["KERNELS", "PACKED"])
def test_a_lesson_on_kernels_equals_the_references(what, request):
    """Norms, gates, errors, adapters, the teacher's attention: values and gradients. Packed rows have padding
    too; with --thorough padding by itself, and images and videos."""
    more = ("PADDED", "VISION") if request.config.getoption("thorough") and what == "PACKED" else ()
    for each in (what, *more):
        done = run_forked(INTERPRETER, f"{TRIALS}.trial_lesson", each)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compiled kernels run on a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("width", [576, 3584])
def test_compiled_kernels_of_a_lesson_are_the_torch_engines(dtype, width):
    """Each step is rounded where torch rounds it: what differs is the order of one sum."""
    x, other = (torch.randn(2, 300, width, device="cuda").to(dtype).requires_grad_() for _ in range(2))
    weight, taken = torch.rand(width, device="cuda").to(dtype), torch.rand(2, 300, device="cuda") < 0.7
    for operator, inputs, leaves in (
        (frozen_norm, NormInputs(x, weight, 1e-6), [x]),
        (gate_product, GateInputs(x, other), [x, other]),
        (squared_errors, ErrorInputs(x, other.detach(), taken), [x]),
    ):
        found = []
        for engine in ("triton", "torch"):
            outputs = operator(inputs._replace(engine=engine))
            first = outputs[0] if isinstance(outputs, tuple) else outputs
            gradients = torch.autograd.grad(first, leaves, first.detach().sign() * weight.mean())
            found.append((first.detach(), gradients))
        torch.testing.assert_close(*found)
