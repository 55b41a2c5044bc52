"""distill.py as a user meets it: flags, stages, a killed run, own data, and the student that comes out."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from linmu.reference.config import LinMUConfig
from linmu.reference.demo import TEACHER, DigitsQuestions
from linmu.reference.prompts.chat_collator import ChatCollator
from linmu.reference.prompts.processors import load_processor
from linmu.reference.training.commands.command_line import parse
from linmu.reference.training.commands.main import main
from linmu.reference.training.config import Config, MixerOptions, settings_of
from linmu.reference.training.data.conversations import Conversations, InOrder
from linmu.reference.training.presets import PRESETS
from linmu.reference.training.refusal import RefusedError
from linmu.reference.training.run import Run
from linmu.reference.training.stage_trainer import StageTrainer

from ..forks import COMMANDS, run_forked
from .flags import steps

ROOT = Path(__file__).resolve().parents[3]
TINY = [*steps(2, 2, 3), "--batch_size", "3", "--eval_samples", "6", "--calibration_batches", "1"]
TINY += ["--save_every", "1", "--log_every", "1", "--cpu"]


def run(folder: Path, *flags: str) -> dict:
    return main([*TINY, "--output", str(folder), *flags])


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of an unbroken run over all stages."""
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    run(folder)
    return folder


def metrics(folder: Path) -> dict[tuple[str, int], dict]:
    """Logged numbers by (stage, step), without those that depend on the clock; later lines win."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        (line["stage"], line["step"]): {k: v for k, v in line.items() if k != "tokens_per_second"}
        for line in lines
    }


def test_a_run_leaves_all_that_it_promises(finished):
    for name in (
        "config.json",
        "metrics.jsonl",
        "results.json",
        "loss.png",
        "example.png",
        "student/config.json",
    ):
        assert (finished / name).is_file(), name
    rows = json.loads((finished / "results.json").read_text())["rows"]
    assert list(rows) == ["teacher", "converted", "stage i", "stage ii", "stage iii"]
    steps = [stage_step for stage_step in metrics(finished)]
    assert steps == [("i", 1), ("i", 2), ("ii", 1), ("ii", 2), ("iii", 1), ("iii", 2), ("iii", 3)]


@pytest.mark.parametrize("stage, step", [("i", 1), ("iii", 2)])
def test_a_killed_run_resumes_to_the_numbers_of_an_unbroken_one(finished, tmp_path, monkeypatch, stage, step):
    class KilledError(Exception):
        pass

    train = StageTrainer.training_step

    def killed(self, *args, **kwargs):
        if self.stage.name == stage and self.state.global_step == step:
            raise KilledError
        return train(self, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "training_step", killed)
    with pytest.raises(KilledError):
        run(tmp_path / "broken")
    monkeypatch.undo()
    run(tmp_path / "broken", "--resume")
    assert metrics(tmp_path / "broken") == metrics(finished)
    for name in ("results.json", "stage_iii/taught.safetensors", "student/model.safetensors"):
        assert (tmp_path / "broken" / name).read_bytes() == (finished / name).read_bytes(), name


def test_each_stage_changes_what_it_trains_and_nothing_else(finished):
    after = {
        stage: load_file(finished / f"stage_{stage}" / "taught.safetensors") for stage in ("i", "ii", "iii")
    }
    started = Run(parse([*TINY, "--output", str(finished.parent / "unused")])).convert(str(TEACHER))
    before = {name: tensor.detach() for name, tensor in started.named_parameters() if ".mixer." in name}
    changed = {name for name in before if not torch.equal(before[name], after["i"][name])}
    local = {name for name in before if ".local_swin." in name}
    assert changed and not changed & local
    assert {part for name in changed for part in ("flex_ma", "mix_proj") if part in name} == {
        "flex_ma",
        "mix_proj",
    }
    assert all(
        not torch.equal(after["i"][name], after["ii"][name]) for name in local if name.endswith("weight")
    )
    student, teacher = (
        AutoModelForImageTextToText.from_pretrained(folder).state_dict()
        for folder in (finished / "student", TEACHER)
    )
    common = student.keys() & teacher.keys()
    moved = {name for name in common if not torch.equal(student[name], teacher[name])}
    assert moved and all(".mlp." in name and ".visual." not in name for name in moved)


def test_the_students_folder_opens_and_answers_as_the_student_did(finished):
    student = AutoModelForImageTextToText.from_pretrained(finished / "student")
    collate = ChatCollator(load_processor(str(finished / "student"), padding_side="right"))
    items = DigitsQuestions("heldout", 0).__getitems__(range(6))
    batch = collate(items)
    labels = batch.pop("labels")
    with torch.no_grad():
        answers = student(**batch).logits.argmax(-1)[:, :-1]
    mask = labels[:, 1:] != -100
    right = ((answers == labels[:, 1:]) | ~mask).all(1).float().mean()
    row = json.loads((finished / "results.json").read_text())["rows"]["stage iii"]
    assert right.item() == pytest.approx(row["accuracy"])


def test_the_printed_command_asks_the_student(finished, capsys):
    shutil.rmtree(finished / "student")
    run(finished, "--resume")
    command = capsys.readouterr().out.splitlines()[-1].strip()
    assert command.startswith("python -m linmu.reference.demo.ask ")
    answer = run_forked(COMMANDS, *shlex.split(command)[2:])
    assert answer.returncode == 0 and answer.stdout.strip(), answer.stderr


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--stepz", "1,1,1"], "stepz"),
        (["--stages", "iv"], "invalid choice"),
        (["--stages", "ii", "i"], "--stages must be among i ii iii, in order"),
        (["--stage_i.steps", "0"], "--stage_i.steps must be at least 1"),
        (["--stage_i.steps", "x"], "stage_i.steps"),
        (["--mixer.window", "4"], "mixer.window"),
        (["--mixer.window_thw", "4", "8"], "mixer.window_thw"),
        (["--stage_iii.inputs", "both"], "invalid choice"),
        (["--stage_iii.inputs", "teacher"], "need --stage_iii.inputs student"),
        (["--max_pix", "3"], "max_pix"),
        (["--resume", "--overwrite"], "must not both be given"),
        (["--data", "mine.jsonl"], "--teacher and --data must both be demo, or neither"),
        (["--teacher", "mine"], "--teacher and --data must both be demo, or neither"),
        (["--eval_data", "mine.jsonl"], "--eval_data must come with --data"),
        (["--batch_size", "0"], "--batch_size must be at least 1"),
        (["--backend", "numpy"], "invalid choice"),
    ],
)
def test_unknown_flags_and_impossible_combinations_are_refused(capsys, flags, message):
    with pytest.raises(SystemExit) as stopped:
        parse(flags)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def settings_by_flag(settings: dict, prefix: str = "") -> dict[str, object]:
    """{"stage_i.steps": 100, ...}"""
    flat = {}
    for name, value in settings.items():
        deeper = isinstance(value, dict)
        flat |= settings_by_flag(value, f"{prefix}{name}.") if deeper else {f"{prefix}{name}": value}
    return flat


@pytest.mark.parametrize("program", [ROOT / "distill.py", "linmu.reference.training"])
def test_every_setting_is_a_flag_with_help(program):
    text = run_forked(COMMANDS, program, "--help").stdout
    names = [*settings_by_flag(settings_of(Config())), "dry_run", "resume", "overwrite", "settings"]
    for name in names:
        shown = re.search(rf"--{re.escape(name)}\b[^│]*│\n│ +(\w|\')", text)
        assert shown and not shown[0].strip().startswith("(default"), name


def test_presets_change_defaults_and_flags_win():
    assert parse(["--preset", "vlm"]).dtype == "bfloat16"
    assert parse(["--preset", "vlm", "--dtype", "float32"]).dtype == "float32"
    assert parse(["--dtype", "float32", "--preset", "vlm"]).dtype == "float32"
    for preset in PRESETS:
        assert parse(["--preset", preset]) == PRESETS[preset]


@pytest.mark.parametrize("ending", ["yaml", "json"])
def test_a_settings_file_says_what_flags_would_say(tmp_path, ending):
    path = tmp_path / f"mine.{ending}"
    if ending == "yaml":
        path.write_text(
            "preset: vlm\nteacher: T\ndata: [a.jsonl, b.jsonl@2]\nlayers: [0, 2]\ncpu: true\n"
            "mixer: {scan_rope: false, window_thw: [2, 8, 8]}\nstage_iii:\n  learning_rate: 3e-5\n"
        )
    else:
        settings = {"preset": "vlm", "teacher": "T", "data": ["a.jsonl", "b.jsonl@2"], "layers": [0, 2]}
        settings |= {"mixer": {"scan_rope": False, "window_thw": [2, 8, 8]}, "cpu": True}
        path.write_text(json.dumps(settings | {"stage_iii": {"learning_rate": 3e-5}}))
    flags = ["--preset", "vlm", "--teacher", "T", "--data", "a.jsonl", "b.jsonl@2", "--layers", "0", "2"]
    flags += ["--mixer.no_scan_rope", "--mixer.window_thw", "2", "8", "8", "--cpu"]
    flags += ["--stage_iii.learning_rate", "3e-5"]
    read = parse(["--settings", str(path)])
    assert replace(read, settings="") == parse(flags)
    assert parse(["--settings", str(path), "--seed", "3", "--no_cpu"]).seed == 3


def test_the_settings_that_a_run_keeps_are_a_settings_file(tmp_path):
    flags = [
        "--preset",
        "vlm",
        "--teacher",
        "T",
        "--data",
        "x",
        "--stage_ii.inputs",
        "student",
        "--layers",
        "1",
    ]
    config = parse(flags)
    (tmp_path / "config.json").write_text(json.dumps(settings_of(config)))
    assert replace(parse(["--settings", str(tmp_path / "config.json")]), settings="") == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stage_iii: {lr: 1}", "stage_iii.lr"),
        ("seed: many", "seed"),
        ("[1, 2]", "--settings must hold settings by name"),
        ("a: [", "--settings must be a YAML or JSON file"),
        (None, "--settings must be a YAML or JSON file"),
    ],
)
def test_a_settings_file_that_cannot_be_is_refused(tmp_path, capsys, text, message):
    path = tmp_path / "settings.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises((SystemExit, RefusedError)) as stopped:
        parse(["--settings", str(path)])
    assert message in capsys.readouterr().err + str(stopped.value)


def test_a_preset_may_be_appended_to_any_command():
    """As `.ci/run` does."""
    assert parse(["--cpu", "--preset", "smoke"]).stage_i.steps == PRESETS["smoke"].stage_i.steps


def test_mixer_options_are_those_of_linmu_config():
    config = LinMUConfig(width=8, heads=1, groups=1, head_dim=8)
    assert asdict(MixerOptions()) == config.options()


def test_a_stage_refuses_to_start_without_the_one_before(tmp_path):
    with pytest.raises(RefusedError, match="stage ii must start from stage i"):
        run(tmp_path, "--stages", "ii")
    run(tmp_path, "--stages", "ii", "--allow_missing_stage", "--overwrite")
    assert (tmp_path / "stage_ii" / "taught.safetensors").is_file()


def test_stages_run_one_by_one_are_stages_run_at_once(finished, tmp_path):
    for stage in ("i", "ii", "iii"):
        run(tmp_path / "run", "--stages", stage)
    name = "stage_iii/taught.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes()


def test_a_folder_in_use_is_refused(finished):
    with pytest.raises(RefusedError, match="--output must be a folder without a run"):
        run(finished)
    with pytest.raises(RefusedError, match=r"other values of \['seed'\]"):
        run(finished, "--resume", "--seed", "1")


def test_both_backends_teach_alike(finished, tmp_path):
    run(tmp_path / "slow", "--backend", "reference", "--stages", "i")
    fast, slow = metrics(finished), metrics(tmp_path / "slow")
    for step in (1, 2):
        assert fast["i", step]["loss"] == pytest.approx(slow["i", step]["loss"], rel=1e-4)


@pytest.fixture
def own_data(tmp_path) -> Path:
    """A user's JSONL file: an image, a video and a text question, and a line whose image is missing."""
    rows = []
    for index, item in enumerate(DigitsQuestions("train", 0).__getitems__(range(20))):
        messages = []
        for message in item["messages"]:
            blocks = []
            for number, block in enumerate(message["content"]):
                if block["type"] in ("image", "video"):
                    frames = [block["image"]] if block["type"] == "image" else block["video"]
                    paths = [f"{index}-{number}-{place}.png" for place in range(len(frames))]
                    for path, frame in zip(paths, frames, strict=True):
                        picture = frame if isinstance(frame, Image.Image) else Image.fromarray(frame)
                        picture.save(tmp_path / path)
                    block = {"type": block["type"], block["type"]: paths[0] if len(paths) == 1 else paths}
                blocks.append(block)
            messages.append({"role": message["role"], "content": blocks})
        rows.append({"kind": item["kind"], "messages": messages})
    rows.append({"messages": [{"role": "user", "content": "Say 3."}, {"role": "assistant", "content": "3"}]})
    broken = {"role": "user", "content": [{"type": "image", "image": "missing.png"}]}
    rows.append({"messages": [broken, {"role": "assistant", "content": "3"}]})
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_own_data_teaches_and_a_broken_line_is_named_and_skipped(own_data, tmp_path, caplog, capsys):
    flags = ["--teacher", str(TEACHER), "--data", str(own_data), "--stages", "i", *steps(9, 1, 1)]
    results = run(tmp_path / "run", *flags, "--on_broken", "skip")
    assert "stage i" in results["rows"]
    assert "mine.jsonl, line 22: FileNotFoundError" in caplog.text
    assert "skipped 1 broken samples (1 FileNotFoundError), named in" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["mixture", "stream"])
def test_a_mixture_or_a_stream_resumes_to_the_numbers_of_an_unbroken_run(own_data, tmp_path, kind):
    data = {"mixture": [f"{own_data}@3", str(own_data)], "stream": [str(own_data)]}[kind]
    more = [] if kind == "mixture" else ["--streaming", "--eval_data", str(own_data)]
    flags = ["--teacher", str(TEACHER), "--data", *data, "--stages", "i", "--on_broken", "skip", *more]
    flags += [*steps(4, 1, 1), "--workers", "1", "--backend", "optimized"]
    run(tmp_path / "whole", *flags)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "stage_i" / "checkpoint-4")
    (tmp_path / "cut" / "stage_i" / "taught.safetensors").unlink()
    run(tmp_path / "cut", *flags, "--resume")
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    name = "stage_i/taught.safetensors"
    assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_evaluate_measures_what_the_run_measured(finished, capsys):
    """Two models apart, where the run had one."""
    flags = ["--eval_samples", "6", "--batch_size", "3", "--cpu"]
    got = main(["evaluate", str(finished / "student"), *flags])
    rows = json.loads((finished / "results.json").read_text())["rows"]
    for mine, theirs in (("teacher", "teacher"), ("student", "stage iii")):
        for measure in ("accuracy", "kinds", "agreement"):
            assert got[mine][measure] == pytest.approx(rows[theirs][measure]), measure
        assert got[mine]["kl"] == pytest.approx(rows[theirs]["kl"], rel=1e-3)
    assert "accuracy perplexity         KL" in capsys.readouterr().out


def test_evaluate_works_without_a_teacher_on_own_data(finished, own_data):
    flags = ["--data", str(own_data), "--on_broken", "skip", "--eval_samples", "22", "--cpu"]
    (row,) = main(["evaluate", str(finished / "student"), *flags]).values()
    assert 0 <= row["accuracy"] <= 1 and "kl" not in row and len(row["kinds"]) > 3


@pytest.mark.parametrize("arguments", [[], ["--cpu"], ["nowhere"], [str(TEACHER)]])
def test_evaluate_refuses_what_is_no_student(arguments):
    with pytest.raises(RefusedError):
        main(["evaluate", *arguments])


def test_a_broken_line_is_refused_by_name_by_default(own_data):
    data = Conversations(own_data)
    assert data[0]["kind"] and len(data) == 22
    with pytest.raises(ValueError, match=r"mine.jsonl, line 22: FileNotFoundError.*missing.png"):
        data[21]


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"messages": []}', '{"messages": [{"role": "user", "content": "x"}]}']
)
def test_a_line_that_is_no_conversation_is_refused_by_name(tmp_path, line):
    (tmp_path / "bad.jsonl").write_text(line)
    with pytest.raises(ValueError, match=r"bad.jsonl, line 1: "):
        Conversations(tmp_path / "bad.jsonl")[0]


def test_long_videos_are_thinned_evenly(own_data):
    data = Conversations(own_data, max_frames=2)
    videos = [
        block["video"]
        for index in range(20)
        for block in data[index]["messages"][0]["content"]
        if block["type"] == "video"
    ]
    assert videos and all(len(video) == 2 for video in videos)


def test_the_order_of_samples_depends_on_seed_and_place_alone():
    def order(first: int, length: int, seed: int = 3) -> list[int]:
        data = InOrder(list(range(7)), length, seed, first)
        return [data[i] for i in range(length)]

    whole = order(0, 21)
    assert order(5, 16) == whole[5:], "a later start must not change what follows"
    assert all(sorted(whole[i : i + 7]) == list(range(7)) for i in (0, 7, 14)), (
        "an epoch must see every sample once"
    )
    assert whole[:7] != whole[7:14] and order(0, 7, seed=4) != whole[:7]
    assert InOrder(list(range(7)), 9).__getitems__(range(9)) == [0, 1, 2, 3, 4, 5, 6, 0, 1]
