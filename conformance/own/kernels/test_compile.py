"""torch.compile(fullgraph=True) takes every operator and a whole block as one graph, forward and backward.

Here on the CPU and without a code generator: what is tested is that nothing breaks the graph, and that the
fake implementations promise what the operators give. test_gpu.py compiles for real.
"""

from __future__ import annotations

import pytest
import torch

from linmu import optimized

from ...harness.compare import assert_same, evaluate
from .gpu_cases import OPERATORS, arguments, block


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch.compiler.reset()


@pytest.mark.parametrize("operator", OPERATORS)
def test_operators_are_one_graph(operator):
    given = arguments(operator, "float32", heads=4, groups=2, head_dim=6, length=233, device="cpu")
    eager = getattr(optimized, operator)
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    found, wanted = (evaluate(function, given, gradients=True) for function in (compiled, eager))
    assert_same(found, wanted, operator)


@pytest.mark.parametrize("options", [{}, {"scan_rope": True, "output_gate": True, "qk_norm": True}])
def test_a_block_is_one_graph(options):
    run = block(torch.float32, "cpu", **options)
    given = {"hidden_states": torch.randn(2, 300, 256)}
    wanted = evaluate(run, given, gradients=True)  # and the layout has computed its orders and windows
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_same(evaluate(compiled, given, gradients=True), wanted, options)
