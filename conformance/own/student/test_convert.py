"""convert(): what a student takes from its teacher, how it trains, and what is refused."""

from __future__ import annotations

import copy
import importlib
import inspect

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from linmu import optimized
from linmu.reference import LinMUConfig, convert
from linmu.reference.student.model import FLOAT32_PARAMETERS, decoder_layers, mixers
from linmu.reference.student.unconverted_attention import causal_attention

from .tiny_checkpoint import (
    FAMILIES,
    IMAGE,
    build_teacher,
    every_kind,
    logits_of,
    picture,
    prompt,
    shake_mixers,
    words,
)

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def teacher(family):
    return build_teacher(family)


@pytest.fixture(scope="module")
def student(teacher):
    return shake_mixers(convert(teacher))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_student_without_converted_layers_is_its_teacher(teacher, side):
    inputs = every_kind(side)
    valid = inputs["attention_mask"].bool()
    got, want = (logits_of(model, inputs)[valid] for model in (convert(teacher, layers=[]), teacher))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    single = prompt(words(4, 0), picture(IMAGE, (1, 3, 2)), words(3, 1))
    assert torch.equal(logits_of(convert(teacher, layers=[]), single), logits_of(teacher, single))


def test_both_branches_start_from_the_attentions_weights_and_biases(teacher):
    for index, mixer in mixers(convert(teacher)).items():
        attention = decoder_layers(teacher)[index].self_attn
        for branch in (mixer.flex_ma, mixer.local_swin):
            for name in PROJECTIONS:
                given, copied = (dict(getattr(m, name).named_parameters()) for m in (attention, branch))
                assert given.keys() == copied.keys()
                assert all(torch.equal(given[key], copied[key]) for key in given)
                assert ("bias" in copied) == (name != "o_proj")
    assert all(attention.q_proj.bias.abs().max() > 0 for attention in (decoder_layers(teacher)[0].self_attn,))


def test_what_attention_does_not_have_starts_as_the_mixer_says(teacher):
    for mixer in mixers(convert(teacher)).values():
        for name, value in mixer.initial_values().items():
            assert torch.equal(mixer.get_parameter(name), value), name


def test_the_teacher_is_left_as_it_was(family):
    teacher = build_teacher(family)
    inputs = every_kind()
    before, state = logits_of(teacher, inputs), copy.deepcopy(teacher.state_dict())
    student = convert(teacher)
    student.to(torch.bfloat16).requires_grad_(False)
    student.generation_config.max_new_tokens = 3
    assert torch.equal(logits_of(teacher, inputs), before)
    assert teacher.state_dict().keys() == state.keys()
    assert all(parameter.requires_grad for parameter in teacher.parameters())
    assert teacher.generation_config.max_new_tokens is None
    assert teacher.config.model_type == family


def test_weights_that_stay_are_not_copied(teacher):
    student = convert(teacher, layers=[1])
    given, found = dict(teacher.named_parameters()), dict(student.named_parameters())
    for name, parameter in found.items():
        if "layers.1.self_attn" not in name or name.startswith("model.visual"):
            assert parameter.data_ptr() == given[name].data_ptr(), name
            assert parameter is not given[name]


@pytest.mark.parametrize("package", ["reference", "optimized"])
def test_a_backend_is_chosen_by_name_whoever_converts(package):
    convert = importlib.import_module(f"linmu.{package}").convert
    teacher, inputs = build_teacher(), every_kind()
    students = {name: convert(teacher, backend=name) for name in (None, "reference", "optimized")}
    used = {name: type(mixers(student)[0]).__mro__ for name, student in students.items()}
    assert optimized.MMATE in used["optimized"] and optimized.MMATE not in used["reference"]
    assert (optimized.MMATE in used[None]) == (package == "optimized")
    valid = inputs["attention_mask"].bool()
    got, want = (logits_of(students[name], inputs)[valid] for name in ("optimized", "reference"))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


def test_an_unknown_backend_is_refused(teacher):
    with pytest.raises(ValueError, match="backend: must be one of optimized, reference, or left out"):
        convert(teacher, backend="fast")


def test_tied_embeddings_stay_tied(family):
    student = convert(build_teacher(family, tied=True))
    assert student.lm_head.weight is student.get_input_embeddings().weight


def test_parameter_names_have_no_level_for_the_host(student):
    names = {name for name, _ in student.named_parameters() if ".layers.0.self_attn." in name}
    prefix = "model.language_model.layers.0.self_attn."
    assert {name.removeprefix(prefix).split(".")[0] for name in names} == {
        "flex_ma",
        "local_swin",
        "mix_proj",
    }
    assert not [name for name, _ in student.named_buffers() if "self_attn" in name]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_student_has_the_teachers_dtype_and_keeps_precise_parameters_precise(family, dtype):
    teacher = build_teacher(family).to(dtype)
    student = convert(teacher)
    precise = torch.float32 if dtype == torch.bfloat16 else torch.float64
    for name, parameter in student.named_parameters():
        wanted = precise if any(part in name for part in FLOAT32_PARAMETERS) else dtype
        assert parameter.dtype == wanted, name
    assert student.training == teacher.training is False
    assert torch.isfinite(logits_of(student, every_kind())).all()


def test_a_configuration_object_gives_its_options_and_not_its_sizes(teacher):
    config = LinMUConfig(width=7, heads=3, groups=1, head_dim=2, half_life=(2.0, 16.0))
    mixer = mixers(convert(teacher, config))[0]
    assert (mixer.config.half_life, mixer.config.width, mixer.config.heads) == ((2.0, 16.0), 32, 4)


def test_teachers_of_other_families_are_refused():
    other = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=8))
    with pytest.raises(
        ValueError, match=r"must be one of Qwen2_5_VL.*got GPT2LMHeadModel; .*register_family"
    ):
        convert(other)


def test_a_student_is_no_teacher(student):
    with pytest.raises(ValueError, match="teacher must be a vanilla model"):
        convert(student)


def test_sliding_windows_are_refused():
    teacher = build_teacher(use_sliding_window=True, sliding_window=8, max_window_layers=1)
    with pytest.raises(ValueError, match="layers must be full_attention"):
        convert(teacher)


@pytest.mark.parametrize("layers", [[3], [-4], [0, 9], [0.5]])
def test_layers_out_of_range_are_refused(teacher, layers):
    with pytest.raises(ValueError, match="convert: layers must be indices from -3 to 2"):
        convert(teacher, layers=layers)


def test_unknown_options_are_refused(teacher):
    with pytest.raises(ValueError, match=r"options must be among .*got \['window'\]"):
        convert(teacher, {"window": (1, 2, 3)})


@pytest.mark.parametrize("config", ["fast", [("text_window", 0)], 3])
def test_what_is_no_configuration_is_refused(teacher, config):
    with pytest.raises(
        ValueError, match="convert: config must be None, a LinMUConfig, or options of it by name"
    ):
        convert(teacher, config)


@pytest.mark.parametrize("teacher", ["Qwen/Qwen2.5-VL-3B-Instruct", None])
def test_a_teacher_that_is_not_loaded_is_refused(teacher):
    with pytest.raises(ValueError, match="convert: teacher must be a loaded model, got"):
        convert(teacher)


def gradients(student: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    student.zero_grad()
    student(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


def test_every_new_parameter_learns(student):
    found = gradients(student, every_kind())
    for name, _ in student.named_parameters():
        if "layers" in name and "self_attn" in name:
            assert found[name].abs().max() > 0, name


def test_gradient_checkpointing_gives_the_same_gradients(teacher):
    student = shake_mixers(convert(teacher)).train()
    inputs = every_kind()
    plain = gradients(student, inputs)
    student.gradient_checkpointing_enable()
    checkpointed = gradients(student, inputs)
    assert plain.keys() == checkpointed.keys()
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name], rtol=1e-5, atol=1e-7)


def test_padding_attends_to_itself_where_attention_stays():
    """A row of nothing but padding would otherwise be undefined, and is on some kernels."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 5, 4, generator=generator)
    valid = torch.tensor([[False, False, True, True, True]])
    output, _ = causal_attention(nn.Module(), query, key, value, valid)
    torch.testing.assert_close(output[0, :2], value[0, :, :2].transpose(0, 1))
    alone, _ = causal_attention(nn.Module(), *(tensor[:, :, 2:] for tensor in (query, key, value)), None)
    torch.testing.assert_close(output[:, 2:], alone)


def test_hidden_states_of_all_layers_are_returned(student):
    inputs = every_kind()
    with torch.no_grad():
        states = student(**inputs, output_hidden_states=True).hidden_states
    assert len(states) == len(decoder_layers(student)) + 1
    assert all(state.shape == (*inputs["input_ids"].shape, 32) for state in states)


class Beside(nn.Module):
    """A teacher's attention and a mixer at one place, as distillation needs them."""

    def __init__(self, attention: nn.Module, mixer: nn.Module) -> None:
        super().__init__()
        self.attention, self.mixer, self.use = attention, mixer, "mixer"

    def forward(self, **kwargs):
        return getattr(self, self.use)(**kwargs)


def test_a_mixer_and_the_attention_it_replaces_may_share_a_layer(teacher, student):
    both, inputs = copy.deepcopy(student), every_kind()
    wanted = {
        "mixer": logits_of(student, inputs),
        "attention": logits_of(convert(teacher, layers=[]), inputs),
    }
    attention = decoder_layers(convert(teacher, layers=[]))
    for index, layer in enumerate(decoder_layers(both)):
        layer.self_attn = Beside(attention[index].self_attn, layer.self_attn)
    for use, logits in wanted.items():
        for layer in decoder_layers(both):
            layer.self_attn.use = use
        assert torch.equal(logits_of(both, inputs), logits)


def test_lora_around_a_student_still_tells_the_layers_where_vision_is(student):
    wanted = logits_of(student, every_kind())
    targets = r".*\.language_model\.layers\.\d+\.mlp\.(gate_proj|up_proj|down_proj)"
    adapted = get_peft_model(copy.deepcopy(student), LoraConfig(target_modules=targets))
    assert torch.equal(logits_of(adapted, every_kind()), wanted)
    assert len(decoder_layers(adapted)) == 3


def test_an_inner_part_called_alone_is_refused(student):
    with pytest.raises(
        ValueError, match=r"linmu_layout must come from the student's own forward.*whole model"
    ):
        student.model(**every_kind())


def test_a_four_dimensional_mask_is_refused(student):
    ids = prompt(words(8, 0))["input_ids"]
    with pytest.raises(ValueError, match=r"attention_mask must be \(B, S\)"):
        student(input_ids=ids, attention_mask=torch.ones(1, 1, 8, 8).tril().bool(), use_cache=False)


def test_the_forward_keeps_its_signature_and_takes_coordinates_too(teacher, student):
    base, own = (inspect.signature(model.forward).parameters for model in (teacher, student))
    assert [name for name in own if not name.startswith("linmu_")] == list(base)
    inputs = every_kind()
    rest = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    with torch.no_grad():
        positional = student(inputs["input_ids"], inputs["attention_mask"], **rest, use_cache=False).logits
    assert torch.equal(positional, logits_of(student, inputs))
