"""A student's folder: saved, opened again by load() and the Auto classes, refused if it is another's."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from linmu.reference import MMATE, LinMUConfig, convert, load
from linmu.reference.demo.build_teacher import build_tokenizer, write_preprocessing
from linmu.reference.student.backend import (
    BACKEND_VARIABLE,
    BACKENDS,
    REFERENCE,
    Backend,
    backend_by_environment,
    backend_of,
    register_backend,
)
from linmu.reference.student.model import FLOAT32_PARAMETERS, mixers

from .tiny_checkpoint import (
    FAMILIES,
    IMAGE,
    build_teacher,
    every_kind,
    in_fresh_memory,
    logits_of,
    picture,
    prompt,
    shake_mixers,
    student_backend,
    words,
)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def teacher(family):
    return build_teacher(family)


@pytest.fixture(scope="module")
def student(teacher):
    return shake_mixers(convert(teacher))


@pytest.fixture(scope="module")
def folder(student, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("student")
    student.save_pretrained(path)
    return path


def test_the_configuration_says_what_was_converted(teacher, family, tmp_path):
    options = {"window_thw": (2, 4, 4), "conv_kernel": 2, "output_gate": True}
    student = convert(teacher, options, layers=[-1, 0])
    student.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == f"linmu_{family}"
    assert config["linmu"]["version"] == 2
    assert config["linmu"]["layers"] == [0, 2]
    written = config["linmu"]["options"]
    assert written.keys() == LinMUConfig(width=4, heads=1, groups=1, head_dim=4).options().keys()
    assert {name: written[name] for name in options} == options | {"window_thw": [2, 4, 4]}
    assert {index: mixer.config.window_thw for index, mixer in mixers(load(tmp_path)).items()} == {
        0: (2, 4, 4),
        2: (2, 4, 4),
    }


def test_a_student_reopened_is_the_student_bit_for_bit(student, folder):
    again = load(folder)
    assert type(again) is type(student)
    state, reopened = student.state_dict(), again.state_dict()
    assert state.keys() == reopened.keys()
    assert all(torch.equal(state[name], reopened[name]) for name in state)
    inputs = every_kind()
    assert torch.equal(logits_of(in_fresh_memory(again), inputs), logits_of(student, inputs))
    assert again.generation_config.suppress_tokens == student.generation_config.suppress_tokens


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_student_reopened_has_the_dtypes_it_was_saved_with(family, tmp_path, dtype):
    student = shake_mixers(convert(build_teacher(family).to(dtype), layers=[0]))
    student.save_pretrained(tmp_path)
    state, reopened = student.state_dict(), load(tmp_path).state_dict()
    for name, tensor in state.items():
        assert reopened[name].dtype == tensor.dtype and torch.equal(reopened[name], tensor), name


def test_a_student_saved_in_shards_is_reopened_whole(student, tmp_path):
    student.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    inputs = every_kind()
    assert torch.equal(logits_of(in_fresh_memory(load(tmp_path)), inputs), logits_of(student, inputs))


def test_a_student_opened_in_bfloat16_keeps_precise_parameters_in_float32(student, folder):
    reopened = load(folder, dtype=torch.bfloat16)
    original = dict(student.named_parameters())
    for name, parameter in reopened.named_parameters():
        if any(part in name for part in FLOAT32_PARAMETERS):
            assert parameter.dtype == torch.float32 and torch.equal(parameter, original[name]), name
        else:
            assert parameter.dtype == torch.bfloat16, name


@pytest.fixture
def reference_only(monkeypatch):
    monkeypatch.setenv(BACKEND_VARIABLE, "reference")


def test_the_auto_classes_open_a_students_folder(student, folder, reference_only):
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert type(config) is type(student.config)
    assert type(model) is type(student)
    assert model.linmu_backend.name == "reference"
    inputs = prompt(words(4, 0), picture(IMAGE, (1, 3, 2)), words(3, 1))
    tokens = [m.generate(**inputs, max_new_tokens=4, do_sample=False) for m in (model, student)]
    assert torch.equal(*tokens)


def test_the_auto_processor_opens_a_students_folder(student, folder, family):
    write_preprocessing(folder, build_tokenizer())
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        settings = json.loads((folder / name).read_text())
        del settings["processor_class"]
        (folder / name).write_text(json.dumps(settings))
    tokenizer = folder / "tokenizer_config.json"
    kept = {k: v for k, v in json.loads(tokenizer.read_text()).items() if k != "processor_class"}
    tokenizer.write_text(json.dumps(kept))
    processor = AutoProcessor.from_pretrained(folder)
    assert (
        type(processor).__name__
        == {
            "qwen2_5_vl": "LinMUQwen2_5_VLProcessor",
            "qwen2_vl": "LinMUQwen2VLProcessor",
        }[family]
    )


def test_the_backend_is_chosen_by_the_environment_and_said(monkeypatch, caplog):
    monkeypatch.setenv(BACKEND_VARIABLE, "fastest")
    with pytest.raises(
        ValueError, match="LINMU_BACKEND: must be one of optimized, reference, or left out, got fast"
    ):
        backend_of(None)
    monkeypatch.setenv(BACKEND_VARIABLE, "reference")
    backend_by_environment.cache_clear()
    with caplog.at_level(logging.INFO, logger="linmu"):
        assert backend_of(None) is REFERENCE
        backend_of(None)
    assert caplog.text.count("LinMU runs on linmu.reference") == 1


def test_a_package_of_its_own_computes_students_by_its_name(teacher, folder):
    class MyMMATE(MMATE):
        pass

    register_backend(Backend("my_kernels", MyMMATE))
    try:
        opened = AutoModelForImageTextToText.from_pretrained(folder, linmu_backend="my_kernels")
        for student in (
            convert(teacher, backend="my_kernels"),
            load(folder, linmu_backend="my_kernels"),
            opened,
        ):
            assert student.linmu_backend.name == "my_kernels"
            assert all(isinstance(mixer, MyMMATE) for mixer in mixers(student).values())
    finally:
        del BACKENDS["my_kernels"]


@pytest.mark.needs("MMATE")
def test_a_folder_never_says_which_backend_wrote_it(backend, student, folder, tmp_path):
    opened = load(folder, linmu_backend=student_backend(backend))
    assert opened.linmu_backend.name == backend.name
    load(folder).save_pretrained(tmp_path / "reference")
    opened.save_pretrained(tmp_path / "other")
    for path in (tmp_path / "reference").iterdir():
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes(), path.name
    inputs = every_kind()
    got, want = (logits_of(model.double(), inputs) for model in (opened, copy.deepcopy(student)))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9 * want.abs().max().item())


def test_load_refuses_a_vanilla_folder_and_says_what_to_do(teacher, tmp_path):
    teacher.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"load: model_type must be one of .*turned into a student by convert"
    ):
        load(tmp_path)


def test_a_students_class_refuses_a_vanilla_folder(teacher, student, tmp_path):
    teacher.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"config.linmu must hold a student's settings"):
        type(student).from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("model.language_model.layers.1.self_attn.flex_ma.A_log", None, "missing keys: .*flex_ma.A_log"),
        (None, "model.language_model.layers.0.self_attn.q_proj.weight", "unexpected keys: .*q_proj.weight"),
        (
            "model.language_model.layers.2.self_attn.mix_proj.bias",
            "model.language_model.layers.2.self_attn.mix.bias",
            "missing keys: .*mix_proj.bias",
        ),
    ],
    ids=["missing", "unexpected", "misnamed"],
)
def test_a_folder_with_other_tensors_is_refused(student, tmp_path, old, new, message):
    student.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    moved = tensors.pop(old) if old else torch.zeros(2)
    if new:
        tensors[new] = moved
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for opener in (load, AutoModelForImageTextToText.from_pretrained):
        with pytest.raises(ValueError, match=message):
            opener(tmp_path)


@pytest.mark.parametrize("reverse", [True, False])
def test_a_folder_with_an_options_former_name_opens(teacher, tmp_path, reverse):
    student = shake_mixers(convert(teacher, {"reverse_scan": reverse}, layers=[0]))
    student.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["linmu"]["options"]["backward_scan"] = config["linmu"]["options"].pop("reverse_scan")
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = load(tmp_path)
    assert mixers(again)[0].config == mixers(student)[0].config
    inputs = every_kind()
    assert torch.equal(logits_of(in_fresh_memory(again), inputs), logits_of(student, inputs))


def test_a_folder_of_version_1_opens_without_a_text_window(teacher, tmp_path):
    student = shake_mixers(convert(teacher, {"text_window": 0}, layers=[0]))
    student.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["linmu"]["version"] = 1
    del config["linmu"]["options"]["text_window"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    again, inputs = load(tmp_path), every_kind()
    assert mixers(again)[0].config.text_window == 0 != LinMUConfig(6, 2, 1, 2).text_window
    assert torch.equal(logits_of(in_fresh_memory(again), inputs), logits_of(student, inputs))
    again.save_pretrained(tmp_path)  # and once more, as it is
    assert mixers(load(tmp_path))[0].config.text_window == 0


def test_an_option_by_both_of_its_names_is_refused(teacher):
    with pytest.raises(ValueError, match=r"an option must have one of its two names, got .*backward_scan"):
        convert(teacher, {"reverse_scan": True, "backward_scan": False})


def test_a_folder_of_a_newer_version_is_refused(student, folder, tmp_path):
    student.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["linmu"]["version"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"version'] must be among \[1, 2\], got 3; upgrade linmu"):
        load(tmp_path)
