"""Teachers and students in lmms-eval: on images and on films, answering as they do without it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForImageTextToText

from linmu.reference import convert, load
from linmu.reference.demo import TEACHER, DigitsQuestions
from linmu.reference.demo.ask import ask
from linmu.reference.prompts.processors import load_processor
from linmu.reference.training.commands.main import main
from linmu.reference.training.refusal import RefusedError

TASKS = {"digits_image": "cell", "digits_film": "moved"}
PUBLIC = {
    "textvqa": "textvqa_val",
    "mmmu": "mmmu_val",
    "longvideobench": "longvideobench_val_v",
    "videomme": "videomme",
}
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/{name}.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_messages: !function messages.of
doc_to_visual: !function messages.pictures
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_new_tokens: 4, temperature: 0}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
MESSAGES = """
def of(doc):
    picture = {"type": doc["type"], "url": doc["path"]}
    return [{"role": "user", "content": [{"type": "text", "text": doc["question"]}, picture]}]


def pictures(doc):
    return [doc["path"]]
"""


PUBLIC_TASK = """
include: {file}
task: {name}_here
tag: []
dataset_path: parquet
dataset_kwargs: {{data_files: {{{split}: {folder}/{name}.parquet}}}}
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """A task of five images and one of five films, lossless; a student nobody trained."""
    pytest.importorskip("lmms_eval", reason="lmms-eval is part of the extra [harness]")
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "messages.py").write_text(MESSAGES)
    for name, kind in TASKS.items():
        rows = []
        for number, item in enumerate(DigitsQuestions("heldout", kinds=(kind,)).__getitems__(range(5))):
            question, picture = item["messages"][0]["content"]
            path = write_picture(folder / f"{name}{number}", picture)
            answer = item["messages"][1]["content"][0]["text"]
            doc = {"type": picture["type"], "path": path, "question": question["text"], "answer": answer}
            rows.append(doc)
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, folder=folder))
    write_public_tasks(folder)
    convert(AutoModelForImageTextToText.from_pretrained(TEACHER)).save_pretrained(folder / "student")
    load_processor(str(TEACHER)).save_pretrained(folder / "student")
    return folder


def write_picture(path: Path, block: dict) -> str:
    """An image as PNG, a video as a film that loses nothing; returns the path."""
    if block["type"] == "image":
        block["image"].save(f"{path}.png")
        return f"{path}.png"
    import av

    with av.open(f"{path}.mkv", "w") as film:
        stream = film.add_stream("ffv1", rate=int(block["fps"]))
        stream.height, stream.width = block["video"].shape[1:3]
        stream.pix_fmt = "bgr0"
        for frame in block["video"]:
            film.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        film.mux(stream.encode())
    return f"{path}.mkv"


def write_public_tasks(folder: Path) -> None:
    """The four benchmarks of the paper, their questions replaced by one of the same columns."""
    import lmms_eval.tasks
    from datasets import Dataset, Image

    still = {"image": str(folder / "digits_image0.png")}
    film = {"videoID": "film", "video_path": "film.mkv", "duration": "short", "duration_group": 15}
    choices = {f"option{i}": letter for i, letter in enumerate("abcde")} | {"options": [*"abcd"]}
    names = {"domain": "Knowledge", "sub_category": "Geography", "task_type": "Counting Problem"}
    names["question_category"] = "S2E"
    rows = {
        "textvqa": still | {"question_id": 0, "question": "which digit?", "answers": ["4"] * 10},
        "mmmu": {"image_1": still["image"], "id": "validation_Art_1", "question": "Is <image 1> a 4?",
                 "options": "['yes', 'no']", "question_type": "multiple-choice", "answer": "A"},
        "longvideobench": film | choices | names | {"id": "0", "question": "what?", "correct_choice": 1},
        "videomme": film | choices | names | {"question_id": "0", "question": "what?", "answer": "A"},
    }  # fmt: skip
    for name, row in rows.items():
        data = Dataset.from_list([row])
        for column in {"image", "image_1"} & row.keys():
            data = data.cast_column(column, Image())
        data.to_parquet(str(folder / f"{name}.parquet"))
        file = Path(lmms_eval.tasks.__file__).parent / name / f"{PUBLIC[name]}.yaml"
        split = "test" if name == "videomme" else "validation"
        text = PUBLIC_TASK.format(file=file, name=name, split=split, folder=folder)
        (folder / f"{name}.yaml").write_text(text)
    for place in (folder / "home/videomme/data", folder / "home/datasets/longvideobench/videos"):
        place.mkdir(parents=True)
        (place / "film.mkv").symlink_to(folder / "digits_film0.mkv")


def questions_of(kind: str) -> list[tuple[dict, list]]:
    """The same questions and pictures without files."""
    items = DigitsQuestions("heldout", kinds=(kind,)).__getitems__(range(5))
    blocks = [item["messages"][0]["content"] for item in items]
    return [(question, [*picture.get("video", [picture.get("image")])]) for question, picture in blocks]


def test_one_command_sets_teacher_and_student_side_by_side(tasks, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tasks / "cache"))
    monkeypatch.setenv("HF_HOME", str(tasks / "home"))
    public = [f"{name}_here" for name in PUBLIC]
    flags = ["--tasks", ",".join([*TASKS, *public]), "--include_path", str(tasks)]
    flags += ["--output", str(tasks / "out")]
    flags += ["--model_args", "dtype=float32", "--batch_size", "2", "--log_samples"]
    table = main(["benchmark", str(tasks / "student"), "--teacher", str(TEACHER), *flags])
    assert table == (tasks / "out" / "benchmark.md").read_text()
    assert table.startswith("| task | metric | teacher | student |")
    for task in public:
        assert any(line.startswith(f"| {task} |") for line in table.splitlines()), table
    for task in TASKS:
        (row,) = [line for line in table.splitlines() if line.startswith(f"| {task} |")]
        assert "| exact_match | 1.0000" in row, table
        answers = logged(tasks / "out" / "student", task)
        assert row.count("| 1.0000") == 1 and len(set(answers)) > 1  # nobody trained it
        student, processor = load(str(tasks / "student")), load_processor(str(tasks / "student"))
        assert answers == [
            ask(student, processor, frames, question["text"], max_new_tokens=4)
            for question, frames in questions_of(TASKS[task])
        ]


def logged(folder: Path, task: str) -> list[str]:
    """The answers that lmms-eval wrote down, in the order of the documents."""
    (samples,) = folder.rglob(f"*samples_{task}.jsonl")
    rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    return [row["filtered_resps"] for row in rows]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--tasks", "mmmu_val"], "benchmark must be followed by a folder, got none"),
        (["nothere", "--tasks", "mmmu_val"], "benchmark must be given a student's folder, got nothere"),
        (["."], "--tasks must name tasks of lmms-eval, got none"),
        ([".", "--num_processes", "two"], "--num_processes must be a number of at least 1, got two"),
        ([".", "--num_processes", "0"], "--num_processes must be a number of at least 1, got 0"),
        ([".", "--num_processes"], "--num_processes must be followed by a value, got none"),
    ],
)
def test_a_benchmark_that_cannot_be_is_refused_before_anything_is_opened(
    arguments, says, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr("subprocess.run", lambda *_: pytest.fail("lmms-eval was started"))
    with pytest.raises(RefusedError, match=f"^distill: {says}"):
        main(["benchmark", *arguments])
