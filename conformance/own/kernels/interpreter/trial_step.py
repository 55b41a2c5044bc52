"""Run one token of text through linmu.optimized's Triton kernels in the interpreter, watched, against the
reference: outputs and states; and a layer's norm and gate against the torch engine. Started by
test_text_step.py.

    TRITON_INTERPRET=1 python trial_step.py DTYPE
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
from torch import Tensor, nn

from linmu import optimized, reference
from linmu.optimized.decoding.kernels import text_step as text_step_kernels
from linmu.optimized.decoding.operator import OutputInputs, text_output
from linmu.optimized.elementwise import kernels as elementwise_kernels
from linmu.optimized.elementwise import kernels_layer as layer_kernels
from linmu.optimized.elementwise.operator import (
    AddNormInputs,
    GateInputs,
    HeadsInputs,
    add_norm,
    gate_product,
    scale_heads,
)
from linmu.optimized.engine.once import one_forward
from linmu.optimized.engine.operator import Operator
from linmu.optimized.flex_ma import PooledState
from linmu.optimized.m_mate import PooledMMATEState
from linmu.optimized.projections import join_columns, join_weights
from linmu.reference import FlexMAState
from linmu.reference.flex_ma import DonatedState
from linmu.reference.m_mate import DonatedMMATEState, MMATEState
from linmu.reference.sliding_window_attention import DonatedWindowState, WindowState

from ....harness.compare import Results, assert_matches
from ....harness.layouts import Layout, Text
from ....harness.module_cases import WIDTH, ModuleCase, RoundedCase, initial, random_module
from . import mend_bfloat16, mend_scalars, watch_memory
from .pools import pools_of, state_in_pool, states_in
from .trial import shrink_blocks

SIZES = {"width": WIDTH, "heads": 4, "groups": 2, "head_dim": 6}
OPTIONS = (
    {"qkv_bias": True},
    {"scan_rope": True, "output_gate": True, "qk_norm": True, "head_norm": False},
    {"conv_kernel": 0, "output_gate": True},
    {"conv_kernel": 2, "qkv_bias": True},
    {"conv_kernel": 1, "output_bias": True},
)
BATCHES = (1, 2, 3, 5)  # the last one has too many rows for a launch of all projections


def step(module: nn.Module, u: Tensor, valid: Tensor | None, angles, state: FlexMAState) -> Results:
    y, state = module(u, valid=valid, position_embeddings=angles, state=state)
    return {"output": y, "conv state": state.conv, "scan state": state.scan}


def check_pools(
    module: nn.Module, u: Tensor, valid: Tensor | None, angles, state: MMATEState, wanted: Results
) -> None:
    """As donated, in pools, whose other rows nobody touches; then with what a scan's pool keeps rounded."""
    taps, turn = module.config.conv_kernel, torch.arange(len(u)) + 5
    pooled = given_to(module, state_in_pool(state, taps, turn))
    with watch_memory():
        y, _ = module(u, valid=valid, position_embeddings=angles, state=pooled)
    there = slice(None) if valid is None else valid[:, 0]
    close = {"rtol": 1e-2, "atol": 1e-2} if y.dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(y[there], wanted["output"][there], **close)
    pooled = pooled if isinstance(pooled, PooledMMATEState) else PooledMMATEState(*pooled, None)
    after = turn + (1 if valid is None else valid[:, 0].long())
    for name, tensor in states_in(pooled, after).items():
        torch.testing.assert_close(tensor, wanted[name].to(tensor.dtype), **close)
        assert pools_of(pooled)[name][::2].isnan().all(), name
    rounded = given_to(module, state_in_pool(state._replace(scan=state.scan.bfloat16()), taps, turn))
    short, _ = module(u, valid=valid, position_embeddings=angles, state=rounded)
    torch.testing.assert_close(short[there].float(), y[there].float(), rtol=3e-2, atol=3e-2)


def given_to(module: nn.Module, state: PooledMMATEState) -> PooledMMATEState | PooledState:
    """What a module takes of a block's state."""
    return state if hasattr(module, "flex_ma") else state.flex_ma


def check_block(dtype: str) -> None:
    """A whole block, whose window branch and mix are one launch of projections, too; with few rows."""
    for batch, options in ((1, {"qkv_bias": True}), (3, {}), (5, {"qkv_bias": True}), (2, {"qk_norm": True})):
        config = reference.LinMUConfig(**SIZES, **options, text_window=4)
        case = ModuleCase(Layout(((Text(1),),) * batch), config, 0, dtype, seed=batch)
        module = random_module(optimized, "MMATE", case)
        own, wide = (initial(reference, "MMATE", case) for _ in range(2))
        for twin in (own, wide):
            twin.load_state_dict(module.state_dict())
        u, valid = case.hidden_states(), torch.arange(batch)[:, None] % 3 != 1
        near = [torch.randn(batch, 3, 2, 6).to(u.dtype) for _ in range(2)]
        taps = torch.randn(batch, config.conv_kernel - 1, config.conv_channels)
        window = WindowState(*near, torch.ones(batch, 3, dtype=torch.bool))
        state = MMATEState(taps, torch.randn(batch, 4, 6, 6), window)
        exact = RoundedCase(case)
        exact_window = WindowState(*(tensor.double() for tensor in near), window.present)
        exact_state = MMATEState(taps.double(), state.scan.double(), exact_window)
        angles = case.position_embeddings(), exact.position_embeddings()
        truth = block_step(wide.double(), exact.hidden_states(), valid, angles[1], exact_state)
        wanted = block_step(own, u, valid, angles[0], state)
        donated = DonatedMMATEState(
            *map(torch.clone, state[:2]), DonatedWindowState(*map(torch.clone, window))
        )
        optimized.set_engine("triton")
        spoilt = u.where(valid[..., None], float("nan"))
        with watch_memory(), one_forward():
            join_columns([module.output_linears()])  # of five rows both outputs are one product
            got = block_step(module, spoilt, valid, angles[0], donated)
        with one_forward():  # as the plugin of vLLM has them
            join_weights([module.joined_linears()])
            join_columns([module.output_linears()])
            check_pools(module, spoilt, valid, angles[0], state, got)
        optimized.set_engine(None)
        for results in (got, truth, wanted):
            results["output"] = results["output"].where(valid[..., None], 0)
        assert_matches(got, truth, wanted, case)


def block_step(module: nn.Module, u: Tensor, valid: Tensor, angles, state: MMATEState) -> Results:
    y, (conv, scan, (k, v, present)) = module(u, valid=valid, position_embeddings=angles, state=state)
    return {"output": y, "conv": conv, "scan": scan, "k": k, "v": v, "present": present.to(scan.dtype)}


def check_layer_kernels(dtype: torch.dtype) -> None:
    """Rows shorter and longer than a warp, memory in other orders; equal to the order of one sum."""
    for shape in ((2, 3, 5), (1, 2, 300), (3, 64)):
        x, more, up = (torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype)[..., ::2] for _ in range(3))
        weight = torch.randn(shape[-1]).to(dtype)
        for given in ((add_norm, AddNormInputs(x, more, weight, 1e-6)), (gate_product, GateInputs(x, up))):
            compare_engines(*given)
        compare_engines(add_norm, AddNormInputs(x, None, weight, 1e-2))


def check_output(dtype: torch.dtype) -> None:
    """Both output projections and the mix, by the two kernels: rows of weights further apart than they are
    long, values that nobody may read on a row that is not mixed; in bfloat16 as near to the truth as both
    products apart.
    """
    for batch, size, width in ((1, 7, 300), (2, 8, 64), (3, 5, 6), (4, 9, 128)):
        flex, local = torch.randn(2, batch, 2 * width).to(dtype)[..., ::2]
        weights = [torch.randn(size, 3 * width).to(dtype)[:, width : 2 * width] for _ in range(2)]
        biases = [None, None] if batch % 2 else list(torch.randn(2, size).to(dtype))
        logit, row = torch.randn(batch, 3)[:, 1:2], torch.arange(batch)
        row[1:2] = -1
        spoilt = local.where(row[:, None] >= 0, float("nan"))
        given = OutputInputs(flex, local, logit, row, weights, biases)
        exact = given._replace(
            flex=flex.double(),
            local=local.double(),
            weights=[weight.double() for weight in weights],
            biases=[bias if bias is None else bias.double() for bias in biases],
            engine="torch",
        )
        truth, apart = text_output(exact), text_output(given._replace(engine="torch"))
        with watch_memory():
            found = text_output(given._replace(local=spoilt, engine="triton"))
            heads = scale_heads(HeadsInputs(flex, spoilt, logit, row, "triton"))
        wanted = scale_heads(HeadsInputs(flex, local, logit, row, "torch"))
        torch.testing.assert_close(heads, wanted)
        rounding = 1.5 * (apart - truth).norm() + 1e-6 * truth.norm()
        assert found.dtype == dtype and (found - truth).norm() < rounding, (batch, size, width)


def compare_engines(operator: Operator, inputs: NamedTuple) -> None:
    with watch_memory():
        found = operator(inputs._replace(engine="triton"))
    wanted = operator(inputs._replace(engine="torch"))
    torch.testing.assert_close(found, wanted)


@torch.no_grad()
def main(dtype: str) -> None:
    """Raises the AssertionError of the first case that fails."""
    mend_bfloat16()
    mend_scalars()
    shrink_blocks()
    layer_kernels.BLOCK = elementwise_kernels.BLOCK = 64
    if dtype != "mixed":
        check_layer_kernels(getattr(torch, dtype))
        check_output(getattr(torch, dtype))
    for rows, outputs in text_step_kernels.OUTPUTS.items():
        text_step_kernels.ELEMENTS[rows] = 2 * rows * outputs  # three steps along the width
    check_block(dtype)
    for batch in BATCHES:
        for index, options in enumerate(OPTIONS):
            if (
                batch in (2, 3) and (batch + index) % 2
            ):  # each option with fewest rows, with most, and one between
                continue
            config = reference.LinMUConfig(**SIZES, **options)
            layout = Layout(((Text(1),),) * batch)
            case = ModuleCase(layout, config, 0, dtype, seed=index)
            module = random_module(optimized, "FlexMA", case)
            own, wide = (initial(reference, "FlexMA", case) for _ in range(2))
            for twin in (own, wide):
                twin.load_state_dict(module.state_dict())
            taps = max(config.conv_kernel - 1, 0)
            state = FlexMAState(torch.randn(batch, taps, config.conv_channels), torch.randn(batch, 4, 6, 6))
            u, angles = case.hidden_states(), case.position_embeddings()
            valid = torch.arange(batch)[:, None] % 3 != 1 if index % 2 == 0 else None
            exact = RoundedCase(case)
            truth_state = FlexMAState(*(tensor.double() for tensor in state))
            exact_angles = exact.position_embeddings()
            truth = step(wide.double(), exact.hidden_states(), valid, exact_angles, truth_state)
            wanted = step(own, u, valid, angles, state)
            if valid is not None:
                u = u.where(valid[..., None], float("nan"))
            optimized.set_engine("triton")
            with watch_memory():
                donated = DonatedState(*(tensor.clone() for tensor in state))
                got = step(module, u, valid, angles, donated)
            named = {"output": got["output"], "conv": got["conv state"], "scan": got["scan state"]}
            check_pools(module, u, valid, angles, MMATEState(*state, None), named)
            optimized.set_engine(None)
            assert got["scan state"] is donated.scan
            if valid is not None:
                for results in (got, truth, wanted):
                    results["output"] = results["output"].where(valid[..., None], 0)
            assert_matches(got, truth, wanted, case)


if __name__ == "__main__":
    torch.manual_seed(0)
    main(sys.argv[1])
