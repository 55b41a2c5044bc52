"""A student in lm-evaluation-harness: an ordinary Hugging Face model, once `linmu.reference` is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForImageTextToText

from linmu.reference import convert
from linmu.reference.demo import TEACHER, DigitsQuestions
from linmu.reference.prompts.processors import load_processor

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is an extra of its own: [harness]")
pytestmark = pytest.mark.trial_of_the_reference

TASK = """
task: linmu_digits
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_image: !function images.open_image
doc_to_text: "<image>{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["<|im_end|>"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
IMAGES = """
from PIL import Image


def open_image(doc):
    return [Image.open(doc["image"]).convert("RGB")]
"""
COMMAND = "import linmu.reference; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"


@pytest.fixture
def task(tmp_path) -> Path:
    """Six questions about a picture, as a local task."""
    rows = []
    for number, item in enumerate(DigitsQuestions("heldout", kinds=("cell", "count")).__getitems__(range(6))):
        image, question = item["messages"][0]["content"]
        image["image"].save(tmp_path / f"{number}.png")
        answer = item["messages"][1]["content"][0]["text"]
        rows.append({"image": f"{tmp_path}/{number}.png", "question": question["text"], "answer": answer})
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "digits.yaml").write_text(TASK.replace("DATA", str(tmp_path / "data.jsonl")))
    (tmp_path / "images.py").write_text(IMAGES)
    return tmp_path


def test_the_harness_asks_a_student_as_it_asks_its_teacher(task):
    """All layers kept as attention, so the student must score what the teacher scores: everything."""
    student = convert(AutoModelForImageTextToText.from_pretrained(TEACHER), layers=[])
    student.save_pretrained(task / "student")
    load_processor(str(TEACHER)).save_pretrained(task / "student")
    arguments = ["--model", "hf-multimodal", "--model_args", f"pretrained={task / 'student'},dtype=float32"]
    arguments += ["--tasks", "linmu_digits", "--include_path", str(task), "--apply_chat_template"]
    arguments += ["--device", "cpu", "--batch_size", "2", "--output_path", str(task / "out")]
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *arguments],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(task / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (task / "out").rglob("results*.json")
    assert json.loads(results.read_text())["results"]["linmu_digits"]["exact_match,none"] == 1.0
