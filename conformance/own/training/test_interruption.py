"""A run that is killed, or finds the disk full, or meets a number that is none, and what is left of it."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from linmu.reference.training import stage_trainer
from linmu.reference.training.commands import main as commands
from linmu.reference.training.commands.main import main
from linmu.reference.training.lesson import Lesson
from linmu.reference.training.safety.atomic_writes import whole_file, whole_folder
from linmu.reference.training.safety.guards import TrainingStoppedError
from linmu.reference.training.stage_trainer import StageTrainer

from .flags import steps

pytestmark = pytest.mark.trial_of_the_reference

TINY = [*steps(2, 2, 3), "--batch_size", "2", "--eval_samples", "4", "--calibration_batches", "1"]
TINY += ["--save_every", "1", "--log_every", "2", "--cpu", "--backend", "optimized"]
KEPT = (
    "results.json",
    "stage_i/taught.safetensors",
    "stage_iii/taught.safetensors",
    "student/model.safetensors",
)
CHILD = multiprocessing.get_context("fork")  # a child starts where the tests are, without importing again


def run(folder: Path, *flags: str) -> dict:
    return main([*TINY, "--output", str(folder), *flags])


def run_in_child(folder: Path, before=lambda: None) -> multiprocessing.Process:
    """Start a run, or go on with it, in a process that can be killed."""

    def work() -> None:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        before()
        run(folder, "--resume")

    child = CHILD.Process(target=work)
    child.start()
    return child


def left(folder: Path) -> dict:
    """What a run leaves that does not depend on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    return {"metrics": logged, "names": names} | {name: (folder / name).read_bytes() for name in KEPT}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    run(folder)
    return folder


def test_a_run_killed_at_random_moments_ends_with_the_numbers_of_an_unbroken_one(
    unbroken, tmp_path, pytestconfig
):
    wanted = 20 if pytestconfig.getoption("thorough") else 2
    draw, kills = random.Random(0), 0
    while True:
        folder = tmp_path / "killed"
        child = run_in_child(folder)
        child.join(draw.uniform(0.2, 1.4) if kills < wanted else None)  # a run takes about as long
        if child.is_alive():
            child.kill()
            child.join()
        assert child.exitcode in (0, -signal.SIGKILL)
        kills += child.exitcode != 0
        if child.exitcode == 0:
            assert left(folder) == left(unbroken)
            if kills >= wanted:
                return
            shutil.rmtree(folder)


def test_a_run_killed_while_it_writes_loses_nothing(unbroken, tmp_path, pytestconfig):
    """The moments are calls of fsync: among them is every step of writing a checkpoint."""
    for moment in range(1, 120, 6) if pytestconfig.getoption("thorough") else (76,):  # before an old one goes
        folder = tmp_path / f"killed {moment}"

        def die_at_the_moment(moment: int = moment) -> None:
            calls, sync = [], os.fsync

            def fsync(handle: int) -> None:
                calls.append(handle)
                if len(calls) == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                sync(handle)

            os.fsync = fsync

        child = run_in_child(folder, die_at_the_moment)
        child.join()
        assert child.exitcode in (0, -signal.SIGKILL)  # 0: the run has fewer such moments
        run(folder, "--resume")
        assert left(folder) == left(unbroken)


@pytest.mark.parametrize(
    ("command", "told"), [("--cpu", "the same command with --resume"), ("ablate", "the same command goes on")]
)
def test_an_interruption_by_the_user_says_how_to_go_on(command, told, monkeypatch, capsys):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "main", interrupt)
    monkeypatch.setattr("sys.argv", ["distill.py", command])
    with pytest.raises(SystemExit) as ended:
        commands.run_command()
    assert ended.value.code == 130 and told in capsys.readouterr().err


def test_a_full_disk_is_an_error_that_loses_nothing(unbroken, tmp_path, monkeypatch):
    save = StageTrainer._save_checkpoint

    @contextmanager
    def room(size: int):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    def save_without_room(self, *args):
        with room(300_000 if self.state.global_step == 2 else resource.RLIM_INFINITY):
            save(self, *args)

    monkeypatch.setattr(StageTrainer, "_save_checkpoint", save_without_room)
    with pytest.raises(
        TrainingStoppedError, match=r"must fit on the disk.*checkpoint is .*checkpoint-1, make room"
    ):
        run(tmp_path)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "stage_i").iterdir()] == ["checkpoint-1"]
    run(tmp_path, "--resume")
    assert left(tmp_path) == left(unbroken)


def test_what_is_written_whole_is_there_whole_or_as_before(tmp_path):
    (tmp_path / "file").write_text("before")
    with pytest.raises(RuntimeError), whole_file(tmp_path / "file") as part:
        part.write_text("half")
        raise RuntimeError
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "folder") as part:
        (part / "half").write_text("half")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "before"
    for text in ("first", "second"):
        with whole_folder(tmp_path / "folder") as part:
            (part / text).write_text(text)
        assert [path.name for path in (tmp_path / "folder").iterdir()] == [text]


def poisoned(index: int, kind: str, value: float):
    """A forward in which one layer's output, for the second sample, or its gradient is not finite."""
    forward = Lesson.forward

    def forward_poisoned(self, labels=None, **inputs):
        mixer = self.layers[index].self_attn.mixer
        rows = torch.zeros(len(inputs["input_ids"]), 1, 1)
        rows[1] = value
        if kind == "output":
            hook = mixer.register_forward_hook(lambda module, args, output: (output[0] + rows, *output[1:]))
        elif torch.is_grad_enabled():
            hook = mixer.mix_proj.bias.register_hook(lambda gradient: gradient * value)
        try:
            return forward(self, labels, **inputs)
        finally:
            if kind == "output":
                hook.remove()

    return forward_poisoned


@pytest.mark.parametrize(
    ("stage", "value", "late"), [("i", float("nan"), False), ("iii", float("inf"), True)]
)
def test_a_number_that_is_none_stops_the_run_and_is_named(tmp_path, monkeypatch, stage, value, late):
    monkeypatch.setattr(stage_trainer, "is_on_gpu", lambda model: late)
    step = StageTrainer.training_step

    def poison(self, *args, **kwargs):
        if self.stage.name == stage and self.state.global_step == 1:
            monkeypatch.setattr(Lesson, "forward", poisoned(3, "output", value))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "training_step", poison)
    says = rf"stage {stage}, step 2: the loss must be finite, got (nan|inf); first in layer 3, "
    with pytest.raises(
        TrainingStoppedError, match=says + r"the student's mixer, samples sample \d+; .*checkpoint-1"
    ):
        run(tmp_path)


def test_a_gradient_that_is_none_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(Lesson, "forward", poisoned(2, "gradient", float("nan")))
    with pytest.raises(
        TrainingStoppedError, match=r"step 1: gradients must be finite.*layers.2.*mix_proj.bias, samples"
    ):
        run(tmp_path)
    assert not list((tmp_path / "stage_i").glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            ["--stage_i.learning_rate", "0", "--stage_i.learning_rate_new", "0"],
            "stage i, step 1: a learning rate must be positive",
        ),
        ([], "stage i, step 1: the loss must depend on what is trained"),
    ],
)
def test_a_loss_that_cannot_fall_is_caught_at_the_first_step(tmp_path, monkeypatch, flags, says):
    if not flags:
        forward = Lesson.forward

        def cut(self, labels=None, **inputs):
            terms = forward(self, labels, **inputs)
            zero = 0 * sum(p.sum() for p in self.parameters() if p.requires_grad)
            return {name: term.detach() + zero for name, term in terms.items()}

        monkeypatch.setattr(Lesson, "forward", cut)
    with pytest.raises(TrainingStoppedError, match=says):
        run(tmp_path, *flags)
