"""`python -m linmu.optimized.benchmark`: what it writes adds up, and nothing that fails ends a run."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from linmu import optimized
from linmu.optimized import benchmark, graphs
from linmu.optimized.benchmarks import decoding, kernels, models, training, watching
from linmu.optimized.benchmarks import graphs as bench_graphs
from linmu.optimized.benchmarks.cases import Case, LeftOutError, measure_all
from linmu.optimized.benchmarks.counts import Sizes, attention_counts, scan_counts, window_counts
from linmu.optimized.benchmarks.problems import WINDOW, prompt, window_problem
from linmu.optimized.benchmarks.report import Report
from linmu.optimized.benchmarks.results import crossover, growth_exponent, with_ratios
from linmu.optimized.benchmarks.timing import Ceilings, time_calls
from linmu.optimized.graphs import install
from linmu.optimized.graphs.decoder import GraphedDecoder, Limits

from ..student.tape import tape

CPU = torch.device("cpu")
SIZES = Sizes(heads=2, groups=1, head_dim=16)
SETTING = kernels.Setting(CPU, torch.float32, Ceilings(1e10, 1e10), seconds=0.01)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """The folder of a quick run over two short lengths."""
    folder = tmp_path_factory.mktemp("results")
    flags = "--quick --only kernels,windows,decode --lengths 320,512 --sizes 2x1x16 --layers 1 --budget 60"
    benchmark.main([*flags.split(), "--output", str(folder)])
    return folder


@pytest.fixture(scope="module")
def lines(written) -> list[dict]:
    """What it measured."""
    return json.loads((written / "results.json").read_text())["lines"]


def test_a_quick_run_writes_tables_numbers_and_plots(written, lines):
    environment = json.loads((written / "results.json").read_text())["environment"]
    assert {"device", "commit", "date", "torch", "triton", "command"} <= environment.keys()
    table = (written / "README.md").read_text()
    for name in ("scan", "windows", "decode"):
        assert (written / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert f"({name}.png)" in table
    found = {(line["benchmark"], line["method"]) for line in lines}
    assert {("scan", "LinMU"), ("scan", "causal attention"), ("scan", "reference")} <= found
    assert {("windows", "gather + SDPA + scatter"), ("decode", "teacher")} <= found
    assert [line["status"] for line in lines if line["status"] != "ok"] == []


def test_the_numbers_of_a_line_agree_with_each_other(lines):
    """Rates are counts over the time, a ratio is time over time, the median lies within the spread."""
    key = ("benchmark", "size", "passes", "length")
    ours = {tuple(line[k] for k in key): line for line in lines if line["method"] == "LinMU"}
    for line in lines:
        assert 0 < line["low"] <= line["seconds"] <= line["high"]
        base = ours[tuple(line[k] for k in key)]
        assert ("ratio" in line) == (line is not base)
        if line is not base:
            assert line["ratio"] == pytest.approx(line["seconds"] / base["seconds"])
        if "flops" in line:
            assert line["tflops"] * line["seconds"] * 1e12 == pytest.approx(line["flops"])
            assert line["gbps"] * line["seconds"] * 1e9 == pytest.approx(line["bytes"])
            assert line["of_floor"] * line["seconds"] == pytest.approx(line["floor"])
        if "batch" in line:
            assert line["tokens_per_second"] * line["seconds"] == pytest.approx(line["items"])


def test_a_written_run_can_be_rendered_again(written):
    before = (written / "README.md").read_text()
    (written / "README.md").unlink()
    benchmark.main(["--render", str(written)])
    assert (written / "README.md").read_text() == before


def test_model_and_stages_are_measured(tmp_path):
    """Prefill of both models, and an optimizer step of every stage."""
    flags = "--quick --only model,training --lengths 320 --layers 1 --budget 60"
    report = benchmark.main([*flags.split(), "--output", str(tmp_path)])
    rates = {(line["benchmark"], line["method"], line["passes"]): line for line in report.lines}
    assert {passes for _, _, passes in rates} == {"decoder", *training.LINES}
    for line in rates.values():
        assert line["status"] == "ok"
        assert line["tokens_per_second"] == pytest.approx(320 / line["seconds"])
    student, teacher = (rates["ttft", method, "decoder"] for method in models.METHODS)
    assert teacher["cache_bytes"] == 2 * 320 * 2 * 64 * 4  # keys and values, two groups of 64 float32
    window = 127 * (2 * 2 * 64 * 4 + 1)  # keys, values and which of them are there
    assert (
        student["cache_bytes"] == (8 * 64 * 64 + 3 * (2 * 2 + 8) * 64) * 4 + window
    )  # state, three conv inputs


@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_of_text_is_rows_of_samples(packed):
    batch = training.text_batch("tiny", training.Rows(3, 64, packed), SETTING)
    valid, labels = batch["attention_mask"].bool(), batch["labels"]
    assert ((valid.sum(1) >= 60) & (valid.sum(1) <= 64)).all()
    assert (labels[~valid] == training.UNSUPERVISED).all()
    begins = torch.zeros_like(valid)
    if packed:
        begins = batch["position_ids"] == 0
        assert (begins.sum(1) >= 2).all()
        assert torch.equal(begins[:, 1:], batch["linmu_sequence"].diff(dim=1) > 0)
        assert (batch["position_ids"].diff(dim=1)[~begins[:, 1:]] == 1).all()
    assert torch.equal(labels == training.UNSUPERVISED, ~valid | begins)


@pytest.mark.parametrize("line", ["stage i", "stage iii"])
def test_steps_over_rows_of_text_are_measured(line):
    rows = training.Rows(2, 48, packed=True)
    cases = [*training.text_training_cases("tiny", [rows], SETTING, benchmark.eager_last)]
    assert [(case.passes, case.length) for case in cases] == [
        (f"{name}, 2 packed rows", 48) for name in training.LINES
    ]
    values = next(case for case in cases if case.passes.startswith(f"{line},")).measure()
    assert values["tokens_per_second"] == pytest.approx(2 * 48 / values["seconds"])
    assert values["trained"] > 0
    assert values["busy"] is None
    assert values["replayed"] == ""  # a CPU has no graphs
    on_gpu = kernels.Setting(torch.device("cuda"), torch.bfloat16, Ceilings(1.0, 1.0))
    found = [*training.text_training_cases("tiny", [rows], on_gpu, benchmark.eager_last)]
    order = sorted(found, key=lambda case: case.priority)
    assert [case.method for case in order] == ["LinMU"] * 4 + ["LinMU, eager"] * 4
    assert ["stage ii," in case.passes for case in order] == [False, False, True, True] * 2


def test_norms_and_mlps_are_compiled_once_for_all_layers_and_lengths(monkeypatch):
    """A norm and an MLP, each for one token and for more; the results are those of the model as it was."""
    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counted))
    monkeypatch.setattr(models, "TRIED_LENGTH", 24)
    model = models.build_teacher("small", 3, SETTING)
    hidden = [torch.randn(1, length, 512) for length in (10, 24, 33)]

    def outputs() -> list[torch.Tensor]:
        with torch.no_grad():
            return [
                layer.mlp(layer.input_layernorm(x)) for layer in model.get_decoder().layers for x in hidden
            ]

    before = outputs()
    models.compile_norms_and_mlps(model, SETTING)
    assert len(graphs) == 4
    for ours, theirs in zip(outputs(), before, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert len(graphs) == 4


@pytest.mark.parametrize("power", [0.0, 1.0, 1.37, 2.0])
def test_the_growth_of_a_power_law_is_its_power(power):
    series = {length: 3e-6 * length**power for length in (512, 1024, 4096, 8192, 65536)}
    assert growth_exponent(series) == pytest.approx(power)


def test_growth_is_read_off_the_longest_lengths_and_needs_two():
    fixed_costs = {1: 100.0, 10: 1.0, 100: 10.0, 1000: 100.0, 10_000: 1000.0}
    assert growth_exponent(fixed_costs) == pytest.approx(1.0)
    assert growth_exponent({64: 1.0}) is None


def test_a_crossover_lies_where_the_curves_meet():
    lengths = (100, 1_000, 10_000, 100_000)
    linear, square = {n: 2e-3 * n for n in lengths}, {n: 1e-6 * n**2 for n in lengths}
    assert crossover(linear, square) == pytest.approx(2_000)
    assert crossover(square, linear) is None  # slower at the longest length
    assert crossover(linear, {n: 2 * seconds for n, seconds in linear.items()}) == 100
    assert crossover(linear, {7: 1.0}) is None


def test_counts_equal_those_made_by_hand():
    """Two heads on one group, N = P = 4, ten tokens, eight of them vision, bfloat16."""
    small = Sizes(heads=2, groups=1, head_dim=4)
    # 64 columns of C Bᵀ and their product with x: 2·64·4 each; the state: 2·4·4 to write and to read, and on
    # vision once more for the reverse direction
    flops = 2 * (10 * (2 * 64 * 4 + 2 * 64 * 4 + 2 * 16 + 2 * 16) + 8 * (2 * 16 + 2 * 16))
    x, B, C, dt, gate, segment, y = 80, 80, 160, 80, 80, 80, 160
    forward = scan_counts(small, 10, 8, 2, backward=False)
    assert (forward.flops, forward.moved) == (flops, x + B + C + dt + gate + segment + y)
    both = scan_counts(small, 10, 8, 2, backward=True)
    inputs = x + B + C + dt + gate
    assert (both.flops, both.moved) == (3 * flops, 2 * forward.moved + inputs)
    windows = window_counts(small, 10, 8, 4, 2, backward=False)
    assert (windows.flops, windows.moved) == (2 * 8 * 4 * (2 * 4 + 2 * 4), 8 * 4 * 4 * 2 + 80 + 160)
    assert attention_counts(small, 10, 2, backward=False).flops == 2 * 55 * (2 * 4 + 2 * 4)


def test_a_ratio_compares_the_cost_of_one_item():
    """The teacher fits 2 rows in the time of our 20: it costs ten times as much."""
    place = {"benchmark": "decode", "size": "s", "passes": "largest batch", "length": 8, "status": "ok"}
    ours = place | {"method": "LinMU", "seconds": 1.0, "items": 20}
    theirs = place | {"method": "teacher", "seconds": 1.0, "items": 2}
    assert with_ratios([ours, theirs])[1]["ratio"] == pytest.approx(10.0)


def timed_at(seconds: float):
    """A case's result."""
    return lambda: {"seconds": seconds, "low": seconds, "high": seconds, "spread": 0.0, "runs": 3}


def failing(error: BaseException):
    """A measurement that raises."""

    def measure():
        raise error

    return measure


def statuses(cases, budget=None) -> dict[tuple[str, int], str]:
    """What becomes of cases, by method and length."""
    kept: list[dict] = []
    measure_all(cases, kept.append, budget)
    return {(line["method"], line["length"]): line["status"] for line in kept}


def test_nothing_that_fails_ends_a_run():
    """The reason stands in the line; what needs more memory than what ran out is not tried."""
    case = partial(Case, "scan", size="s", passes="forward")
    found = statuses(
        [
            case(method="missing", length=8, measure=failing(LeftOutError("not installed: x"))),
            case(method="broken", length=8, measure=failing(RuntimeError("wrong tile\nmore"))),
            case(method="broken", length=16, measure=timed_at(1.0)),
            case(method="large", length=8, measure=failing(torch.OutOfMemoryError("no"))),
            case(method="large", length=16, measure=timed_at(1.0)),
            case(method="LinMU", length=16, measure=timed_at(1.0)),
        ]
    )
    assert found["missing", 8] == "not installed: x"
    assert found["broken", 8] == "failed: RuntimeError: wrong tile"
    assert found["large", 8] == "out of memory at 8 tokens"
    assert found["large", 16] == "not tried: out of memory at 8 tokens"
    assert found["broken", 16] == found["LinMU", 16] == "ok"


def test_a_memory_fault_ends_what_comes_after_it():
    """Every later line would fail, and seem to be at fault itself."""
    case = partial(Case, "scan", size="s", passes="forward", length=8)
    fault = type("AcceleratorError", (RuntimeError,), {})("CUDA error: an illegal memory access")
    found = statuses(
        [
            case(method="peer", measure=failing(fault)),
            case(method="LinMU", measure=timed_at(1.0), priority=1),
        ]
    )
    assert found["peer", 8].startswith("failed: AcceleratorError")
    assert found["LinMU", 8] == "not reached: peer at 8 tokens has broken this process's GPU"


def test_a_budget_leaves_out_what_would_not_fit_and_cuts_off_what_does_not_end():
    case = partial(Case, "ttft", size="s", passes="decoder")
    found = statuses(
        [
            case(method="LinMU", length=10, measure=timed_at(0.01), priority=0),
            case(method="teacher", length=10, measure=timed_at(0.01), priority=0, growth=2.0),
            case(method="LinMU", length=100, measure=timed_at(0.01), priority=1),
            case(method="teacher", length=100, measure=timed_at(0.01), priority=1, growth=2.0),
            case(method="slow", length=10, measure=lambda: time.sleep(5), priority=2),
            case(method="late", length=10, measure=timed_at(0.01), priority=3),
        ],
        budget=1.8,
    )
    assert found["LinMU", 100] == "ok"
    assert found["teacher", 100].startswith("left out: about 2 s foretold")
    assert found["slow", 10] == "cut off: the budget ended within it"
    assert found["late", 10] == "not reached: the budget was spent"


def test_every_call_runs_before_it_is_timed():
    """And inputs take turns."""
    done: list[str] = []
    timing = time_calls([partial(done.append, name) for name in "ab"], CPU, seconds=1e-9)
    assert done[:2] == ["a", "b"] and set(done[2:]) == {"a", "b"}
    assert timing.runs == 3 and timing.low <= timing.seconds <= timing.high and timing.memory is None


def test_what_takes_very_long_runs_once():
    """And a budget foretells one run of it, not two."""
    done: list[str] = []
    timing = time_calls([partial(done.append, "a")], CPU, once_from=0.0)
    assert done == ["a"] and timing.runs == 1
    case = partial(Case, "ttft", "teacher", "s", "decoder", measure=timed_at(0.01), growth=2.0)
    lines = [case(10), case(100, once_from=0.5, priority=1)]
    assert statuses(lines, budget=1.5)["teacher", 100] == "ok"


@pytest.mark.parametrize("length", [320, 1000, 1280, 4096])
def test_the_prompt_is_a_video_of_whole_windows_between_text(length):
    where = prompt(length)
    assert all(size % width == 0 for size, width in zip(where.grid, WINDOW, strict=True))
    assert 0.5 * length <= where.vision <= 0.8 * length
    coords = where.coords(CPU)
    optimized.VisionLayout(coords)  # is well formed
    problem = window_problem(length, SIZES, torch.float32, CPU)
    ids = optimized.window_ids(coords, WINDOW, False)
    same = problem.window_id[..., None] == problem.window_id[:, None]
    assert torch.equal(same, ids[..., None] == ids[:, None])
    assert torch.equal(problem.window_id == -1, ids == -1)
    text = where.positions(CPU)[:, 0, where.inside.stop :]
    assert torch.equal(text[0], torch.arange(text.shape[1]) + where.start + max(where.grid))


@pytest.mark.parametrize("method", models.METHODS)
def test_a_chain_of_steps_gives_the_tokens_that_the_model_gives(method):
    """Both caches of the decoding benchmark, filled by a real prompt, against the model's own forward."""
    torch.manual_seed(0)
    pair, length, chain = models.Pair("small", 1, SETTING), 12, decoding.CHAIN
    model = pair.model(method)
    ids = torch.randint(4, 1000, (2, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = model(input_ids=ids, use_cache=True)
        first = output.logits[:, -1:].argmax(-1)
        cache = decoding.cache_of(pair, model, method, length, 2, SETTING)
        if method == "LinMU":
            for held, slot in zip(cache.held, output.past_key_values.layers, strict=True):
                for kept, new in zip(held.tensors, slot.state.tensors, strict=True):
                    kept.copy_(new)
        else:
            for kept, layer in zip(cache.kept, output.past_key_values.layers, strict=True):
                kept[0][:, :, :length], kept[1][:, :, :length] = layer.keys, layer.values
        places = [torch.full((3, 2, 1), length + step) for step in range(chain)]
        angles = [model.get_decoder().rotary_emb(torch.zeros(1), place) for place in places]
        found = decoding.chain(model, cache, first, angles)
        whole = torch.cat([ids, first], 1)
        for _ in range(chain):
            text = torch.full((*whole.shape, 4), -1)  # whatever ids are chosen
            known = {"linmu_coords": text} if method == "LinMU" else {}
            token = model(input_ids=whole, use_cache=False, **known).logits[:, -1:].argmax(-1)
            whole = torch.cat([whole, token], 1)
    assert torch.equal(found, whole[:, -1:])


def test_short_prompts_and_generate_are_measured_with_graphs_and_without(monkeypatch, tmp_path):
    """Every method gives a line; only the capture, and the GPU's own times, need a GPU."""
    limits = Limits((512,), 8, 4096, 4)
    monkeypatch.setattr(graphs, "accelerate", lambda model: install(model, limits, lambda: tape))
    for name, value in {"PROMPT": 320, "FEW": 1, "MANY": 3}.items():
        monkeypatch.setattr(bench_graphs, name, value)
    monkeypatch.setattr(bench_graphs, "wall_and_busy", partial(bench_graphs.wall_and_busy, most=1))
    pair = models.Pair("small", 1, SETTING, prepared=False)
    cases = [*bench_graphs.short_prompt_cases(pair, [320], SETTING, lambda *_: 0)]
    cases += [*bench_graphs.generate_cases(pair, SETTING, lambda *_: 0)][:1]
    report = Report(tmp_path, {"device": "a CPU"})
    measure_all(cases, report.keep)
    assert [line["status"] for line in report.lines] == ["ok"] * 5
    assert {line["method"] for line in report.lines} == set(bench_graphs.PROMPT_METHODS)
    assert not isinstance(pair.model("LinMU").get_decoder().forward, GraphedDecoder)
    report.keep(report.lines[0] | {"busy": 0.0125, "length": 640})
    assert "| busy ms |" in report.markdown() and "| 12.5 |" in report.markdown()


def test_what_only_a_gpu_measures_finds_its_place_in_the_tables(tmp_path):
    report = Report(tmp_path, {"device": "a GPU"})
    line = {"size": "7B", "length": 32768, "status": "ok", "seconds": 0.1, "low": 0.1, "high": 0.1}
    line |= {"spread": 0.0, "runs": 5, "memory": 3 * 2**30, "tokens_per_second": 5120.0}
    decode = {"benchmark": "decode", "passes": "largest batch", "batch": 64, "items": 512}
    decode |= {"cache_bytes": 2**32, "replayed": "CUDA graph", "attention": "flash attention"}
    for method in models.METHODS:
        report.keep(line | decode | {"method": method})
    report.keep(line | {"benchmark": "training", "passes": "stage i", "method": "LinMU"})
    table = (tmp_path / "README.md").read_text()
    assert "| 3,072 | 5,120 | 64 | CUDA graph | 4,096.0 | flash attention | 1× |" in table
    assert "| 7B | stage i | 32,768 | LinMU | 100 | 0% | 3,072 | 5,120 |" in table


def test_named_parts_run_one_after_the_other_at_lengths_of_their_own():
    flags = ["--quick", "--only", "training,kernels", "--lengths", "512", "training=320", "--layers", "1"]
    parser = benchmark.make_parser()
    options = benchmark.checked(parser, parser.parse_args(flags))
    pair = models.Pair("small", 1, SETTING)
    cases = sorted(benchmark.cases_of(options, SETTING, pair, pair), key=lambda case: case.priority)
    kinds = [(case.benchmark, case.length) for case in cases]
    assert [*dict.fromkeys(kinds)] == [("training", 320), ("scan", 512)]


def test_samples_side_by_side_are_one_packed_row():
    one = {"input_ids": torch.arange(6)[None], "labels": torch.arange(6)[None], "pixels": torch.ones(4, 3)}
    row = training.side_by_side([one, one | {"pixels": torch.zeros(4, 3)}])
    assert row["input_ids"].tolist() == [[0, 1, 2, 3, 4, 5] * 2]
    assert row["linmu_sequence"].tolist() == [[0] * 6 + [1] * 6]
    assert torch.equal(row["position_ids"], row["labels"])
    assert row["pixels"].sum() == 12 and len(row["pixels"]) == 8
    assert training.side_by_side([one]) is one


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--quick", "--only", "scan"],
            f"--only must be among {','.join(benchmark.PARTS)}, got scan",
        ),
        (["--quick", "--lengths", "64"], "--lengths must be at least 320, got 64"),
        (["--quick", "--sizes", "28x4"], "--sizes like 28x4x128"),
        (["--quick", "--lengths", "4k"], "--lengths must be like 4096,65536"),
        (["--quick", "--lengths", "scan=4096"], "--lengths must be like 4096,65536 or model=4096"),
    ],
)
def test_a_wrong_flag_is_told(flags, message, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(flags)
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so everything would run")
def test_without_a_gpu_the_command_says_what_to_add(capsys):
    with pytest.raises(SystemExit):
        benchmark.main([])
    assert "a CUDA GPU must be there, got none; add --quick for the CPU" in capsys.readouterr().err


@pytest.fixture(scope="module")
def shallow() -> models.Pair:
    """The small model with one decoder layer."""
    return models.Pair("small", 1, SETTING, prepared=False)


@pytest.mark.parametrize("together", [False, True])
def test_blocks_of_frames_are_measured_for_several_streams(shallow, monkeypatch, together):
    monkeypatch.setattr(watching, "WARM", 1)
    monkeypatch.setattr(watching, "LEAST", 2)
    stream = watching.Stream(4, 2, 2, together)
    values = watching.measure_watching(shallow, "LinMU", stream, SETTING)
    assert values["frames_per_second"] == pytest.approx(4 / values["seconds_in_a_row"])
    assert values["tokens_per_second"] == pytest.approx(8 / values["seconds_in_a_row"])
    cache = (8 * 64 * 64 + 3 * (2 * 2 + 8) * 64) * 4 + 127 * (2 * 2 * 64 * 4 + 1)
    assert values["cache_bytes"] == 2 * cache


def test_a_processor_gives_the_models_own_ids():
    clip = next(watching.Stream(16, 4).clips())
    inputs = watching.encode(watching.build_processor(), clip)
    assert inputs["input_ids"].tolist() == [[models.START, *[models.VIDEO] * 32, models.END]]
    assert inputs["video_grid_thw"].tolist() == [[2, 8, 8]]


@pytest.mark.parametrize("slides", [False, True])
def test_a_teachers_block_leaves_its_cache_as_long_as_before(shallow, slides, monkeypatch):
    lengths = []
    model = shallow.model(models.TEACHER)
    forward = type(model).forward

    def noted(self, **kwargs):
        lengths.append(kwargs[watching.CACHE_NAME].get_seq_length())
        return forward(self, **kwargs)

    monkeypatch.setattr(type(model), "forward", noted)
    values = watching.measure_teacher(shallow, watching.Stream(4, 2), 64, slides, SETTING)
    assert values["cache_bytes"] == 2 * 2 * 64 * 4 * 64
    assert set(lengths) == {64} and len(lengths) > 5


def test_a_long_run_tells_what_grew(shallow, monkeypatch):
    stream = watching.Stream(4, 4)
    values = watching.measure_endless(shallow, watching.Endless("small", stream, 12, 64), SETTING)
    assert values["state_growth"] == 0 and values["growth"].keys() <= {"host"}
    assert values["frames"] >= 12 + 4 * watching.WARM
    monkeypatch.setattr(watching.watch, "state_bytes", property(lambda self: self.frames))
    values = watching.measure_endless(shallow, watching.Endless("small", stream, 12, 64), SETTING)
    assert values["state_growth"] == 12
