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


SERVED = {"seconds": 8.0, "tokens_per_second": 1024.0, "ms_to_first_token": 300.0, "ms_between_tokens": 9.0}
WATCHED = {"wall_ms": 20.0, "busy_ms": 16.0, "launches": 12, "steps": 4, "kernels": [["gemm", 8, 12.0]]}


def cells_of(who: str, most: int = 1024) -> list[tuple]:
    lengths, counts = (32768, 2048, 131072), (256, 1)
    arguments = SimpleNamespace(who=who, lengths=lengths, counts=counts, most=most, kinds=benchmark.KINDS)
    return [tuple(cell.values()) for cell in benchmark.cells(arguments, ROOM)]


def test_a_teacher_decodes_as_many_as_its_memory_holds_and_a_student_up_to_its_own():
    teacher, student = (
        [cell[1:] for cell in cells_of(who) if cell[0] == "decoding"] for who in ("teacher", "student")
    )
    assert teacher == [(32768, 20), (2048, 300), (2048, 256), (32768, 1), (2048, 1)]
    assert student == [(None, 256), (None, 1024), (None, 1)]
    prompts = [cell for cell in cells_of("teacher") if cell[0] == "prompt"]
    watched = [cell[2] for cell in cells_of("student", most=64) if cell[:2] == ("profile", None)]
    assert watched == [1, 64, 16], "so many at once"
    assert prompts[:3] == [("prompt", length, 1) for length in (2048, 32768, 131072)]


class Engine:
    """One with a clock of its own: requests join one a step, a step of three takes 0.125 s."""

    def __init__(self, monkeypatch) -> None:
        self.now, self.tokens, self.waiting, self.ended = 0.0, {}, [], []
        self.llm_engine, self.others = self, 0.5
        monkeypatch.setattr(benchmark.time, "perf_counter", lambda: self.now)

    def add_request(self, name, prompt, options) -> None:
        self.waiting.append((name, options.max_tokens))

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting or self.tokens)

    def step(self) -> list:
        if self.waiting:
            name, tokens = self.waiting.pop(0)
            self.tokens[name] = tokens
        self.now += 0.125 if len(self.tokens) == 3 else self.others
        found = list(self.tokens)
        self.tokens = {name: left - 1 for name, left in self.tokens.items() if left > 1}
        return [SimpleNamespace(request_id=name, outputs=[SimpleNamespace(token_ids=[7])]) for name in found]

    def abort_request(self, names) -> None:
        self.ended += names
        self.waiting, self.tokens = [], {}


@pytest.fixture
def engine(monkeypatch) -> Engine:
    class Options(SimpleNamespace):
        def clone(self):
            return self

    kinds = SimpleNamespace(RequestOutputKind=SimpleNamespace(DELTA=0))
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=Options))
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", kinds)
    return Engine(monkeypatch)


TWO = {"mamba_ssm_cache_dtype": "bfloat16", "options": "prompt_graphs"}
DECODING = {"cell": "decoding", "length": None, "requests": 3}
STUDENT = SimpleNamespace(size="tiny", who="student", computed=False)


def test_only_steps_in_which_all_decode_are_timed(engine):
    found = benchmark.measure(engine, STUDENT, DECODING, left=1000)
    assert found["ms_a_step"] == 125 and found["tokens_per_second"] == 24
    assert found["steps"] == benchmark.STEPS - 3 and not engine.ended


def test_a_cell_that_would_not_end_is_not_begun_and_one_that_does_not_is_cut(engine):
    assert "skipped" in benchmark.measure(engine, STUDENT, DECODING, left=1) and not engine.now
    found = benchmark.measure(engine, STUDENT, DECODING, left=5)
    assert found["cut"] and found["ms_a_step"] == 125 and len(engine.ended) == 3
    assert 5 < engine.now < 6


def test_a_request_waits_for_its_first_token_and_for_those_between(engine):
    cell, engine.others = {"cell": "served", "length": 4, "requests": 2}, 0.125
    found = benchmark.measure(engine, STUDENT, cell, left=1e6)
    steps = benchmark.SERVED + 1
    assert engine.now > found["seconds"] + 4 / 8, "others came before"
    assert found["seconds"] == steps / 8 and found["ms_to_first_token"] == 187.5
    assert found["ms_between_tokens"] == 125
    assert found["tokens_per_second"] == round(2 * benchmark.SERVED / found["seconds"], 1)


def test_a_cell_that_fails_costs_no_other(monkeypatch, tmp_path):
    def measure(llm, arguments, cell, left):
        if cell["cell"] == "served":
            raise RuntimeError("out of memory")
        return {"ms_a_step": 1}

    lines = lines_of_main(monkeypatch, tmp_path, measure)
    failed = [line["cell"] for line in lines if "out of memory" in line.get("skipped", "")]
    assert failed == ["served"] * 3 and lines[-2]["ms_a_step"] == 1


def lines_of_main(monkeypatch, tmp_path, measure, ended=None) -> list[dict]:
    """Run the command on an engine that does nothing, and return what it wrote."""
    core = SimpleNamespace(shutdown=lambda: None if ended is None else ended.append("engine"))
    llm = SimpleNamespace(llm_engine=SimpleNamespace(engine_core=core))
    handlers = [signal.getsignal(number) for number in (signal.SIGALRM, signal.SIGTERM)]
    room = ROOM | {"held": {str(length): 5 for length in benchmark.LENGTHS}}
    monkeypatch.setattr(benchmark, "engine", lambda arguments: llm)
    monkeypatch.setattr(benchmark, "versions", dict)
    monkeypatch.setattr(benchmark, "pool", lambda llm, arguments: room)
    monkeypatch.setattr(benchmark, "measure", measure)
    out = tmp_path / "lines.jsonl"
    monkeypatch.setattr(sys, "argv", ["benchmark", "student", "--most", "900", "--out", str(out)])
    try:
        benchmark.main()
    finally:
        for number, handler in zip((signal.SIGALRM, signal.SIGTERM), handlers, strict=True):
            signal.signal(number, handler)
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_the_budget_ends_the_run_with_its_engine(monkeypatch, tmp_path):
    ended = []
    lines = lines_of_main(monkeypatch, tmp_path, lambda *args: signal.raise_signal(signal.SIGALRM), ended)
    assert ended == ["engine"] and lines[-1]["skipped"] == "the budget was spent"
    assert [line["cell"] for line in lines] == ["start", "pool", "end"]


def test_the_report_compares_what_was_measured_and_says_what_was_not(tmp_path):
    start = {"cell": "start", "device": "GPU", "vllm": "1", "torch": "2", "transformers": "3"}
    both, speeds = {"cell": "decoding", "requests": 16}, ("teacher", "student")
    lines = [
        start | {"who": "teacher"},
        {"who": "teacher", "cell": "pool", "blocks": 9, "held": {"2048": 50, "32768": 3}},
        {"who": "student", "cell": "pool", "blocks": 150, "held": {"2048": 150, "32768": 150}},
        both | {"who": "teacher", "length": 2048, "ms_a_step": 4.0, "tokens_per_second": 4000.0},
        both | {"who": "student", "ms_a_step": 5.0, "tokens_per_second": 3200.0},
        {"who": "student", "cell": "decoding", "requests": 64, "skipped": "no time"},
        both | {"who": "student", "quantization": "fp8", "ms_a_step": 2.0, "tokens_per_second": 8000.0},
        both | {"who": "student", "ms_a_step": 1.0, "tokens_per_second": 16000.0} | TWO,
        *({"who": who, "cell": "served", "length": 2048, "requests": 64} | SERVED for who in speeds),
        {"who": "student", "cell": "profile", "requests": 64} | WATCHED,
    ]
    file = tmp_path / "lines.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    report([str(file)], tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| 2,048 | 50 | 150 | 3.00× | 4,000 (16 at once) | 3,200 (16 at once) | 0.80× |" in text
    assert "| 32,768 | 3 | 150 | 50× | not measured |  |  |" in text
    assert "| 2,048 | 16 | 4.0 | 4,000 | 5.0 | 3,200 | 0.80× |" in text
    assert "| fp8 | 16 | 2.0 | 8,000 |" in text
    assert text.count("| bfloat16, prompt_graphs | 16 | 1.0 | 16,000 |") == 1
    assert "| 2,048 | 64 | 8.0 | 8.0 | 1,024.0 | 1,024.0 | 1.00× | 300.0 | 300.0 | 9.0 | 9.0 |" in text
    assert "**64 requests, 4 steps**: 5.00 ms by the clock, 4.00 in kernels, 3 of them." in text
    assert "| `gemm` | 2.0 | 3.0 |" in text
    assert (tmp_path / "out" / "decoding.png").stat().st_size and json.loads(
        (tmp_path / "out" / "results.json").read_text()
    ) == lines


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_the_model_is_written_without_weights(who, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark.tempfile, "mkdtemp", lambda: str(tmp_path))
    folder = benchmark.folder_of(benchmark.model_of(who, "tiny", 128))
    config = json.loads((tmp_path / "config.json").read_text())
    name = {"student": "LinMUQwen2ForCausalLM", "teacher": "Qwen2ForCausalLM"}[who]
    assert folder == str(tmp_path) and config["architectures"] == [name]
    assert not list(tmp_path.glob("*.safetensors"))
