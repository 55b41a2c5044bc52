"""Weights that only their module can read: adapted ones, and quantised ones, count as they should."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import AutoModelForImageTextToText, TorchAoConfig

from linmu import optimized, reference
from linmu.reference.demo import TEACHER
from linmu.reference.numerics import full_precision_linear
from linmu.reference.prompts.processors import load_processor
from linmu.reference.student.model import FLOAT32_PARAMETERS

from .tiny_checkpoint import NEW_PARAMETERS, build_teacher, every_kind, logits_of, shake, shake_mixers

peft = pytest.importorskip("peft")
NARROW = ("dt_proj", "scan_gate_proj", "mix_proj")
PACKAGES = {"reference": reference, "optimized": optimized}


class Doubled(nn.Linear):
    """A linear whose weight says half of what it computes."""

    def forward(self, u: Tensor) -> Tensor:
        return 2 * super().forward(u)


class Double(nn.Module):
    """A parametrisation."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def adapted(linear: nn.Linear, **options) -> nn.Module:
    """A linear inside peft, its adapter not at its start."""
    torch.manual_seed(1)
    settings = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, **options)
    return peft.get_peft_model(
        nn.Sequential(linear), settings, autocast_adapter_dtype=False
    ).base_model.model[0]


def parametrized(linear: nn.Linear) -> nn.Module:
    parametrize.register_parametrization(linear, "weight", Double())
    return linear


def doubled(linear: nn.Linear) -> nn.Module:
    other = Doubled(linear.in_features, linear.out_features, linear.bias is not None).to(linear.weight.dtype)
    other.load_state_dict(linear.state_dict())
    return other


KINDS = {
    "plain": lambda linear: linear,
    "LoRA": adapted,
    "DoRA": lambda linear: adapted(linear, use_dora=True),
    "parametrised": parametrized,
    "a subclass": doubled,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of", [torch.bfloat16, torch.float32])
def test_a_narrow_product_is_its_modules_in_float32(kind, bias, dtype, of):
    torch.manual_seed(0)
    module = KINDS[kind](nn.Linear(16, 3, bias)).to(dtype)
    u = torch.randn(2, 5, 16).to(of)
    got = full_precision_linear(u, module)
    wanted = copy.deepcopy(module).double()(u.double())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
    got.sum().backward()
    assert all(p.grad is not None for p in module.parameters() if p.requires_grad)


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("name", NARROW)
def test_an_adapter_counts_before_it_is_merged_as_after(package, name):
    student = shake_mixers(PACKAGES[package].convert(build_teacher())).to(torch.bfloat16)
    plain = logits_of(student, inputs := bfloat16_inputs()).float()
    settings = peft.LoraConfig(r=4, target_modules=[name], init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(student, settings)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    before = logits_of(model.eval(), inputs).float()
    after = logits_of(model.merge_and_unload(), inputs).float()
    assert (before - plain).abs().max() > 0.1
    assert (before - after).abs().max() < 0.3 * (before - plain).abs().max()  # merging rounds to bfloat16


def bfloat16_inputs() -> dict[str, Tensor]:
    return {key: x.bfloat16() if x.is_floating_point() else x for key, x in every_kind().items()}


@torch.no_grad()
def divergence(model: nn.Module, other: nn.Module, inputs: dict[str, Tensor]) -> float:
    """KL(other | model), nats per token."""
    one, two = (m(**inputs).logits.flatten(0, 1).float().log_softmax(-1) for m in (model, other))
    return nn.functional.kl_div(one, two, log_target=True, reduction="batchmean").item()


@torch.no_grad()
def distance(model: nn.Module, other: nn.Module, inputs: dict[str, Tensor]) -> float:
    """Euclidean, of all logits."""
    return (model(**inputs).logits - other(**inputs).logits).norm().item()


def bitsandbytes(**options):
    pytest.importorskip("bitsandbytes", reason="needs the extra [quantised]")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**options)


def torchao(weight: str):
    quantization = pytest.importorskip("torchao.quantization", reason="needs the extra [quantised]")
    return TorchAoConfig(getattr(quantization, weight)())


def bitsandbytes_weight(weight: nn.Parameter) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state)


QUANTISERS = {  # and the weights by which they compute; 8 bits of bitsandbytes round activations, too
    "bitsandbytes, 8 bits": (lambda: bitsandbytes(load_in_8bit=True), None),
    "bitsandbytes, 4 bits": (
        lambda: bitsandbytes(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
        bitsandbytes_weight,
    ),
    "torchao, 8 bits": (lambda: torchao("Int8WeightOnlyConfig"), lambda weight: weight.dequantize()),
    "torchao, fp8": (lambda: torchao("Float8WeightOnlyConfig"), lambda weight: weight.dequantize()),
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[nn.Module, Path, dict[str, Tensor]]:
    """A student of the bundled teacher, whose widths suit quantisers; its folder, and a question."""
    teacher = AutoModelForImageTextToText.from_pretrained(TEACHER)
    student = shake(reference.convert(teacher), NEW_PARAMETERS, scale=0.02)
    folder = tmp_path_factory.mktemp("student")
    student.save_pretrained(folder)
    content = [
        {"type": "text", "text": "how many"},
        {"type": "image", "image": Image.new("RGB", (48, 48), "red")},
    ]
    inputs = load_processor(TEACHER).apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    return student, folder, dict(inputs)


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("quantiser", QUANTISERS)
@torch.no_grad()
def test_a_quantised_student_computes_by_its_rounded_weights(demo, quantiser, package):
    student, folder, inputs = demo
    settings, rounded_weight = QUANTISERS[quantiser]
    opened = PACKAGES[package].load(folder, quantization_config=settings(), device_map="cpu")
    assert type(opened.get_decoder().layers[0].self_attn.flex_ma.q_proj.weight) is not nn.Parameter
    if rounded_weight is None:
        assert divergence(opened, student, inputs) < 0.01
    else:
        plain = PACKAGES[package].load(folder)
        for name, module in opened.named_modules():
            if isinstance(module, nn.Linear) and type(module.weight) is not nn.Parameter:
                plain.get_submodule(name).weight.copy_(rounded_weight(module.weight))
        of_rounding = distance(plain, student, inputs)
        assert distance(opened, plain, inputs) < 0.1 * of_rounding  # bitsandbytes' sums are bfloat16
    own = dict(student.named_parameters())
    for name, parameter in opened.named_parameters():
        if any(part in name for part in FLOAT32_PARAMETERS):
            assert type(parameter) is nn.Parameter and torch.equal(parameter, own[name]), name
