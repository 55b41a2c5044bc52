"""Run linmu.optimized's Lesson on its Triton kernels in the interpreter, watched, against the reference:
losses and the gradient of every parameter. Started by test_lesson_kernels.py.

    TRITON_INTERPRET=1 python trial_lesson.py KERNELS|PADDED|PACKED|VISION
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from linmu import optimized, reference
from linmu.optimized.elementwise import kernels_layer
from linmu.optimized.elementwise.operator import GateInputs, NormInputs, frozen_norm, gate_product
from linmu.optimized.engine.operator import Operator
from linmu.optimized.losses import kernels_hidden
from linmu.optimized.losses.operator import ErrorInputs, squared_errors

from ...student.tiny_checkpoint import build_teacher, every_kind, shake, shake_mixers
from . import mend_bfloat16, mend_scalars, watch_memory
from .trial import shrink_blocks

TOGETHER = reference.Objective(mixer=1.0, layer=0.5, logits=2.0, end_to_end=True)
TEXT = LlamaConfig(
    vocab_size=31,
    hidden_size=24,
    intermediate_size=20,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.3,
)
MLPS = r".*layers\.\d+\.mlp\.(gate_proj|up_proj|down_proj)"


def check_kernels() -> None:
    """Each against the torch engine, values and gradients: rows shorter and longer than a block, memory in
    other orders, tokens that do not count."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shape in ((2, 3, 5), (1, 2, 300)):
            x, other = (torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype)[..., ::2] for _ in range(2))
            weight, taken = torch.randn(shape[-1]).to(dtype), torch.rand(shape[:2]) < 0.6
            compare_engines(frozen_norm, NormInputs(x, weight, 1e-2), ["x"])
            compare_engines(gate_product, GateInputs(x, other), ["gate", "up"])
            compare_engines(squared_errors, ErrorInputs(x, other, None), ["student"])
            nothing = x.masked_fill(~taken[..., None], float("nan"))
            compare_engines(squared_errors, ErrorInputs(nothing, other, taken), ["student"])


def compare_engines(operator: Operator, inputs: NamedTuple, names: Sequence[str]) -> None:
    """Outputs, and gradients of the inputs of these names."""
    found = []
    for engine in ("triton", "torch"):
        leaves = {name: getattr(inputs, name).detach().clone().requires_grad_() for name in names}
        with watch_memory():
            outputs = operator(inputs._replace(engine=engine, **leaves))
            first = outputs[0] if isinstance(outputs, tuple) else outputs
            step = torch.linspace(-1, 1, first.numel()).view(first.shape).to(first.dtype)
            gradients = torch.autograd.grad(first, list(leaves.values()), step)
        found.append((outputs, gradients))
    torch.testing.assert_close(*found)


def text_teacher() -> nn.Module:
    torch.manual_seed(0)
    return shake(LlamaForCausalLM(TEXT).eval(), ("layernorm.weight", "norm.weight"))


def text(packed: bool) -> dict[str, Tensor]:
    """Two rows of 11 tokens; padding before and after them; and two samples a row, if packed."""
    ids = torch.randint(1, 31, (2, 11))
    mask = torch.ones_like(ids)
    mask[0, :2], mask[1, -3:] = 0, 0
    if not packed:
        return {"input_ids": ids, "attention_mask": mask}
    sequence = (torch.arange(11) >= torch.tensor([[5], [7]])).long()
    return {"input_ids": ids, "attention_mask": mask, "linmu_sequence": sequence}


def taught(backend: ModuleType, teacher: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The losses of one batch, and the gradients of M-MATE and of adapters."""
    student = shake_mixers(backend.convert(teacher, {"text_window": 5, "scan_rope": True}))
    backend.attach_teacher(student, teacher)
    student.requires_grad_(False)
    torch.manual_seed(1)
    get_peft_model(student, LoraConfig(r=3, lora_alpha=6, target_modules=MLPS))
    shake(student, ("lora_B.default.weight",))
    for name, parameter in student.named_parameters():
        parameter.requires_grad_("lora_" in name or ".mixer." in name)
    valid = inputs["attention_mask"].bool()
    known = valid & valid.roll(1, 1)  # what padding predicts is anybody's guess
    labels = inputs["input_ids"].masked_fill(~known, -100)
    lesson = backend.Lesson(student.train(), TOGETHER)
    found = lesson(labels=labels, **inputs)
    found["loss"].backward()
    assert backend is reference or {name for _, name in lesson.replaced} == {"forward", "project_heads"}
    lesson.close()
    left = {"forward", "project_heads"}
    assert not any(left & vars(module).keys() for module in student.get_decoder().modules())
    trained = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    return {name: value.detach() for name, value in (found | trained).items()}


def main(what: str) -> None:
    """Raises the AssertionError of the first case that fails."""
    shrink_blocks()
    mend_bfloat16()
    mend_scalars()
    kernels_layer.BLOCK, kernels_hidden.BLOCK = 64, 16
    if what == "KERNELS":
        return check_kernels()
    inputs = every_kind("right") if what == "VISION" else text(what == "PACKED")
    make = (lambda: build_teacher(num_hidden_layers=1)) if what == "VISION" else text_teacher
    wanted = taught(reference, make(), inputs)
    optimized.set_engine("triton")
    with watch_memory():
        got = taught(optimized, make(), inputs)
    assert wanted.keys() == got.keys()
    for name, expected in wanted.items():
        error = (got[name] - expected).norm() / expected.norm().clamp_min(1e-6)
        assert error < 1e-4, (name, error.item())


if __name__ == "__main__":
    torch.manual_seed(0)
    main(sys.argv[1])
