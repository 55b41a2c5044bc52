"""What a run cannot do it refuses at its start, and --dry_run in the same words; others' files it leaves."""

from __future__ import annotations

import json
import re
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText

from linmu.reference import convert
from linmu.reference.demo import TEACHER
from linmu.reference.prompts.processors import load_processor
from linmu.reference.training.commands.main import main
from linmu.reference.training.config import MLPSettings
from linmu.reference.training.mlps import peft_settings
from linmu.reference.training.progress import read_metrics
from linmu.reference.training.refusal import RefusedError
from linmu.reference.training.run import Run

from ..student.tiny_families import BUILDERS
from .own_data import BROKEN, flags, row, write

pytestmark = pytest.mark.trial_of_the_reference


@pytest.fixture
def data(tmp_path) -> Path:
    return write(tmp_path / "data", "d.jsonl", [row()] * 30)


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    """A run of stage i; its data are beside it."""
    folder = tmp_path_factory.mktemp("begun")
    main([*flags(write(folder, "d.jsonl", [row()] * 30), folder / "run"), "--stages", "i"])
    return folder


@pytest.fixture
def done(begun, tmp_path) -> Path:
    """A copy of that run's folder."""
    shutil.copytree(begun / "run", tmp_path / "run")
    return tmp_path / "run"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(*arguments: str) -> str:
    """What a run and its dry run are refused with; the same, and at the start."""
    said = []
    for more in ([], ["--dry_run"]):
        with pytest.raises(RefusedError) as error:
            main([*arguments, *more])
        said.append(str(error.value))
    assert said[0] == said[1]
    return said[0]


# --- folders


def test_a_models_folder_is_no_run_to_resume(begun):
    for folder in (TEACHER, begun / "run" / "stage_i"):
        with pytest.raises(RefusedError, match=f"--resume must be followed by a run's folder.*got {folder}"):
            main(["--resume", str(folder)])


@pytest.mark.parametrize("what", ["a model", "an adapter", "somebody's student", "config of a list"])
def test_overwrite_leaves_what_no_run_wrote(data, tmp_path, what):
    folder = tmp_path / "mine"
    if what == "a model":
        shutil.copytree(TEACHER, folder)
    elif what == "an adapter":
        model = AutoModelForImageTextToText.from_pretrained(TEACHER)
        get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder)
        (folder / "config.json").write_text((TEACHER / "config.json").read_text())
    elif what == "somebody's student":
        (folder / "student").mkdir(parents=True)
        (folder / "student" / "notes.txt").write_text("mine")
    else:
        folder.mkdir()
        (folder / "config.json").write_text("[1]")
    before = contents(folder)
    for more in ([], ["--overwrite"], ["--resume"]):
        assert "which no run wrote" in refused(*flags(data, folder), *more)
        assert contents(folder) == before


def test_overwrite_deletes_a_run_and_nothing_beside_it(data):
    """The run's folder being that of the data, and of other things."""
    folder = data.parent
    (folder / "notes").mkdir()
    (folder / "notes" / "student.txt").write_text("mine")
    before = contents(folder)
    main([*flags(data, folder), "--stages", "i"])
    (folder / "stage_i" / "checkpoint-1.part").mkdir()
    main([*flags(data, folder), "--stages", "i", "--overwrite", "--seed", "7"])
    assert {name: text for name, text in contents(folder).items() if name in before} == before
    assert json.loads((folder / "config.json").read_text())["seed"] == 7
    assert not (folder / "stage_i" / "checkpoint-1.part").exists()


def test_a_run_of_an_older_version_may_be_overwritten_and_is_not_resumed(data, tmp_path):
    folder = tmp_path / "old"
    folder.mkdir()
    settings = {
        "teacher": "demo",
        "data": "demo",
        "output": "x",
        "stages": "i,ii,iii",
        "backend": "optimized",
    }
    (folder / "config.json").write_text(json.dumps(settings | {"steps": "1,2,3", "mixer": "{}"}))
    said = refused(*flags(data, folder), "--resume")
    assert "must hold the settings of this version of linmu" in said and "the version that began it" in said
    main([*flags(data, folder), "--stages", "i", "--overwrite"])


@pytest.mark.parametrize("how", ["--resume DIR", "--resume"])
def test_a_moved_run_goes_on(begun, done, how):
    (done / "stage_i" / "taught.safetensors").unlink()
    shutil.rmtree(done / "stage_i" / "checkpoint-1")
    same = [*flags(begun / "d.jsonl", done), "--stages", "i"]
    main(["--resume", str(done)] if how == "--resume DIR" else [*same, "--resume"])
    name = "stage_i/taught.safetensors"
    assert (done / name).read_bytes() == (begun / "run" / name).read_bytes()
    assert (
        read_metrics(done / "metrics.jsonl")[-1]["loss"]
        == read_metrics(begun / "run/metrics.jsonl")[-1]["loss"]
    )


def test_a_run_with_other_settings_is_refused_and_named(begun, done):
    said = refused(*flags(begun / "d.jsonl", done), "--stages", "i", "--resume", "--stage_ii.layer", "2")
    assert "other values of ['stage_ii']" in said and "--resume DIR" in said
    said = refused(*flags(begun / "d.jsonl", done), "--stages", "i")
    assert "--output must be a folder without a run" in said


@pytest.mark.parametrize(
    "what", ["a letter", "a row more", "a row less", "two rows change places", "held out"]
)
def test_other_data_under_the_same_name_are_refused(tmp_path, what):
    rows = [row(answer=f"{index:02}") for index in range(30)]
    data = write(tmp_path, "d.jsonl", rows)
    held_out = write(tmp_path, "h.jsonl", rows[:4]) if what == "held out" else None
    arguments = [*flags(data, tmp_path / "run"), "--stages", "i"]
    arguments += ["--eval_data", str(held_out)] if held_out else []
    main(arguments)
    if what == "a letter":
        rows[7] = row(answer="x7")
    elif what == "a row more":
        rows.append(row())
    elif what == "a row less":
        rows.pop()
    elif what == "two rows change places":
        rows[3], rows[4] = rows[4], rows[3]
    else:
        write(tmp_path, "h.jsonl", rows[1:5])
    write(tmp_path, "d.jsonl", rows)
    before = contents(tmp_path)
    said = refused(*arguments, "--resume")
    name = held_out or data
    assert f"a run must go on with the data it began with, got other rows in ['{name}']" in said
    assert contents(tmp_path) == before
    main([*arguments, "--overwrite"])


def test_a_copy_of_the_data_is_taken_for_them(begun, done, tmp_path):
    """No times of files count."""
    text = (begun / "d.jsonl").read_bytes()
    (begun / "d.jsonl").unlink()
    (begun / "d.jsonl").write_bytes(text)
    main(["--resume", str(done)])


def test_resume_of_no_run_is_refused(tmp_path):
    with pytest.raises(RefusedError, match="--resume must be followed by a run's folder"):
        main(["--resume", str(tmp_path)])


@pytest.mark.parametrize("place", ["a file", "below a file", "/proc/linmu"])
def test_an_output_that_cannot_be_written_is_refused_and_named(data, tmp_path, place):
    (tmp_path / "file").write_text("x")
    output = {"a file": tmp_path / "file", "below a file": tmp_path / "file" / "run"}.get(place, place)
    said = refused(*flags(data, Path(output)))
    assert str(output) in said and "--output must be a folder that can be written" in said


@contextmanager
def room(size: int):
    """Files may not grow beyond `size` bytes: what a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_at_the_last_save_names_the_student_and_loses_nothing(begun, done, monkeypatch):
    shutil.rmtree(done / "student")
    finish = Run.finish

    def finish_without_room(self):
        with room(300_000):
            return finish(self)

    monkeypatch.setattr(Run, "finish", finish_without_room)
    says = rf"{done}/student must fit on its disk, got .*; make room there and go on with --resume"
    with pytest.raises(RefusedError, match=says):
        main(["--resume", str(done)])
    assert not list(done.glob("student*"))
    monkeypatch.undo()
    main(["--resume", str(done)])
    name = "student/model.safetensors"
    assert (done / name).read_bytes() == (begun / "run" / name).read_bytes()


# --- stages, teachers, data


@pytest.mark.parametrize(("stages", "missing"), [(["ii"], "i"), (["i", "iii"], "ii"), (["iii"], "ii")])
def test_a_stage_without_the_one_before_is_refused_before_any_other_runs(data, tmp_path, stages, missing):
    said = refused(*flags(data, tmp_path / "run"), "--stages", *stages)
    assert f"stage {stages[-1]} must start from stage {missing}" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("weights", ["adapters alone", "beside the model's"])
def test_a_teacher_with_adapters_is_refused(data, tmp_path, weights):
    teacher = AutoModelForImageTextToText.from_pretrained(TEACHER)
    shutil.copytree(TEACHER, tmp_path / "adapted")
    if weights == "adapters alone":
        (tmp_path / "adapted" / "model.safetensors").unlink()
        (tmp_path / "adapted" / "config.json").unlink()
    adapted = get_peft_model(teacher, LoraConfig(r=2, target_modules=["gate_proj", "down_proj"]))
    adapted.peft_config["default"].base_model_name_or_path = str(TEACHER)
    adapted.save_pretrained(tmp_path / "adapted")
    said = refused(*flags(data, tmp_path / "run"), "--teacher", str(tmp_path / "adapted"))
    assert "adapters" in said and "merge" in said


@pytest.mark.parametrize(
    ("weight", "value"),
    [
        ("model.language_model.layers.1.mlp.down_proj.weight", "nan"),
        ("model.language_model.layers.0.self_attn.q_proj.bias", "inf"),
        ("model.language_model.embed_tokens.weight", "-inf"),  # of a token that the data hold late, or never
        ("model.visual.merger.mlp.2.weight", "nan"),  # data of text alone do not meet it
    ],
)
def test_a_teacher_of_broken_numbers_is_refused(data, tmp_path, weight, value):
    teacher = AutoModelForImageTextToText.from_pretrained(TEACHER)
    teacher.get_parameter(weight).data.flatten()[-1] = float(value)
    student = convert(teacher)
    for name, model in (("teacher", teacher), ("student", student)):
        model.save_pretrained(tmp_path / name)
        load_processor(str(TEACHER)).save_pretrained(tmp_path / name)
    arguments = flags(data, tmp_path / "run")
    arguments[arguments.index(str(TEACHER))] = str(tmp_path / "teacher")
    assert f"--teacher must hold finite weights, got nan or inf in {weight}" in refused(*arguments)
    if "self_attn" not in weight:  # the student has attention's under other names
        with pytest.raises(RefusedError, match=f"evaluate must hold finite weights.*{weight} of the student"):
            main(["evaluate", str(tmp_path / "student"), "--data", str(data), "--cpu"])


@pytest.mark.parametrize("name", ["nowhere/at-all", "/nowhere"])
def test_a_teacher_that_does_not_open_is_refused(data, tmp_path, monkeypatch, name):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # read from the environment once
    said = refused(*flags(data, tmp_path / "run"), "--teacher", name)
    assert "--teacher must be a model" in said and name in said


def test_adapters_on_a_mixture_of_experts_are_refused_by_name():
    student = convert(BUILDERS["qwen3_vl_moe"]().teacher)
    says = r"--lora_targets must be among .*which has none.*--tune full or --tune none"
    with pytest.raises(RefusedError, match=says):
        peft_settings(student, MLPSettings())
    assert len(peft_settings(student, MLPSettings(tune="full")).modules_to_save) == 3


def test_adapters_that_a_teacher_has_no_place_for_are_refused_at_the_start(data, tmp_path):
    said = refused(*flags(data, tmp_path / "run"), "--lora_targets", "experts")
    assert "--lora_targets must be among the linear projections of" in said and "--tune full" in said


def test_held_out_data_without_one_good_sample_are_refused(data, tmp_path):
    broken = write(tmp_path / "data", "e.jsonl", [row(picture=BROKEN)] * 3)
    arguments = [*flags(data, tmp_path / "run"), "--eval_data", str(broken), "--on_broken", "skip"]
    for more in (["--dry_run"], []):
        with pytest.raises(RefusedError, match="held-out data must hold conversations that can be read"):
            main([*arguments, *more])


@pytest.mark.parametrize("place", ["held out", "training"])
def test_a_broken_sample_is_refused_by_both_in_the_same_words(tmp_path, place):
    rows = [row()] * 30
    rows[20 if place == "held out" else 21] = row(picture=BROKEN)
    data = write(tmp_path, "d.jsonl", rows)
    more = ["--stages", "i", "--stage_i.steps", "30"]
    with pytest.raises(RefusedError) as error:
        main([*flags(data, tmp_path / "run"), *more])
    line = 21 if place == "held out" else 22
    assert f"d.jsonl, line {line}: FileNotFoundError" in str(error.value)


@pytest.mark.parametrize("place", ["training data", "one of two", "held-out data"])
def test_data_of_broken_samples_alone_are_refused_by_both_in_the_same_words(data, tmp_path, place):
    bad = str(write(tmp_path / "bad", "b.jsonl", [row(picture=BROKEN)] * 5))
    names, held_out = {
        "training data": ([bad], str(data)),
        "one of two": ([str(data), f"{bad}@9"], str(data)),
        "held-out data": ([str(data)], bad),
    }[place]
    said = f"{bad} must hold samples that can be read, got broken ones alone"
    if place == "held-out data":
        said = "held-out data must hold conversations that can be read, with an answer to learn, got none"
    arguments = flags(data, tmp_path / "run")
    start = arguments.index(str(data))
    arguments[start : start + 1] = names
    for more in (["--dry_run"], []):  # in this order: what a run finds while it runs leaves its folder
        with pytest.raises(RefusedError, match=re.escape(said)):
            main([*arguments, "--on_broken", "skip", "--eval_data", held_out, *more])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--mlp_learning_rate", "inf"], "--mlp_learning_rate must be finite, 0 or more, got inf"),
        (["--mlp_learning_rate", "-1"], "--mlp_learning_rate must be finite, 0 or more, got -1"),
        (["--mlp_learning_rate", "nan"], "--mlp_learning_rate must be finite, 0 or more, got nan"),
        (["--stage_ii.learning_rate_new", "inf"], "--stage_ii.learning_rate must be finite, 0 or more"),
        (["--stage_iii.temperature", "inf"], "--stage_iii.temperature must be positive, got inf"),
        (["--stage_i.mixer", "-1"], "--stage_i.mixer must be finite, 0 or more, got -1"),
        (["--stage_iii.logits", "nan"], "--stage_iii.logits must be finite, 0 or more, got nan"),
        (["--stage_ii.layer", "inf"], "--stage_ii.layer must be finite, 0 or more, got inf"),
        (["--seed", "-1"], "--seed must be from 0 to 2³² - 1, got -1"),
        (["--seed", str(2**32)], "--seed must be from 0 to 2³² - 1, got 4294967296"),
        (["--stage_i.mixer", "0"], "must be above 0, got a stage without a loss"),
        (["--context_parallel", "0"], "--context_parallel must be at least 1, got 0"),
    ],
)
def test_a_rate_or_weight_that_is_no_number_is_refused_at_the_start(data, tmp_path, capsys, given, says):
    with pytest.raises(SystemExit):
        main([*flags(data, tmp_path / "run"), *given])
    assert says in capsys.readouterr().err


def test_processes_that_do_not_come_out_even_are_refused_at_the_start(data, tmp_path):
    said = refused(*flags(data, tmp_path / "run"), "--context_parallel", "2")
    assert "--context_parallel must divide the number of processes, got 2 for 1; torchrun" in said


def test_the_first_step_of_a_stage_learns(begun):
    from safetensors.torch import load_file

    after = load_file(begun / "run" / "stage_i" / "taught.safetensors")
    gates = [tensor for name, tensor in after.items() if "scan_gate_proj.weight" in name]
    assert gates and all(bool(gate.any()) for gate in gates), "they start at 0"
