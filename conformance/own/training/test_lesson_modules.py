"""What an optimized lesson puts over Hugging Face's modules gives their results, and goes when it ends."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from linmu import optimized, reference
from linmu.optimized.elementwise.shared_products import Part, shared_products
from linmu.optimized.lesson_modules import part_of, replace_methods, restore_methods
from linmu.reference.training.safety.memory import recompute_layers

from ..student.tiny_checkpoint import build_teacher, every_kind, shake, shake_mixers

TOGETHER = reference.Objective(mixer=1.0, layer=0.5, logits=2.0, end_to_end=True)
ADAPTERS = {"r": 3, "lora_alpha": 6, "target_modules": r".*language_model.*(gate_proj|up_proj|down_proj)"}


@pytest.fixture(scope="module")
def decoder() -> nn.Module:
    """In bfloat16, with adapters in float32, as they are trained."""
    model = build_teacher(num_hidden_layers=1).bfloat16()
    get_peft_model(model, LoraConfig(**ADAPTERS))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return shake(model, ("lora_B.default.weight", "layernorm.weight")).get_decoder()


def found(module: nn.Module, width: int = 32) -> list[torch.Tensor]:
    """Output, and gradients of the input and of what is trained."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, width).bfloat16().requires_grad_()
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(x)
    step = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype)
    return [y, *torch.autograd.grad(y, [x, *trained], step)]


def assert_near(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    """To the rounding of some steps in bfloat16."""
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine.dtype == theirs.dtype
        assert (mine - theirs).norm() <= 1e-2 * theirs.norm()


@pytest.mark.parametrize("name", ["input_layernorm", "mlp"])
def test_a_module_gives_what_hugging_faces_gives(decoder, name):
    module = getattr(decoder.layers[0], name)
    wanted, replaced = found(module), replace_methods(decoder)
    assert (module, "forward") in replaced
    assert_near(found(module), wanted)
    restore_methods(replaced)
    assert "forward" not in vars(module)


def test_a_trained_norm_has_its_gradient(decoder):
    norm = decoder.layers[0].input_layernorm
    norm.weight.requires_grad_(True)
    wanted, replaced = found(norm), replace_methods(decoder)
    for mine, theirs in zip(found(norm), wanted, strict=True):
        assert torch.equal(mine, theirs)
    restore_methods(replaced)
    norm.weight.requires_grad_(False)


def off(linear: nn.Module) -> None:
    linear.enable_adapters(False)


def merged(linear: nn.Module) -> None:
    linear.merge()


def dropped_out(linear: nn.Module) -> None:
    linear.lora_dropout["default"] = nn.Dropout(0.0)


def followed(linear: nn.Module) -> None:
    linear.lora_A["default"].register_forward_hook(lambda module, args, output: 2 * output)


@pytest.mark.parametrize("change", [off, merged, dropped_out, followed])
def test_adapters_that_are_not_plain_do_what_they_do(change):
    torch.manual_seed(0)
    mlp = build_teacher(num_hidden_layers=1).get_decoder().layers[0].mlp
    get_peft_model(mlp, LoraConfig(**ADAPTERS | {"target_modules": ["gate_proj", "up_proj", "down_proj"]}))
    shake(mlp, ("lora_B.default.weight",))
    change(mlp.up_proj)
    x = torch.randn(2, 5, 32)
    wanted, replaced = mlp(x), replace_methods(mlp)
    assert replaced and (part_of(mlp.up_proj) is None) == (change in (dropped_out, followed))
    torch.testing.assert_close(mlp(x), wanted)


def test_products_of_one_input_have_the_gradients_of_autograd():
    """Biases and adapters or none, scales, and what is not trained."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    parts = [
        Part(drawn(4, 5), drawn(4), drawn(2, 5), drawn(4, 2), 1.5),
        Part(drawn(3, 5).detach(), None, drawn(2, 5), drawn(3, 2)),
        Part(drawn(6, 5), drawn(6)),
    ]
    leaves = [x, *(t for part in parts for t in part[:4] if t is not None and t.requires_grad)]
    plain = []
    for weight, bias, down, up, scale in parts:
        y = torch.nn.functional.linear(x, weight, bias)
        plain.append(y if down is None else y + scale * (x @ down.T @ up.T))
    got = shared_products(x, parts)
    steps = [torch.randn_like(y) for y in plain]
    for mine, theirs in zip(
        (*got, *torch.autograd.grad(got, leaves, steps)),
        (*plain, *torch.autograd.grad(plain, leaves, steps)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("recomputed", [False, True])
def test_a_lesson_teaches_what_the_references_teaches(recomputed):
    """On the torch engine, with adapters; layers recomputed or not."""
    results = []
    for backend in (reference, optimized):
        teacher = build_teacher(num_hidden_layers=1)
        student = shake_mixers(backend.convert(teacher, {"text_window": 4}))
        backend.attach_teacher(student, teacher)
        student.requires_grad_(False)
        torch.manual_seed(1)
        get_peft_model(student, LoraConfig(**ADAPTERS))
        shake(student, ("lora_B.default.weight",))
        for name, parameter in student.named_parameters():
            parameter.requires_grad_("lora_" in name or ".mixer." in name)
        if recomputed and backend is optimized:
            recompute_layers(student)
        inputs = every_kind("right")
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        lesson = backend.Lesson(student.train(), TOGETHER)
        if backend is optimized:
            lesson.replaced = replace_methods(student.get_decoder())
        terms = lesson(labels=labels, **inputs)
        terms["loss"].backward()
        lesson.close()
        assert not any("forward" in vars(module) for module in student.get_decoder().modules())
        trained = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
        results.append({name: value.detach() for name, value in (terms | trained).items()})
    wanted, got = results
    assert wanted.keys() == got.keys()
    for name, expected in wanted.items():
        assert (got[name] - expected).norm() <= 1e-4 * expected.norm().clamp_min(1e-6), name
