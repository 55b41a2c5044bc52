"""What is measured: each held-out conversation once, broken ones not at all, in the dtype asked for."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from linmu import optimized
from linmu.reference import convert
from linmu.reference.demo import TEACHER
from linmu.reference.prompts.processors import load_processor
from linmu.reference.training.commands.command_line import parse
from linmu.reference.training.commands.evaluate import open_models, open_processor
from linmu.reference.training.commands.main import main
from linmu.reference.training.evaluation.scores import Scores
from linmu.reference.training.example import example_of
from linmu.reference.training.refusal import RefusedError
from linmu.reference.training.run import Run

from ..forks import COMMANDS, run_forked
from .figures import drawn
from .own_data import BROKEN, flags, row, write

pytestmark = pytest.mark.trial_of_the_reference

SMALL = ["--cpu", "--batch_size", "2"]


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    """The folder of an untrained student."""
    folder = tmp_path_factory.mktemp("student") / "student"
    convert(AutoModelForImageTextToText.from_pretrained(TEACHER)).save_pretrained(folder)
    load_processor(str(TEACHER)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def said(student, tmp_path_factory) -> str:
    """What the student answers about p.png."""
    folder = tmp_path_factory.mktemp("said")
    write(folder, "d.jsonl", [row()])
    done = run_forked(COMMANDS, "linmu.reference.demo.ask", str(student), str(folder / "p.png"), "how many")
    assert done.returncode == 0, done.stderr
    return done.stdout.rstrip("\n")


def measured(student: Path, data: Path, *more: str) -> dict:
    skip = ["--data", str(data), "--on_broken", "skip", *SMALL]
    return main(["evaluate", str(student), *skip, *more])["student"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("places", [(1,) * 8, (0,), (2,), (0, 0, 0), (0, 1, 2), (2, 2)])
def test_a_broken_sample_changes_no_measurement(student, tmp_path, places, capsys):
    """Wherever it stands, its neighbours count once."""
    good = [row("zzz") | {"kind": "first"}, row("12") | {"kind": "second"}]
    holed = [*good]
    for place in sorted(places, reverse=True):
        holed.insert(place, row(picture=BROKEN) | {"kind": "broken"})
    whole = measured(student, write(tmp_path, "whole.jsonl", good), "--teacher", str(TEACHER))
    capsys.readouterr()
    got = measured(student, write(tmp_path, "holed.jsonl", holed), "--teacher", str(TEACHER))
    # A perplexity is exp of some 12 nats, whose last float32 digit depends on who else is in the batch.
    assert got.pop("perplexity") == pytest.approx(whole.pop("perplexity"), rel=1e-5)
    assert got.pop("kinds") == whole.pop("kinds") and got == pytest.approx(whole)
    out = capsys.readouterr().out
    assert f"skipped {len(places)} broken samples" in out
    assert out.count("FileNotFoundError") == len(places)


def test_evaluation_writes_nothing_and_counts_its_own_broken_samples(student, tmp_path, capsys):
    folder = tmp_path / "student"
    shutil.copytree(student, folder)
    before = contents(folder)
    for name, count in (("a.jsonl", 5), ("b.jsonl", 1), ("c.jsonl", 0)):
        measured(folder, write(tmp_path, name, [row(), *[row(picture=BROKEN)] * count, row()]))
        out = capsys.readouterr().out
        assert (f"skipped {count} broken samples" in out) == (count > 0)
    assert contents(folder) == before


def test_data_without_one_good_sample_are_refused(student, tmp_path):
    data = write(tmp_path, "d.jsonl", [row(picture=BROKEN)] * 3)
    with pytest.raises(RefusedError, match="--data must hold conversations that can be read"):
        measured(student, data)
    with pytest.raises(RefusedError, match=r"d.jsonl, line 1: FileNotFoundError"):
        main(["evaluate", str(student), "--data", str(data), *SMALL])


@pytest.mark.parametrize("command", ["evaluate", "quantise"])
def test_a_flag_that_would_change_nothing_is_refused(command, student, tmp_path):
    """Held-out data that are not measured, a window that is not the student's."""
    for flag in ("--eval_data=x", "--mixer.window_thw", "--no_packing", "--dry_run", "--stage-i.steps"):
        idle = f"{command} must be given flags that change it, got {flag.split('=')[0]}; they are --preset"
        with pytest.raises(RefusedError, match=idle):
            main([command, str(student), "--cpu", "--data", "mine.jsonl", flag])
    (tmp_path / "run.yaml").write_text("teacher: t\ndata: [train.jsonl]\neval_data: [held.jsonl]")
    with pytest.raises(RefusedError, match=rf"{command} must be told which --data .*'held.jsonl'"):
        main([command, str(student), "--settings", str(tmp_path / "run.yaml")])


def test_what_is_measured_in_part_is_called_so(student, tmp_path, capsys):
    data = write(tmp_path, "d.jsonl", [row("1")] * 3)
    measured(student, data)
    assert "\nmeasured on all 3 conversations\n" in capsys.readouterr().out
    measured(student, data, "--eval_samples", "2")
    assert "\nmeasured on the first 2 of 3 conversations; --eval_samples" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("evaluate", "STUDENT .*--on_broken"),
        ("quantise", "STUDENT .*--dtype"),
        ("benchmark", "--num_processes N"),
        ("ablate", "--variants .*without the reverse scan"),
    ],
)
def test_every_command_says_what_it_takes(command, words, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert not ended.value.code
    assert re.search(rf"usage: distill.py {command} .*{words}", capsys.readouterr().out, re.DOTALL)


@pytest.mark.parametrize("backend", ["reference", "optimized"])
def test_models_open_in_the_dtype_asked_for_with_their_float32_parts(student, backend):
    """As from_pretrained(dtype=) opens them: rotary frequencies and A_log are not rounded."""
    config = parse(["--dtype", "bfloat16", "--backend", backend, "--cpu"])
    models = open_models("evaluate", str(student), config, torch.device("cpu"))
    right = AutoModelForImageTextToText.from_pretrained(TEACHER)
    for name, model in models.items():
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        assert {tensors[key].dtype for key in tensors if key.endswith("q_proj.weight")} == {torch.bfloat16}
        frequencies = [key for key in tensors if key.endswith("inv_freq")]
        wanted = dict(right.named_buffers())
        assert frequencies and all(torch.equal(tensors[key], wanted[key]) for key in frequencies), name
    student_tensors = dict(models["student"].named_parameters())
    for part in ("A_log", ".D", "dt_proj.weight", "scan_gate_proj.weight", "mix_proj.weight"):
        kept = {tensor.dtype for key, tensor in student_tensors.items() if key.endswith(part)}
        assert kept == {torch.float32}, part


@pytest.mark.parametrize("command", ["evaluate", "quantise"])
def test_a_folder_that_does_not_open_is_refused_in_the_name_of_the_command(command, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RefusedError, match=f"^distill: {command} must be given models that open, got"):
        main([command, str(tmp_path), "--cpu"])
    with pytest.raises(RefusedError, match=f"^distill: {command} must be given a folder with a processor"):
        open_processor(command, str(tmp_path))


def test_a_run_in_bfloat16_rounds_no_rotary_frequency():
    run = Run(parse(["--dtype", "bfloat16", "--cpu"]))
    run.open()
    right = dict(AutoModelForImageTextToText.from_pretrained(TEACHER).named_buffers())
    found = {name: b for name, b in run.student.named_buffers() if name.endswith("inv_freq")}
    assert found and all(torch.equal(buffer, right[name]) for name, buffer in found.items())


def test_scores_are_those_of_a_slow_count():
    torch.manual_seed(0)
    logits = {"teacher": torch.randn(3, 4, 7), "student": torch.randn(3, 4, 7)}
    labels = torch.full((3, 6), -100)
    labels[0, 1:4], labels[1, 2], labels[2, 1:5] = torch.tensor([1, 2, 3]), 5, torch.tensor([0, 1, 2, 3])
    scores = Scores(optimized.logit_loss)
    for part in (slice(0, 1), slice(1, 3)):  # positions are those of the part's own rows
        own = labels[part]
        places = (own[:, 1:] != -100).any(0).nonzero().flatten()
        scores.add(
            {name: values[part][:, places] for name, values in logits.items()}, own, ["a", "b"][: len(own)]
        )
    rows = scores.rows()
    right, kl, same, tokens = {"teacher": [], "student": []}, 0.0, 0, 0
    for b in range(3):
        places = [t for t in range(5) if labels[b, t + 1] != -100]
        for model in right:
            right[model].append(all(logits[model][b, t].argmax() == labels[b, t + 1] for t in places))
        for t in places:
            p, q = (logits[model][b, t].log_softmax(-1) for model in ("teacher", "student"))
            kl += float((p.exp() * (p - q)).sum())
            same += int(p.argmax() == q.argmax())
            tokens += 1
    assert rows["student"]["kl"] == pytest.approx(kl / tokens, rel=1e-5)
    assert rows["student"]["agreement"] == pytest.approx(same / tokens)
    for model in right:
        assert rows[model]["accuracy"] == pytest.approx(sum(right[model]) / 3)


@pytest.mark.parametrize("pictures", ["none", "none held out"])
def test_text_alone_is_measured_and_what_it_relies_on_left_out(tmp_path, pictures):
    rows = [row(picture="p.png" if pictures != "none" and i % 20 else None) for i in range(40)]
    with drawn():
        results = main(flags(write(tmp_path, "d.jsonl", rows), tmp_path / "run"))
    for layer in results["rows"]["stage iii"]["layers"]:
        assert layer.keys() == {"layer", "mixer_error", "layer_error"}
    assert (tmp_path / "run" / "layers.png").is_file()


@pytest.mark.parametrize(
    "first",
    [
        {
            "messages": [
                row("")["messages"][0],
                {"role": "assistant", "content": [{"type": "text", "text": "1"}]},
            ]
        },
        row("1", question=""),
        {"messages": [{"role": "system", "content": "Be brief."}, *row("3")["messages"]]},
        {"messages": [*row("3")["messages"], *row("4", picture=None)["messages"]]},
    ],
    ids=["plain", "no question", "system", "two turns"],
)
def test_any_conversation_may_be_held_out_first(tmp_path, first):
    data = write(tmp_path, "d.jsonl", [first, *[row()] * 30])
    more = [*flags(data, tmp_path / "run"), "--stages", "i"]
    main([*more, "--dry_run"])
    main(more)


def test_the_example_is_a_question_about_one_picture_with_an_answer():
    def turns(asked: list, said: list) -> list:
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]

    text, image = {"type": "text", "text": "how many"}, {"type": "image", "image": "picture"}
    one = {"type": "text", "text": "1"}
    assert example_of(turns([text, image], [one])) == ("picture", "how many", "1")
    assert example_of([{"role": "system", "content": [text]}, *turns([image, text], [one])])[2] == "1"
    film = {"type": "video", "video": []}
    for asked in ([text], [text, image, image], [image], [text, image, film]):
        assert example_of(turns(asked, [one])) is None
    assert example_of(turns([text, image], [])) is None
    assert example_of(turns([text, image], [image, one])) == ("picture", "how many", "1")


@pytest.mark.parametrize("question", ["what's in `date`, $HOME?", 'say "é \\ "\ntwo; rm x'])
def test_the_printed_command_asks_the_very_question(tmp_path, capsys, question):
    data = write(tmp_path / "a folder", "d.jsonl", [row("1", question=question)] * 30)
    main([*flags(data, tmp_path / "it's a run"), "--stages", "i"])
    command = capsys.readouterr().out.split("python -m linmu.reference.demo.ask ")[1].rstrip("\n")
    read = subprocess.run(
        ["bash", "-c", f'for word in {command}; do printf "%s\\0" "$word"; done'],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    folder = tmp_path / "it's a run"
    assert read.stdout.split("\0")[:-1] == [str(folder / "student"), str(folder / "example.png"), question]
    assert shlex.split(command)[-1] == question


def test_held_out_pixels_are_in_memory_a_batch_at_a_time(tmp_path):
    count = 12
    data = write(tmp_path, "e.jsonl", [row()] * count, size=(256, 256))
    more = ["--eval_data", str(data), "--eval_samples", str(count), "--batch_size", "3"]
    run = Run(parse([*flags(data, tmp_path / "run"), *more]))
    run.open()
    opened, samples = [], run.held_out.samples
    original = samples.read
    samples.read = lambda line: opened.append(line) or original(line)
    batches = run.held_out.batches()
    next(batches)
    assert len(opened) <= 6, "no more than the batch and one to come"
    assert sum(1 for _ in batches) == 3 and len(opened) == count
    next(run.held_out.batches())
    assert len(opened) > count, "made anew for the next measurement"


def test_measurements_do_not_depend_on_the_batch_size(tmp_path):
    data = write(
        tmp_path, "d.jsonl", [row("1 2 3" if i % 3 else "4", "p.png" if i % 4 else None) for i in range(40)]
    )
    rows = []
    for size in ("2", "3"):
        more = [
            "--eval_data",
            str(data),
            "--eval_samples",
            "7",
            "--batch_size",
            size,
            "--calibration_batches",
            "0",
        ]
        run = Run(parse([*flags(data, tmp_path / size), *more]))
        run.folder.mkdir()
        run.open()
        run.evaluate("converted")
        rows.append(run.results["rows"])
    for name in ("teacher", "converted"):
        for measure, value in rows[0][name].items():
            if measure != "layers":
                assert rows[1][name][measure] == pytest.approx(value, rel=1e-4), measure
    for one, other in zip(rows[0]["converted"]["layers"], rows[1]["converted"]["layers"], strict=True):
        assert other == pytest.approx(one, rel=1e-4)
