"""What users do to any Hugging Face model, done to a student: pickled, resumed, cast, exported, adapted."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import peft
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    Trainer,
    TrainingArguments,
    pipeline,
)

from linmu import optimized, reference
from linmu.reference.student import model
from linmu.reference.student.backend import BACKEND_VARIABLE
from linmu.reference.student.model import FLOAT32_PARAMETERS, mixers

from .tiny_checkpoint import IMAGE, build_teacher, every_kind, logits_of, picture, prompt, shake_mixers, words
from .tiny_families import BUILDERS

PACKAGES = {"reference": reference, "optimized": optimized}


def small_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=99, hidden_size=32, intermediate_size=32, **sizes)).eval()


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("family", BUILDERS)
def test_a_student_is_pickled_and_copied_as_its_teacher_is(family, package):
    tiny = BUILDERS[family]()
    student = shake_mixers(PACKAGES[package].convert(tiny.teacher, layers=[0, 2]))
    inputs = tiny.inputs("see {tall} now" if tiny.image else "text alone")
    torch.save(student, saved := io.BytesIO())
    saved.seek(0)
    copies = (
        pickle.loads(pickle.dumps(student)),
        torch.load(saved, weights_only=False),
        copy.deepcopy(student),
    )
    for again in copies:
        assert type(again) is type(student) and again.linmu_backend == student.linmu_backend
        assert [type(mixer) for mixer in mixers(again).values()] == [
            type(m) for m in mixers(student).values()
        ]
        assert torch.equal(logits_of(again, inputs), logits_of(student, inputs))


@pytest.mark.parametrize("family", BUILDERS)
def test_a_students_config_json_opens_by_every_way_that_transformers_has(family, tmp_path):
    tiny = BUILDERS[family]()
    student = shake_mixers(reference.convert(tiny.teacher, layers=[0, 2]))
    student.save_pretrained(tmp_path)
    kind, file = type(student.config), tmp_path / "config.json"
    PreTrainedConfig.from_pretrained(tmp_path)  # what Trainer looks at before it resumes
    settings = kind._dict_from_json_file(file)
    text, before = settings.get("text_config"), copy.deepcopy(settings)
    ways = (
        kind.from_pretrained(tmp_path),
        kind.from_json_file(file),
        kind(**settings),
        kind.from_dict(settings),
    )
    assert settings == before and settings.get("text_config") is text
    for config in ways:
        assert config.linmu == student.config.linmu
        assert config.get_text_config(decoder=True).attention_dropout == 0
        assert config.to_json_string() == ways[0].to_json_string()
        assert list(mixers(type(student)(config))) == [0, 2]


@pytest.mark.parametrize("package", PACKAGES)
def test_trainer_resumes_a_text_student(package, tmp_path):
    torch.manual_seed(0)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 99, (8, 8))]
    student = PACKAGES[package].convert(small_llama())

    def trainer(steps: int) -> Trainer:
        options = {"save_steps": 1, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True}
        settings = TrainingArguments(tmp_path, max_steps=steps, disable_tqdm=True, **options)
        return Trainer(model=copy.deepcopy(student), args=settings, train_dataset=rows)

    trainer(1).train()
    resumed = trainer(2)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 2


@pytest.mark.parametrize("family", ["llama", "qwen2_5_vl"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_student_made_of_a_configuration_keeps_precise_parameters_in_float32(family, dtype):
    config = copy.deepcopy(reference.convert(BUILDERS[family]().teacher).config)
    auto_class = AutoModelForCausalLM if family == "llama" else AutoModelForMultimodalLM
    student = auto_class.from_config(config, dtype=dtype)
    assert student.dtype == dtype
    for name, parameter in student.named_parameters():
        precise = any(part in name for part in FLOAT32_PARAMETERS)
        assert parameter.dtype == (torch.float32 if precise else dtype), name


@pytest.mark.parametrize("given", ["eager", "sdpa", "flex_attention", {"text_config": "eager"}])
def test_the_decoders_attention_implementation_stays_or_is_refused(given):
    student = shake_mixers(reference.convert(build_teacher(), layers=[0, 2]))
    wanted = logits_of(student, every_kind())
    if isinstance(given, dict) or given == "flex_attention":
        with pytest.raises(ValueError, match=r"decoder must keep 'linmu'|flex"):
            student.set_attn_implementation(given)
    else:
        student.set_attn_implementation(given)
        assert student.config.vision_config._attn_implementation == given
    torch.testing.assert_close(logits_of(student, every_kind()), wanted, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="set_attn_implementation: the decoder must keep 'linmu', got sdpa"):
        reference.convert(small_llama()).set_attn_implementation("sdpa")


ADAPTERS = {
    "LoRA on attention": peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
    "LoRA on MLPs": peft.LoraConfig(r=2, target_modules=["gate_proj", "down_proj"]),
    "IA3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "a tuned copy": peft.LoraConfig(r=2, target_modules=["k_proj"], modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_teacher_with_adapters_is_refused_until_they_are_merged(kind, tmp_path):
    model = peft.get_peft_model(build_teacher(), ADAPTERS[kind])
    model.save_pretrained(tmp_path / "adapter")
    inside = build_teacher()
    inside.load_adapter(str(tmp_path / "adapter"))  # as from_pretrained does for an adapter's folder
    for teacher in (inside, model.base_model.model, model):
        with pytest.raises(ValueError, match=r"teacher must hold no adapters, got .*; merge them first"):
            reference.convert(teacher)
    merged = model.merge_and_unload()
    student, inputs = reference.convert(merged, layers=[]), prompt(words(3, 0), picture(IMAGE, (1, 3, 2)))
    assert torch.equal(logits_of(student, inputs), logits_of(merged, inputs))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl_moe", "llama"])
def test_a_plan_to_split_tensors_names_only_what_is_there(family):
    student = reference.convert(BUILDERS[family]().teacher)
    for plan in (student.tp_plan, student.base_model.tp_plan):
        assert plan and not [name for name in plan if "self_attn" in name]


@torch.no_grad()
def test_embeddings_that_may_hold_vision_are_said_to_be_taken_as_text():
    model.warn_taken_as_text.cache_clear()
    student, ids = reference.convert(small_llama()), torch.tensor([[5, 6, 7]])
    embeds = student.get_input_embeddings()(ids)
    text = {"linmu_coords": torch.full((1, 3, 4), -1)}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        wanted = student(input_ids=ids).logits
        assert torch.equal(student(inputs_embeds=embeds, **text).logits, wanted)
        past = student(input_ids=ids[:, :2]).past_key_values
        student(inputs_embeds=embeds[:, 2:], past_key_values=past)
        student.generate(inputs_embeds=embeds, max_new_tokens=2, **text)
        assert not said
        for _ in range(2):
            assert torch.equal(student(inputs_embeds=embeds).logits, wanted)
    (warning,) = said
    assert warning.category is UserWarning
    assert str(warning.message).startswith(
        "LinMULlamaForCausalLM: linmu_coords must come with inputs_embeds, got None, and every token is "
        "taken as text; pass (B, L, 4) [segment, t, y, x], -1 throughout for text"
    )


@pytest.mark.parametrize(
    "family", [name for name, build in BUILDERS.items() if name not in ("qwen2", "llama")]
)
def test_the_multimodal_auto_class_opens_a_student(family, tmp_path, monkeypatch):
    monkeypatch.setenv(BACKEND_VARIABLE, "reference")
    student = reference.convert(BUILDERS[family]().teacher)
    student.save_pretrained(tmp_path)
    assert type(AutoModelForMultimodalLM.from_pretrained(tmp_path)) is type(student)


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_text_student_holds_no_parameter_that_nothing_uses(family, package):
    student = PACKAGES[package].convert(BUILDERS[family]().teacher).train()
    ids = torch.tensor([[5, 6, 7, 8]])
    student(ids, labels=ids).loss.backward()
    assert [name for name, parameter in student.named_parameters() if parameter.grad is None] == []


def test_a_quantised_teacher_is_refused():
    teacher = build_teacher()
    layer = teacher.get_decoder().layers[0].mlp
    layer.up_proj.weight = nn.Parameter(layer.up_proj.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(
        ValueError, match=r"convert: teacher must not be quantised, got weights of \['torch.int8'\]"
    ):
        reference.convert(teacher)


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("strict", [True, False])
def test_a_text_student_is_exported_and_what_cannot_be_says_so(package, strict):
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    options = {"text_window": 0} if package == "reference" else {}  # its loop follows the mask's values
    student = shake_mixers(PACKAGES[package].convert(small_llama(), options))
    program = torch.export.export(student, (), inputs | {"use_cache": False}, strict=strict)
    got = program.module()(**inputs, use_cache=False).logits
    torch.testing.assert_close(got, logits_of(student, inputs), rtol=0, atol=1e-5)
    with pytest.raises(Exception, match=r"torch.export: there must be no cache, as states cannot"):
        torch.export.export(student, (), inputs | {"use_cache": True}, strict=strict)
    if package == "reference":
        windowed = reference.convert(small_llama())
        with pytest.raises(Exception, match=r"torch.export: a text window must be computed by"):
            torch.export.export(windowed, (), inputs | {"use_cache": False}, strict=strict)
    pictures = PACKAGES[package].convert(build_teacher())
    with pytest.raises(Exception, match=r"torch.export: a student's inputs must be text, got pictures"):
        torch.export.export(pictures, (), every_kind() | {"use_cache": False}, strict=strict)


@pytest.mark.parametrize("family", ["llama", "qwen2_5_vl"])
def test_prefix_tuning_is_refused_by_name_and_prompt_tuning_works_for_text(family):
    ids = torch.tensor([[5, 6, 7, 8]])
    settings = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    model = peft.get_peft_model(
        reference.convert(BUILDERS[family]().teacher), peft.PrefixTuningConfig(**settings)
    )
    with pytest.raises(ValueError, match="prefix tuning, which makes up keys and values, is not supported"):
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    student = reference.convert(small_llama())
    model = peft.get_peft_model(student, peft.PromptTuningConfig(**settings))
    text = {"linmu_coords": torch.full((1, 3 + 4, 4), -1)}  # peft hands over embeddings
    assert model(input_ids=ids, attention_mask=torch.ones_like(ids), **text).logits.shape == (1, 7, 99)


def test_the_any_to_any_pipeline_takes_a_student(tmp_path, monkeypatch):
    monkeypatch.setenv(BACKEND_VARIABLE, "optimized")
    pytest.importorskip("torchvision", reason="transformers' pipeline wants it")
    tiny = BUILDERS["llava_onevision"]()
    reference.convert(tiny.teacher).save_pretrained(tmp_path)
    student = AutoModelForMultimodalLM.from_pretrained(tmp_path)
    asked = pipeline("any-to-any", model=student, processor=tiny.processor)
    answer = asked(
        text="see <image> now", images=tiny.picture("wide", 0), max_new_tokens=2, return_full_text=False
    )
    assert isinstance(answer[0]["generated_text"], str)


@pytest.mark.parametrize("package", PACKAGES)
@torch.no_grad()
def test_a_text_decoders_student_takes_vision_if_it_was_converted_for_it(package):
    coords = torch.tensor([[[-1, -1, -1, -1], [0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0], [0, 0, 1, 1]]])
    teacher, ids = small_llama(), torch.tensor([[5, 6, 7, 8, 9]])
    embeds = teacher.get_input_embeddings()(ids)
    student = shake_mixers(PACKAGES[package].convert(teacher, {"text_only": False}))
    seen = student(inputs_embeds=embeds, linmu_coords=coords, use_cache=False).logits
    assert (seen - logits_of(student, {"input_ids": ids})).abs().max() > 1e-3
    for_text = PACKAGES[package].convert(teacher)
    with pytest.raises(ValueError, match=r"FlexMA: layout must be None, .*text_only"):
        for_text(inputs_embeds=embeds, linmu_coords=coords)
