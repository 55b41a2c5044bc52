"""What only a GPU can show of `optimized.accelerate`: real graphs, and the kernels that run in them alone."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers.generation import utils
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from linmu import optimized
from linmu.optimized.elementwise.operator import AddNormInputs, GateInputs, add_norm, gate_product
from linmu.optimized.sliding_window_attention.operator import StepInputs, attend_step

from .test_generation import PROMPTS
from .test_graphs import tokens
from .tiny_checkpoint import build_teacher, shake_mixers

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: nothing to capture")
FLOATS = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


def on_gpu(inputs: dict) -> dict:
    return {name: value.cuda() for name, value in inputs.items()}


def test_graphs_give_what_the_eager_student_gives():
    """Every prompt twice, others between: up to float32's rounding, since padding moves the chunks."""
    eager = shake_mixers(optimized.convert(build_teacher())).cuda()
    fast = optimized.accelerate(copy.deepcopy(eager))
    assert fast.prompt_layout is not None
    for _ in range(2):
        for inputs in map(on_gpu, [make() for make in PROMPTS.values()]):
            got, want = (torch.stack(tokens(student, **inputs).logits) for student in (fast, eager))
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * want.abs().max().item())
    assert len(fast.get_decoder().forward.graphs) > 1
    assert len(fast.model.visual.forward.graphs) > 0
    optimized.unaccelerate(fast)
    inputs = on_gpu(PROMPTS["image"]())
    assert torch.equal(tokens(fast, **inputs).sequences, tokens(eager, **inputs).sequences)


def test_generate_ends_where_the_eager_one_does_without_waiting_for_each_token(monkeypatch):
    """The host may be a token ahead: what it launches then reads what the one before has left."""
    eager = shake_mixers(optimized.convert(build_teacher())).cuda()
    fast = optimized.accelerate(copy.deepcopy(eager))
    waits = []
    monkeypatch.setattr(utils.StopCheck, "__call__", lambda *_: waits.append(1))
    inputs = on_gpu(PROMPTS["video"]())
    free = fast.generate(**inputs, do_sample=False, max_new_tokens=40)
    assert not waits
    monkeypatch.undo()
    for place in (-1, -20):  # known beforehand, and asked for
        ends = {"eos_token_id": int(free[0, place]), "pad_token_id": 0, "max_new_tokens": 40}
        found = [student.generate(**inputs, do_sample=False, **ends) for student in (fast, eager)]
        assert torch.equal(*found)


@FLOATS
@pytest.mark.parametrize("rows", [1, 300])
def test_a_layers_norm_and_gate_are_those_of_hugging_face(dtype, rows):
    """Each step is rounded where they round it: what differs is the order of one sum."""
    norm = Qwen2RMSNorm(3584, 1e-6).to("cuda", dtype)
    torch.nn.init.normal_(norm.weight)
    x, more = (torch.randn(2, rows, 3584, device="cuda").to(dtype) for _ in range(2))
    total, normed = add_norm(AddNormInputs(x, more, norm.weight, norm.variance_epsilon, "triton"))
    assert torch.equal(total, x + more)
    twice = max(2 * torch.finfo(dtype).eps, 1e-6)  # the order of the sum may turn both roundings
    torch.testing.assert_close(normed, norm(x + more), rtol=twice, atol=1e-5)
    gate, up = (torch.randn(2, rows, 4864, device="cuda").to(dtype) for _ in range(2))
    found, also = gate_product(GateInputs(gate, up, "triton")), max(twice, 1.3e-6)  # the last bit of exp may
    torch.testing.assert_close(found, F.silu(gate) * up, rtol=also, atol=1e-5)


@FLOATS
@pytest.mark.parametrize("window", [2, 40, 128])
@pytest.mark.parametrize("rows", [1, 8])
def test_a_tokens_window_is_the_torch_engines(dtype, window, rows):
    """Some tokens in a row, with holes in the state and rows without a token."""
    heads, groups, size = 28, 4, 128
    present = torch.rand(rows, window - 1, device="cuda") > 0.3
    near = [torch.randn(rows, window - 1, groups, size, device="cuda").to(dtype) for _ in range(2)]
    near = [tensor * present[..., None, None] for tensor in near]
    states = {engine: [*map(torch.clone, near), present] for engine in ("triton", "torch")}
    for _ in range(3):
        q, k, v = (torch.randn(rows, n, size, device="cuda").to(dtype) for n in (heads, groups, groups))
        masks = None, torch.rand(rows, device="cuda") > 0.2
        found = {}
        for engine, state in states.items():
            found[engine], state[2] = attend_step(
                StepInputs(q, k, v, *state, *masks, size**-0.5, engine=engine)
            )
        torch.testing.assert_close(found["triton"], found["torch"])
        for got, want in zip(*states.values(), strict=True):
            assert torch.equal(got, want)
