"""What the benchmark of vLLM measures first, when it stops, and what it reports; vLLM is not needed."""

from __future__ import annotations

import json
import signal
import sys
from types import SimpleNamespace

import pytest

from linmu.optimized.serving import benchmark
from linmu.optimized.serving.report import report

ROOM = {"blocks": 900, "tokens": 14400, "held": {"2048": 300, "131072": 0, "32768": 20}}


def cells_of(who: str) -> list[tuple]:
    arguments = SimpleNamespace(who=who, lengths=(32768, 2048, 131072), counts=(256, 1), most=1024)
    return [tuple(cell.values()) for cell in benchmark.cells(arguments, ROOM)]


def test_a_teacher_decodes_as_many_as_its_memory_holds_and_a_student_up_to_its_own():
    teacher, student = (
        [cell[1:] for cell in cells_of(who) if cell[0] == "decoding"] for who in ("teacher", "student")
    )
    assert teacher == [(32768, 20), (32768, 1), (2048, 256), (2048, 1)]
    assert student == [(None, 1), (None, 256), (None, 900)]
    prompts = [cell for cell in cells_of("teacher") if cell[0] == "prompt"]
    assert prompts[:3] == [("prompt", length, 1) for length in (2048, 32768, 131072)]


def test_a_cell_that_would_not_end_is_not_timed(monkeypatch):
    asked = []

    def run(llm, size, length, requests, tokens, filled):
        asked.append(tokens)
        return tokens / 4, []

    monkeypatch.setattr(benchmark, "run", run)
    arguments = SimpleNamespace(size="tiny", who="student")
    assert "skipped" in benchmark.decoding(None, arguments, None, 8, left=4.9) and asked == [4, 4]
    found = benchmark.decoding(None, arguments, None, 8, left=5.1)
    assert found["ms_a_step"] == 250 and found["tokens_per_second"] == 32


def test_the_budget_ends_the_run_with_its_engine(monkeypatch, tmp_path):
    ended = []
    core = SimpleNamespace(shutdown=lambda: ended.append("engine"))
    llm = SimpleNamespace(llm_engine=SimpleNamespace(engine_core=core))
    handlers = [signal.getsignal(number) for number in (signal.SIGALRM, signal.SIGTERM)]
    monkeypatch.setattr(benchmark, "engine", lambda arguments: llm)
    monkeypatch.setattr(benchmark, "versions", dict)
    monkeypatch.setattr(benchmark, "pool", lambda llm, arguments: ROOM)
    monkeypatch.setattr(benchmark, "decoding", lambda *args: signal.raise_signal(signal.SIGALRM))
    out = tmp_path / "lines.jsonl"
    monkeypatch.setattr(sys, "argv", ["benchmark", "student", "--out", str(out)])
    try:
        benchmark.main()
    finally:
        for number, handler in zip((signal.SIGALRM, signal.SIGTERM), handlers, strict=True):
            signal.signal(number, handler)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert ended == ["engine"] and lines[-1]["skipped"] == "the budget was spent"
    assert [line["cell"] for line in lines] == ["start", "pool", "end"]


def test_the_report_compares_what_was_measured_and_says_what_was_not(tmp_path):
    start = {"cell": "start", "device": "GPU", "vllm": "1", "torch": "2", "transformers": "3"}
    both = {"cell": "decoding", "requests": 16}
    lines = [
        start | {"who": "teacher"},
        {"who": "teacher", "cell": "pool", "blocks": 9, "held": {"2048": 50, "32768": 3}},
        {"who": "student", "cell": "pool", "blocks": 150, "held": {"2048": 150, "32768": 150}},
        both | {"who": "teacher", "length": 2048, "ms_a_step": 4.0, "tokens_per_second": 4000.0},
        both | {"who": "student", "ms_a_step": 5.0, "tokens_per_second": 3200.0},
        {"who": "student", "cell": "decoding", "requests": 64, "skipped": "no time"},
        both | {"who": "student", "quantization": "fp8", "ms_a_step": 2.0, "tokens_per_second": 8000.0},
    ]
    file = tmp_path / "lines.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    report([str(file)], tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| 2,048 | 50 | 150 | 3.00× | 4,000 (16 at once) | 3,200 (16 at once) | 0.80× |" in text
    assert "| 32,768 | 3 | 150 | 50× | not measured |  |  |" in text
    assert "| 2,048 | 16 | 4.0 | 4,000 | 5.0 | 3,200 | 0.80× |" in text and "| 16 | 2.0 | 8,000 |" in text
    assert (tmp_path / "out" / "decoding.png").stat().st_size and json.loads(
        (tmp_path / "out" / "results.json").read_text()
    ) == lines


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_the_model_is_written_without_weights(who, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark.tempfile, "mkdtemp", lambda: str(tmp_path))
    folder = benchmark.folder_of(who, "tiny", 128)
    config = json.loads((tmp_path / "config.json").read_text())
    name = {"student": "LinMUQwen2ForCausalLM", "teacher": "Qwen2ForCausalLM"}[who]
    assert folder == str(tmp_path) and config["architectures"] == [name]
    assert not list(tmp_path.glob("*.safetensors"))
