"""A student's folder in the hands of others: the Hub, stock classes, adapters, damage, and mix-ups."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from linmu.optimized import convert, load
from linmu.reference.student.saved_folder import CARD_MARKER, hub_name

from .tiny_checkpoint import build_teacher, every_kind, logits_of, shake, shake_mixers
from .tiny_families import BUILDERS

ROOT = Path(__file__).resolve().parents[3]
MLP = r".*\.language_model\.layers\.\d+\.mlp\.(gate_proj|up_proj|down_proj)"


@pytest.fixture(scope="module")
def student():
    return shake_mixers(convert(build_teacher(), layers=[0, 2]))


@pytest.fixture(scope="module")
def saved(student, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved")
    student.save_pretrained(path)
    return path


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy to be damaged."""
    return shutil.copytree(saved, tmp_path / "student")


@pytest.mark.parametrize("family", BUILDERS)
def test_a_stock_class_refuses_a_students_folder(family, tmp_path):
    """Instead of drawing new attention in the place of M-MATE, with a warning."""
    teacher = BUILDERS[family]().teacher
    convert(teacher, layers=[1]).save_pretrained(tmp_path)
    with pytest.raises(Exception, match=r"linmu\.MMATE"):
        type(teacher).from_pretrained(tmp_path)
    again = load(tmp_path)
    decoder = again.config.get_text_config(decoder=True)
    assert set(getattr(decoder, "layer_types", None) or ["full_attention"]) == {"full_attention"}


def test_a_text_decoders_converted_layers_are_marked():
    with torch.device("meta"):
        teacher = LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=64, vocab_size=64))
    written = json.loads(convert(teacher, layers=[0, -1]).config.to_json_string())
    assert (
        written["attention_dropout"].startswith("linmu.MMATE") and written["linmu"]["attention_dropout"] == 0
    )


def test_a_folder_is_ready_for_the_hub(saved):
    assert sorted(path.name for path in saved.iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    config = json.loads((saved / "config.json").read_text())
    assert config["linmu"]["version"] == 2
    assert config["text_config"]["attention_dropout"].startswith("linmu.MMATE")
    assert config["linmu"]["attention_dropout"] == 0
    card = (saved / "README.md").read_text()
    assert "in whose decoder 2 of 3 layers hold M-MATE" in card
    assert "None: this student was not measured." in card
    assert str(saved.parent) not in card


def test_a_card_has_the_numbers_of_its_own_run(student, tmp_path):
    rows = {
        "teacher": {"accuracy": 1.0, "kl": 0.0, "agreement": 1.0},
        "stage iii": {"accuracy": 0.75, "kl": 0.5},
    }
    (tmp_path / "results.json").write_text(json.dumps({"rows": rows}))
    student.save_pretrained(tmp_path / "student")
    card = (tmp_path / "student" / "README.md").read_text()
    assert "| | accuracy | KL, nats | same first choice |\n|---|---|---|---|\n" in card
    assert "| teacher | 1.000 | 0.000 | 1.000 |\n| stage iii | 0.750 | 0.500 |  |" in card


def test_a_card_that_somebody_wrote_is_left_alone(student, folder):
    (folder / "README.md").write_text("# Mine")
    student.save_pretrained(folder)
    assert (folder / "README.md").read_text() == "# Mine"
    (folder / "README.md").write_text(f"old {CARD_MARKER}")
    student.save_pretrained(folder)
    assert "## Settings" in (folder / "README.md").read_text()


def test_a_card_names_a_teacher_on_the_hub_and_no_local_path(tmp_path):
    assert hub_name("Qwen/Qwen2.5-VL-3B-Instruct") == "Qwen/Qwen2.5-VL-3B-Instruct"
    assert hub_name("/home/someone/model") is hub_name("./model") is hub_name("") is hub_name(None) is None
    teacher = build_teacher()
    teacher.config._name_or_path = "Qwen/Qwen2.5-VL-3B-Instruct"
    convert(teacher, layers=[0]).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "\nbase_model: Qwen/Qwen2.5-VL-3B-Instruct\n" in card


@pytest.mark.parametrize("kept", [0.3, 0.999])
def test_truncated_weights_are_refused(folder, kept):
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(ValueError, match=r"from_pretrained: the folder's safetensors files must be whole"):
        load(folder)


def test_weights_of_other_sizes_are_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    name = "model.language_model.layers.0.self_attn.flex_ma.A_log"
    tensors[name] = torch.zeros(7)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"got mismatched keys: .*flex_ma\.A_log"):
        load(folder)


def test_other_folders_are_told_apart(folder, tmp_path):
    run, stage, adapter, empty = (tmp_path / name for name in ("run", "run/stage_i", "adapter", "empty"))
    for path in (stage, adapter, empty):
        path.mkdir(parents=True)
    (run / "results.json").write_text("{}")
    (run / "config.json").write_text("{}")
    (stage / "taught.safetensors").touch()
    (adapter / "adapter_config.json").write_text("{}")
    shutil.copytree(folder, run / "student")
    for path, message in (
        (run, r"got a run in .*run; open .*student$"),
        (stage, r"got the checkpoint of a stage in .*; a run goes on from it with --resume"),
        (adapter, r"got a LoRA adapter in .*; open its student, then peft"),
        (empty, r"got no config.json in .*empty"),
        (tmp_path / "none", r"got no folder .*none"),
        ("runs/mine/student", "got no folder runs/mine/student"),
    ):
        with pytest.raises(ValueError, match=f"load: the folder must hold a student, {message}"):
            load(path)
    load(run / "student")


def test_a_folder_opens_on_a_device_map_in_bfloat16(student, saved, tmp_path):
    """Some layers on the disk: their hooks must hand the layout on."""
    parts = {"model.visual": "cpu", "model.language_model": "cpu", "lm_head": "cpu"}
    for device_map in ("cpu", parts, offloaded()):
        opened = load(saved, device_map=device_map, offload_folder=tmp_path)
        found = logits_of(opened, every_kind())
        torch.testing.assert_close(found, logits_of(student, every_kind()), rtol=0, atol=1e-5)
    opened = load(saved, device_map=parts, dtype=torch.bfloat16)
    assert opened.lm_head.weight.dtype == torch.bfloat16
    assert torch.isfinite(logits_of(opened, every_kind())).all()


def offloaded() -> dict[str, str]:
    """A device map with two of three layers on the disk."""
    layers = {
        f"model.language_model.layers.{index}": device for index, device in enumerate(("cpu", "disk", "disk"))
    }
    rest = ("model.visual", "model.language_model.embed_tokens", "model.language_model.norm", "lm_head")
    return layers | dict.fromkeys((*rest, "model.language_model.rotary_emb"), "cpu")


def test_adapters_are_kept_beside_the_student_or_merged_into_it(saved, tmp_path):
    adapted = get_peft_model(load(saved), LoraConfig(r=2, target_modules=MLP))
    shake(adapted, ("lora_B.default.weight",))
    inputs = every_kind()
    wanted = logits_of(adapted, inputs)
    assert (wanted - logits_of(load(saved), inputs)).abs().max() > 1e-2
    adapted.save_pretrained(tmp_path / "adapter")
    kept = PeftModel.from_pretrained(load(saved), tmp_path / "adapter")
    assert torch.equal(logits_of(kept, inputs), wanted)
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of(load(tmp_path / "merged"), inputs), wanted, rtol=0, atol=1e-4)


def test_remote_code_is_never_trusted_by_us():
    sources = [path for part in ("reference", "optimized") for path in (ROOT / part).rglob("*.py")]
    for path in (*sources, ROOT / "distill.py"):
        assert "trust_remote_code" not in path.read_text(), path
