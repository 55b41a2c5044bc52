"""`--dry_run`: it meets every sample, promises what a stage trains and needs, and writes nothing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from linmu.reference.demo import TEACHER
from linmu.reference.prompts.processors import load_processor
from linmu.reference.training.commands.main import main
from linmu.reference.training.refusal import RefusedError

from .flags import steps

pytestmark = pytest.mark.trial_of_the_reference

ASK = {"role": "user", "content": "Read row 2."}
SAY = {"role": "assistant", "content": "7"}
GOOD = {"messages": [ASK, SAY]}
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def mine(tmp_path) -> Path:
    path = tmp_path / "mine.jsonl"
    missing = {"messages": [{"role": "user", "content": "<image>"}, SAY], "images": ["gone.png"]}
    rows = [GOOD] * 24 + [missing, {"messages": [ASK]}]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def flags(data: Path, *more: str) -> list[str]:
    output = ["--output", str(data.parent / "run"), "--batch_size", "2", "--backend", "optimized", "--cpu"]
    return ["--dry_run", "--teacher", str(TEACHER), "--data", str(data), *output, *more]


def test_all_broken_samples_are_named_at_once_and_refused(mine, capsys):
    with pytest.raises(RefusedError, match="samples must be readable, got 2 that are not"):
        main(flags(mine))
    said = capsys.readouterr().out
    assert re.search(r"mine.jsonl: 22 samples can be read, 2 are broken", said)
    assert "mine.jsonl, line 25: FileNotFoundError" in said and "mine.jsonl, line 26: ValueError" in said


def test_it_says_what_would_be_trained_on_what_and_writes_nothing(mine, capsys):
    main(flags(mine, "--on_broken", "skip"))
    said = capsys.readouterr().out
    assert re.search(r"held out data, .*: 2 samples can be read, 0 are broken", said)
    assert re.search(r"tokens +\d+ to \d+ a sample, median \d+", said)
    assert re.search(r"input_ids +\(2, \d+\) int64", said)
    for stage in ("i", "ii", "iii"):
        assert f"stage {stage} trains " in said and f"stage {stage} freezes " in said
        assert re.search(rf"stage {stage}, \d+ steps: memory [\d.]+ GiB = weights [\d.]+ GiB, states", said)
    assert said.splitlines()[-1] == "nothing stands against this run; without --dry_run it starts"
    assert not (mine.parent / "run").exists()


CONTEXT = {"messages": [ASK, SAY | {"weight": 0}]}


@pytest.mark.parametrize(
    ("training", "says"),
    [
        (CONTEXT, "--data must hold an answer to learn, got none in the first 3 samples"),
        (GOOD, "held-out data must hold conversations that can be read, with an answer to learn, got none"),
    ],
)
def test_data_without_an_answer_are_refused_by_it_and_by_the_run(tmp_path, training, says):
    """Alike: an answer of weight 0 is context, so nothing could be measured, or no logits be learnt."""
    for name, row in (("t.jsonl", training), ("e.jsonl", CONTEXT if training is GOOD else GOOD)):
        (tmp_path / name).write_text("\n".join([json.dumps(row)] * 3))
    given = [*flags(tmp_path / "t.jsonl", "--eval_data", str(tmp_path / "e.jsonl")), *steps(1, 1, 1)]
    for arguments in (given, given[1:]):
        with pytest.raises(RefusedError, match=re.escape(says)):
            main(arguments)


def test_stages_without_logits_need_no_answers(tmp_path):
    for name, row in (("t.jsonl", CONTEXT), ("e.jsonl", GOOD)):
        (tmp_path / name).write_text("\n".join([json.dumps(row)] * 3))
    main([*flags(tmp_path / "t.jsonl", "--eval_data", str(tmp_path / "e.jsonl")), "--stages", "i"])


MEASURED = """
import json, sys
from linmu.reference.training.safety.memory import peak_above, predict, weights
from linmu.reference.training.commands.command_line import parse
from linmu.reference.training.run import Run

config = parse(sys.argv[1:])
run = Run(config)
run.open()
first = run.trainer(run.stages[0], run.folder / "first")
first.train()  # loads what a Trainer needs beside the model
first.model.close()
del first
for stage in run.stages:
    name = stage.name
    if stage.trains_mlps:
        run.add_adapters()
    run.set_free(stage)
    items = [run.training[0]] * config.optimizer.batch_size
    predictions = []
    for objective in stage.objectives:
        lesson = run.lesson(objective)
        predictions.append(predict(lesson, run.encoder(items)).total)
        lesson.close()
    trainer = run.trainer(stage, run.folder / name)
    needed = weights(trainer.model) + peak_above(trainer.train, run.device)
    trainer.model.close()
    print("MEASURED", json.dumps([name, max(predictions), needed]))
"""


def test_a_stage_needs_no_more_memory_than_predicted(tmp_path):
    """A teacher of random weights with 10 times the bundled one's, in a process of its own."""
    config = AutoConfig.from_pretrained(TEACHER)
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 16, "num_key_value_heads": 8}
    for name, size in sizes.items():
        setattr(config.text_config, name, size)
    config.text_config.layer_types = ["full_attention"] * 2
    config.vision_config.out_hidden_size = 512
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "teacher")
    load_processor(str(TEACHER)).save_pretrained(tmp_path / "teacher")
    (tmp_path / "mine.jsonl").write_text(
        "\n".join([json.dumps({"messages": [ASK | {"content": "Read row 2. " * 12}, SAY]})] * 40)
    )
    arguments = ["--teacher", str(tmp_path / "teacher"), "--data", str(tmp_path / "mine.jsonl"), "--cpu"]
    arguments += ["--output", str(tmp_path / "run"), "--batch_size", "8", *steps(2, 2, 2)]
    arguments += ["--eval_samples", "2"]
    arguments += ["--save_every", "99", "--backend", "optimized", "--calibration_batches", "0"]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = [json.loads(line.split(" ", 1)[1]) for line in done.stdout.splitlines() if "MEASURED" in line]
    assert [stage for stage, _, _ in found] == ["i", "ii", "iii"]
    for stage, predicted, needed in found:
        assert 0.7 * predicted < needed < 1.25 * predicted, (stage, predicted, needed)
