"""What a run lets its user watch: metrics, plots, loggers, and what each layer relies on."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from linmu.reference import Lesson, Objective, attach_teacher, convert
from linmu.reference.training.commands.main import main
from linmu.reference.training.evaluation.evaluation import evaluate
from linmu.reference.training.progress import append_json, forget_after, read_metrics

from ..student.tiny_checkpoint import build_teacher, every_kind, shake_mixers
from .figures import drawn
from .flags import steps

pytestmark = pytest.mark.trial_of_the_reference

TINY = [*steps(2, 2, 2), "--batch_size", "2", "--eval_samples", "4", "--calibration_batches", "1"]
TINY += ["--save_every", "9", "--log_every", "1", "--cpu", "--backend", "optimized"]


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watched") / "run"
    with drawn():
        main([*TINY, "--report", "tensorboard", "--output", str(folder)])
    return folder


def test_a_logger_is_told_what_metrics_jsonl_holds(watched):
    lines = {(line["stage"], line["step"]): line for line in read_metrics(watched / "metrics.jsonl")}
    for stage, terms in (("i", {"mixer"}), ("ii", {"mixer", "layer"}), ("iii", {"layer", "logits"})):
        events = {}
        for path in (watched / f"stage_{stage}").rglob("events*"):
            accumulator = EventAccumulator(str(path)).Reload()
            events |= {tag: accumulator.Scalars(tag) for tag in accumulator.Tags()["scalars"]}
        for term in terms | {"loss", "grad_norm"}:
            told = {event.step: event.value for event in events[f"train/{term}"]}
            assert told == pytest.approx({step: lines[stage, step][term] for step in (1, 2)})


def test_wandb_has_a_run_for_each_stage(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="the extra [watch] is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    told, finish = {}, wandb.finish

    def note_and_finish() -> None:
        told[wandb.run.name] = dict(wandb.run.summary)
        finish()

    monkeypatch.setattr(wandb, "finish", note_and_finish)
    main([*TINY, "--report", "wandb", "--output", str(tmp_path / "run")])
    lines = {(line["stage"], line["step"]): line for line in read_metrics(tmp_path / "run" / "metrics.jsonl")}
    assert list(told) == [f"run, stage {stage}" for stage in ("i", "ii", "iii")]
    for name, summary in told.items():
        last = lines[name.removeprefix("run, stage "), 2]
        for term in ("loss", "grad_norm"):
            assert summary[f"train/{term}"] == pytest.approx(last[term])
        assert summary["train/global_step"] == 2
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 3


def test_plots_of_losses_and_layers_are_drawn(watched):
    for name in ("loss.png", "layers.png"):
        with Image.open(watched / name) as image:
            assert image.width > 300 and len(image.convert("L").getcolors()) > 20


def test_results_say_what_every_layer_relies_on_and_how_far_it_is(watched):
    rows = json.loads((watched / "results.json").read_text())["rows"]
    for name in ("converted", "stage i", "stage ii", "stage iii"):
        layers = rows[name]["layers"]
        assert [layer["layer"] for layer in layers] == list(range(len(layers)))
        for error in ("mixer_error", "layer_error"):
            mean = sum(layer[error] for layer in layers) / len(layers)
            assert mean == pytest.approx(rows[name][error], rel=1e-5)
        for layer in layers:
            assert layer["forward"] + layer["reverse"] + layer["local"] == pytest.approx(1)
    start = rows["converted"]["layers"][0]
    assert (start["forward"], start["reverse"], start["local"]) == pytest.approx((0.25, 0.25, 0.5))


def test_reliance_is_the_mean_of_the_gates_over_vision_tokens():
    """Against the gates written out, token by token."""
    teacher = build_teacher()
    student = shake_mixers(convert(teacher))
    attach_teacher(student, teacher)
    lesson, inputs = Lesson(student, Objective(mixer=1.0, inputs="teacher")), every_kind("right")
    labels = inputs["input_ids"].masked_fill(~inputs["attention_mask"].bool(), -100)
    seen = {}
    layer = lesson.layers[1].self_attn.mixer

    def keep(_, args, kwargs) -> None:
        seen.setdefault("u", kwargs["hidden_states"].detach())  # first pass: the student's own states

    hook = layer.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        row = evaluate(lesson, [(["a"] * len(labels), inputs | {"labels": labels})], torch.device("cpu"))
    hook.remove()
    got = row["student"]["layers"][1]
    forward, reverse, local, tokens = 0.0, 0.0, 0.0, 0
    for b, t in lesson.vision_tokens(inputs).nonzero().tolist():
        u = seen["u"][b, t]
        mix = torch.sigmoid(layer.mix_proj.weight.float() @ u + layer.mix_proj.bias).item()
        gate = torch.sigmoid(layer.flex_ma.scan_gate_proj.weight @ u + layer.flex_ma.scan_gate_proj.bias)
        for g in gate.tolist():
            forward, reverse, local = forward + mix * g, reverse + mix * (1 - g), local + 1 - mix
            tokens += 1
    assert got["forward"] == pytest.approx(forward / tokens, rel=1e-4)
    assert got["reverse"] == pytest.approx(reverse / tokens, rel=1e-4)
    assert got["local"] == pytest.approx(local / tokens, rel=1e-4)
    assert abs(got["forward"] - got["reverse"]) > 1e-4


def test_metrics_survive_a_line_cut_short_and_forget_what_is_done_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for stage, step in (("i", 1), ("i", 2), ("ii", 1), ("ii", 2)):
        append_json(path, {"stage": stage, "step": step})
    with path.open("a") as file:
        file.write('{"stage": "ii", "st')
    assert len(read_metrics(path)) == 4
    forget_after(path, "ii", 1)
    assert [(line["stage"], line["step"]) for line in read_metrics(path)] == [("i", 1), ("i", 2), ("ii", 1)]
    assert path.read_text().endswith("}\n")
