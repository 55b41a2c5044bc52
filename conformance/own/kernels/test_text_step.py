"""A token of text that needs no gradient: another route through Flex-MA with the same results, which
overwrites a donated state.
"""

from __future__ import annotations

import copy
import subprocess
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from linmu import optimized, reference
from linmu.optimized.decoding.operator import pooled_text_step
from linmu.optimized.elementwise.operator import MixInputs, mix_branches
from linmu.optimized.engine.once import one_forward
from linmu.optimized.projections import join_columns, join_weights, token_output
from linmu.reference import FlexMAState
from linmu.reference.flex_ma import DonatedState
from linmu.reference.student.cache import CACHE_NAME

from ...harness.compare import assert_exact, assert_matches, assert_same
from ...harness.layouts import Layout, Text
from ...harness.module_cases import ModuleCase, RoundedCase, initial, module_cases, random_module
from ...harness.operator_cases import DTYPES, property_of
from ..student.tiny_checkpoint import build_teacher, every_kind, shake_mixers, words
from .interpreter.pools import pools_of, state_in_pool, states_in
from .test_kernels import interpreted

flex = partial(property_of, "FlexMA")
TOKENS = Layout(((Text(4),), (Text(4),), (Text(4),)))
VALID = torch.tensor([[True], [False], [True]])


def prefilled(module: nn.Module, case: ModuleCase) -> FlexMAState:
    """The state after three of the four tokens, no gradient to it."""
    angles = tuple(angle[:, :3] for angle in case.position_embeddings())
    with torch.no_grad():
        return module(case.hidden_states()[:, :3], position_embeddings=angles)[1]


def last_token(module: nn.Module, case: ModuleCase, state: FlexMAState, valid=VALID) -> dict[str, Tensor]:
    angles = tuple(angle[:, 3:] for angle in case.position_embeddings())
    y, state = module(case.hidden_states()[:, 3:], valid=valid, position_embeddings=angles, state=state)
    return {"output": y.detach(), "conv state": state.conv.detach(), "scan state": state.scan.detach()}


@flex(cases=module_cases(layout=TOKENS))
def test_a_step_gives_the_same_with_and_without_a_gradient(backend, case: ModuleCase):
    module = random_module(backend, "FlexMA", case)
    state = prefilled(module, case)
    for valid in (VALID, torch.ones_like(VALID), None):
        wanted = last_token(module, case, state, valid)
        with torch.no_grad():
            assert_same(last_token(module, case, state, valid), wanted, case)
        with torch.inference_mode():
            assert_same(last_token(module, case, state, valid), wanted, case)


@flex(cases=module_cases(DTYPES, layout=TOKENS))
def test_a_step_without_a_gradient_matches_the_reference(backend, case: ModuleCase):
    """In every dtype, about as near to the truth as the reference."""
    module = random_module(backend, "FlexMA", case)
    own, wide = (initial(reference, "FlexMA", case) for _ in range(2))
    for twin in (own, wide):
        twin.load_state_dict(module.state_dict())
    state = prefilled(own, case)
    exact = FlexMAState(*(tensor.double() for tensor in state))
    with torch.no_grad():
        truth = last_token(wide.double(), RoundedCase(case), exact)
        assert_matches(last_token(module, case, state), truth, last_token(own, case, state), case)


@flex(cases=module_cases(("float32", "mixed"), layout=TOKENS))
def test_a_state_is_overwritten_only_if_it_is_lent(backend, case: ModuleCase):
    """A caller's own state is as it was, and gives the same again; a donated one gives the same, once."""
    module = random_module(backend, "FlexMA", case)
    state = prefilled(module, case)
    before = copy.deepcopy(state)
    with torch.no_grad():
        wanted = last_token(module, case, state)
        for name, kept, tensor in zip(state._fields, before, state, strict=True):
            assert_exact(tensor, kept, case, name)
        found = last_token(module, case, DonatedState(*state))
    for name, tensor in found.items():
        assert_exact(tensor, wanted[name], case, name)


@pytest.mark.parametrize("window", [0, 1, 4])
@pytest.mark.parametrize("taps", [0, 1, 4])
@torch.no_grad()
def test_states_in_a_pool_are_overwritten_there_and_no_others(taps, window):
    """As the plugin of vLLM keeps them; the kernels' turn is in trial_step.py."""
    torch.manual_seed(0)
    sizes = {"width": 8, "heads": 4, "groups": 2, "head_dim": 4}
    config = optimized.LinMUConfig(**sizes, text_window=window, conv_kernel=taps)
    block, u = optimized.MMATE(config, 0), torch.randn(3, 12, 8)
    angle = torch.randn(3, 12, 4)
    angles = angle.cos(), angle.sin()
    valid = torch.arange(5) >= torch.tensor([[0], [3], [4]])
    _, state = block(u[:, :5], valid=valid, position_embeddings=tuple(each[:, :5] for each in angles))
    pooled = state_in_pool(state, taps, turn := torch.tensor([5, 2, 1]))
    for step in range(5, 12):  # a ring comes round
        now = tuple(each[:, step : step + 1] for each in angles)
        wanted, state = block(u[:, step : step + 1], position_embeddings=now, state=state)
        found, _ = block(u[:, step : step + 1], position_embeddings=now, state=pooled)
        turn += 1
        torch.testing.assert_close(found, wanted)
    wanted = {"conv": state.conv, "scan": state.scan} | (state.window._asdict() if window else {})
    for name, tensor in states_in(pooled, turn).items():
        torch.testing.assert_close(tensor, wanted[name].to(tensor.dtype))
        assert pools_of(pooled)[name][::2].isnan().all()


def test_a_compiler_is_told_that_what_an_operator_overwrites_may_be_absent():
    schema = str(pooled_text_step.registered._opoverload._schema)
    assert "Tensor(a!) scan_pool, Tensor(b!)? conv_pool" in schema and "Tensor(c!)? out" in schema


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_weights_laid_end_to_end_make_one_product_of_a_token_of_many_rows(bias, monkeypatch):
    """They stay the modules' own: what is loaded into them later is what is multiplied."""
    torch.manual_seed(0)
    config = optimized.LinMUConfig(
        width=8, heads=4, groups=2, head_dim=4, text_window=3, qkv_bias=bias, output_gate=True
    )
    block, u = optimized.MMATE(config, 0), torch.randn(6, 4, 8)
    angle = torch.randn(6, 4, 4)
    before, last = ((angle[:, part].cos(), angle[:, part].sin()) for part in (slice(3), slice(3, 4)))
    _, state = block(u[:, :3], position_embeddings=before)
    groups, joined = block.joined_linears(), {}
    with torch.inference_mode(), one_forward(joined):
        join_weights([groups])
        join_columns([block.output_linears()])
    assert len(joined) == 2
    for linears in (*groups, block.output_linears()):
        assert len({linear.weight.untyped_storage().data_ptr() for linear in linears}) == 1
    block.flex_ma.k_proj.weight.data.copy_(torch.randn(8, 8))
    block.local_swin.o_proj.weight.data.copy_(torch.randn(8, 16))
    wanted, after = block(u[:, 3:], position_embeddings=last, state=state)
    calls, own = [], torch.nn.functional.linear
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda *args: calls.append(args[1].shape) or own(*args)
    )
    with one_forward(joined):
        found, afterwards = block(u[:, 3:], position_embeddings=last, state=state)
    assert (64, 8) in calls and (16, 8) in calls  # v, k and q of both branches; the gate
    assert calls.count((8, 32)) == 1 and len(calls) == 5, calls  # both outputs; dt and mix in float32
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    for got, want in zip(afterwards.tensors, after.tensors, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_one_output_product_is_as_near_to_the_truth_as_two_that_are_mixed():
    """In bfloat16, which heads are rounded to again when they have been scaled; the kernels' turn is in
    trial_step.py.
    """
    torch.manual_seed(0)
    linears = [nn.Linear(96, 256, bias=False).bfloat16() for _ in range(2)]
    heads, logit = torch.randn(2, 6, 1, 96).bfloat16(), torch.randn(6, 1, 1)
    row = torch.arange(6)[:, None]
    row[1] = -1
    exact = [each.double() @ linear.weight.double().T for each, linear in zip(heads, linears, strict=True)]
    both = [linear(each) for each, linear in zip(heads, linears, strict=True)]
    truth, mixed = (mix_branches(MixInputs(*each, logit, row)) for each in (exact, both))
    with one_forward():
        join_columns([linears])
        found = token_output(*heads, logit, row, linears, None)
    assert (found - truth).norm() < 1.5 * (mixed - truth).norm()
    torch.testing.assert_close(found[1], mixed[1])


@flex(cases=module_cases(["float32"], layout=TOKENS), share=0.3)
def test_a_state_that_autograd_or_inference_mode_holds_is_left_as_it_was(backend, case: ModuleCase):
    module = random_module(backend, "FlexMA", case)
    with torch.inference_mode():
        made_there = DonatedState(*prefilled(module, case))
    recorded = DonatedState(*(tensor.clone().requires_grad_() for tensor in prefilled(module, case)))
    for state in (made_there, recorded):
        before = copy.deepcopy([tensor.detach().clone() for tensor in state])
        with torch.no_grad():
            last_token(module, case, state)
        for kept, tensor in zip(before, state, strict=True):
            assert_exact(tensor.detach(), kept, case, "state")


def watched(linear: nn.Module) -> nn.Module:
    linear.register_forward_hook(lambda module, args, output: output)
    return linear


def adapted(linear: nn.Module) -> nn.Module:
    class Adapted(nn.Linear):
        def forward(self, u: Tensor) -> Tensor:
            return 2 * super().forward(u)

    linear.__class__ = Adapted
    return linear


@pytest.mark.parametrize("change", [watched, adapted])
@torch.no_grad()
def test_projections_that_are_more_than_their_weights_are_called(change):
    """Hooks and adapters take part in a step as in any other call."""
    torch.manual_seed(0)
    config = optimized.LinMUConfig(width=8, heads=4, groups=2, head_dim=4, output_gate=True)
    module = optimized.FlexMA(config, 0)
    u = torch.randn(2, 5, 8)
    _, state = module(u[:, :4])
    for name in ("q_proj", "v_proj", "dt_proj", "z_proj"):
        setattr(module, name, change(getattr(module, name)))
    whole, _ = module(u)
    _, state = module(u[:, :4])
    step, _ = module(u[:, 4:], state=state)
    torch.testing.assert_close(step, whole[:, 4:])


@torch.no_grad()
def test_a_cache_steps_in_its_own_memory_and_a_copy_in_another():
    student = shake_mixers(optimized.convert(build_teacher()))
    cache = student(**every_kind(), use_cache=True)[CACHE_NAME]
    held = [layer.state.scan for layer in cache.layers]
    other = copy.deepcopy(cache)
    first = {"input_ids": torch.tensor([words(1, 5)] * len(held[0]))}
    wanted = student(**first, **{CACHE_NAME: cache}).logits
    assert all(layer.state.scan is scan for layer, scan in zip(cache.layers, held, strict=True))
    assert torch.equal(student(**first, **{CACHE_NAME: other}).logits, wanted)
    with torch.inference_mode():
        inside = student(**every_kind(), use_cache=True)[CACHE_NAME]
    torch.testing.assert_close(student(**first, **{CACHE_NAME: inside}).logits, wanted)


@torch.no_grad()
def test_beams_that_grow_from_one_row_do_not_share_their_states():
    student = shake_mixers(optimized.convert(build_teacher()))
    prompt = {"input_ids": torch.tensor([words(7, 0)])}
    cache = student(**prompt, use_cache=True)[CACHE_NAME]
    cache.batch_repeat_interleave(3)
    cache.reorder_cache(torch.tensor([1, 1, 0]))
    tokens = torch.tensor([[token] for token in words(3, 9)])
    found = student(input_ids=tokens, **{CACHE_NAME: cache}).logits[:, -1]
    rows = torch.cat([prompt["input_ids"].expand(3, -1), tokens], dim=1)
    torch.testing.assert_close(found, student(input_ids=rows).logits[:, -1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed"])
def test_the_kernels_of_a_step_equal_the_reference_in_the_interpreter(dtype):
    done: subprocess.CompletedProcess = interpreted("trial_step", dtype)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "linmu.optimized: triton engine" in done.stderr
