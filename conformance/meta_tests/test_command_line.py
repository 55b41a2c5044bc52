"""`pytest conformance/ --backend any.module --xfails FILE`: what a third party sees of its own backend."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from linmu import reference
from linmu.reference import LinMUConfig

from ..conftest import mark_expected_failures, read_expected_failures
from ..harness import compare
from ..harness.backends import Backend
from ..harness.compare import READABLE, RunningTest, reproduction, rows_of
from ..harness.large_cases import LARGE
from ..harness.layouts import Layout, Text
from ..harness.module_cases import ModuleCase
from ..harness.operator_cases import ScanCase
from ..harness.packed_rows import PackedCase, check_module_equals_samples_alone
from ..properties import test_bidirectional_scan, test_errors

CONFORMANCE = Path(__file__).parents[1]
FILE = "conformance/properties/test_layout.py"
CONV = "conformance/properties/test_causal_conv.py"
CUBE = FILE + "::test_the_four_orders_of_a_cube[their_kernels-{layer}-cells{layer}]"
THIRD_PARTY = """
import torch
from linmu.reference import inverse_order

def scan_order(coords, layer_index):
    return torch.arange(coords.shape[1]).repeat(len(coords), 1)

def causal_conv(u, weight, bias=None, *, mask=None, initial_state=None):
    raise RuntimeError("not today")
"""
LOUD = """
from linmu import reference

def bidirectional_scan(*given, **named):
    y, state = reference.bidirectional_scan(*given, **named)
    return 2 * y, state
"""
EXPECTED = f"""# raster order only

{CUBE.format(layer=1)} orders are not implemented yet
{CUBE.format(layer=0)} it is right after all
"""


@pytest.fixture(scope="module")
def third_party(tmp_path_factory) -> Path:
    """A folder with a backend that has one right and one wrong operator."""
    folder = tmp_path_factory.mktemp("third_party")
    (folder / "their_kernels.py").write_text(THIRD_PARTY)
    (folder / "xfails.txt").write_text(EXPECTED)
    return folder


@pytest.fixture(scope="module")
def report(third_party) -> str:
    """What one run of layout tests on that backend prints."""
    options = ["--backend", "their_kernels", "--xfails", str(third_party / "xfails.txt")]
    options += [
        "-ra",
        "--rootdir",
        str(third_party),
    ]  # as where the suite is installed: ids do not depend on it
    chosen = ["-k", "cube or swins_rule or identity or plain_tuples or do_not_mix", FILE, CONV]
    path = os.pathsep.join((str(third_party), os.environ.get("PYTHONPATH", "")))
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *options, *chosen],
        cwd=CONFORMANCE.parent,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert result.returncode == pytest.ExitCode.TESTS_FAILED, result.stdout + result.stderr
    return result.stdout


def test_the_header_says_what_runs_and_what_is_missing(report):
    """And the summary says it again: what is not implemented, or not theirs, is never silently passed."""
    missing = "window_ids, selective_scan, bidirectional_scan, scan_step, window_attention"
    header = f"linmu backend: their_kernels (engine: plain torch); not implemented: {missing}"
    assert header in report and "; taken over, not tested: inverse_order" in report
    assert "linmu backend: linmu.reference not tested" in report
    summary = report[report.index("properties of their_kernels") :]
    assert re.search(r"^window_ids +not implemented, so not tested", summary, re.MULTILINE)
    taken_over = r"^inverse_order +taken over from linmu.reference.layout, so not tested"
    assert re.search(taken_over, summary, re.MULTILINE)
    tried, passed, failed, expected = re.search(
        r"^scan_order +(\d+) +(\d+) +(\d+)  (\d+) expected to fail", summary, re.MULTILINE
    ).groups()
    assert (int(tried), int(expected)) == (int(passed) + int(failed) + int(expected), 1)


def test_an_expected_failure_is_told_with_its_reason_and_must_fail(report):
    """A failure that was expected does not fail the run, a success that was not expected does."""
    assert "orders are not implemented yet" in report and "1 xfailed" in report
    assert "[XPASS(strict)] it is right after all" in report and re.search(r"FAILED .*cells0\]", report)
    assert re.search(r"FAILED .*cells2\]", report) and re.search(r"test_order_then_inverse.* PASSED", report)


def test_a_failure_says_how_to_reproduce_it(report, third_party, monkeypatch):
    """The element, both values, the case, and a command that fails in the same way."""
    finding = (
        r"scan_order: order (?:with ties )?of layer \d+: place \d+ of row \d+ must hold .*, got token \d+"
    )
    message = re.search(finding, report)[0]
    command = re.search(r'reproduce: \S+ -c "(.*LayoutCase.*)"', report)[1]
    assert "case: LayoutCase(" in report and "load('their_kernels')" in command
    monkeypatch.syspath_prepend(third_party)
    with pytest.raises(AssertionError, match=re.escape(message)):
        exec(command, {})


def test_an_exception_says_how_to_reproduce_it(report, third_party, monkeypatch):
    """The same of whatever else a backend raises."""
    note = report[report.index("RuntimeError: not today") :]
    assert "case: ConvCase(" in note
    command = re.search(r'reproduce: \S+ -c "(.*)"', note)[1]
    monkeypatch.syspath_prepend(third_party)
    with pytest.raises(RuntimeError, match="not today"):
        exec(command, {})


def test_a_test_without_drawn_cases_is_reproduced_by_a_call(report, third_party, monkeypatch):
    """With its arguments, on the same backend."""
    message = re.search(r"scan_order: layer 2 must visit .*\]", report)[0]
    command = re.search(r'reproduce: \S+ -c "(.*test_the_four_orders_of_a_cube\(.*layer_index=2.*)"', report)[
        1
    ]
    assert "load('their_kernels')" in command
    monkeypatch.syspath_prepend(third_party)
    with pytest.raises(AssertionError, match=re.escape(message)):
        exec(command, {})


def test_arguments_with_tensors_are_named_by_their_rows():
    """A repr of a tensor is no code."""
    test, row = "test_a_wrong_argument_is_named", 2
    names = ("operator", "changes", "words")
    wanted = dict(zip(names, test_errors.WRONG[row], strict=True))
    given = {name: (value, row) for name, value in wanted.items()}
    running = RunningTest("properties.test_errors", test, "[mine-2]", "mine", drawn=False, arguments=given)
    call = f"{test}(load('mine'), **rows_of({test}, operator=2, changes=2, words=2))"
    assert f"; {call}" in reproduction(running, None)
    assert rows_of(getattr(test_errors, test), operator=row, changes=row, words=row) == wanted


def test_a_large_case_is_told_by_its_name(monkeypatch):
    """A layout of hundreds of images is no line to read or to paste."""
    name, large = "300 images", LARGE["bidirectional_scan"]["300 images"]
    test = "test_sizes_that_people_run"
    module = "properties.test_bidirectional_scan"
    given = {"case": (large, name)}
    running = RunningTest(module, test, f"[mine-{name}]", "linmu.reference", drawn=False, arguments=given)
    monkeypatch.setattr(compare, "RUNNING", [running])
    told = compare.report("y: wrong", large)
    assert f"{test}(load('linmu.reference'), **rows_of({test}, case='{name}'))" in told
    assert len(told) < 2 * READABLE < len(repr(large))
    function = getattr(test_bidirectional_scan, test)
    assert rows_of(function, case=name) == {"case": large}


def test_a_large_case_is_reproduced_as_pasted(tmp_path):
    """By pytest's own ids of cases, from any folder."""
    (tmp_path / "loud_kernels.py").write_text(LOUD)
    options = ["-p", "no:cacheprovider", "-q", "--backend", "loud_kernels", "-k", "300 and images"]
    test = "linmu.conformance.properties.test_bidirectional_scan"
    run = partial(subprocess.run, cwd=tmp_path, capture_output=True, text=True)
    done = run([sys.executable, "-m", "pytest", "--pyargs", test, *options])
    message = re.search(r"y: RMS error .*", done.stdout)[0]
    again = run(re.search(r"reproduce: (.*)", done.stdout)[1], shell=True)
    assert again.returncode == 1 and message in again.stderr, again.stderr


def test_a_packed_row_is_told_with_its_first_ids():
    """Of a module too, whose results have names there."""
    deaf = Backend("mine", reference, LocalSwin=samples_meet(reference.LocalSwin))
    case = ModuleCase(Layout(((Text(140),),)), LinMUConfig(6, 1, 1, 2, text_window=3), 0, "float64", 2)
    with pytest.raises(AssertionError) as error:
        check_module_equals_samples_alone(deaf, "LocalSwin", case, has_layout=False)
    assert re.match(
        r"output: .*\n  case: ModuleCase\(.*\) with sequence = \[\[-?\d+, .*, \.\.\.\]\]", str(error.value)
    )
    scan = PackedCase(ScanCase(1, 140, 1, 1, 3, 4, "none", False, False, "float32", 0))
    assert re.search(r"with other sequence = \[\[0, .*, \.\.\.]]$", repr(scan))


def samples_meet(kind):
    """The module, told of no sample."""

    class Deaf(kind):
        def forward(self, hidden_states, layout=None, *, sequence=None, **rest):
            return super().forward(hidden_states, layout, **rest)

    return Deaf


def test_a_test_with_fixtures_is_reproduced_by_pytest():
    """By the name of its module, from any folder, on the same backend."""
    test = "test_the_four_orders_of_a_cube"
    running = RunningTest("properties.test_layout", test, "[mine-0]", "mine", drawn=False)
    command = reproduction(running, None)
    named = "linmu.conformance.properties.test_layout::test_the_four_orders_of_a_cube[mine-0]"
    assert command.endswith(f"--pyargs '{named}' --backend mine")


def test_a_changed_case_is_reproduced_from_the_one_that_was_drawn():
    """What the test changes of a case it changes again when it is run again."""
    case = ScanCase(1, 2, 1, 1, 3, 4, "none", False, False, "float32", 0)
    running = RunningTest("properties.test_scan", "test_x", "[mine]", "mine", drawn=True)
    changed = case.changed(x=None).row(0)
    assert "with other x" in repr(changed)
    assert reproduction(running, changed) == reproduction(running, case)
    assert eval(repr(case)) == case


@pytest.mark.parametrize(
    "gone", (f"{FILE}::test_that_is_gone[their_kernels]", "conformance/test_gone.py::test_it")
)
def test_a_stale_expectation_is_an_error(gone, tmp_path):
    """An id that matches no test stops the run: what it excused may be back under another name."""
    (tmp_path / "xfails.txt").write_text(f"{gone} a reason\n")
    config = SimpleNamespace(args=["conformance"], rootpath=CONFORMANCE.parent)
    collected = [SimpleNamespace(nodeid=CUBE.format(layer=0))]
    with pytest.raises(pytest.UsageError, match=re.escape(f"every id must match a test, got ['{gone}']")):
        mark_expected_failures(tmp_path / "xfails.txt", config, collected)


def test_an_id_may_have_spaces(tmp_path):
    """Parameters do: a size is called "300 rows"."""
    ids = ("a.py::test_x[mine-300 rows, 2]", "a.py::test_x[mine-N=P]", "a.py::test_y")
    (tmp_path / "xfails.txt").write_text("".join(f"{test_id} not [yet] done\n" for test_id in ids))
    assert read_expected_failures(tmp_path / "xfails.txt") == dict.fromkeys(ids, "not [yet] done")


def test_an_expectation_needs_a_reason(tmp_path):
    """An id alone is no explanation."""
    (tmp_path / "xfails.txt").write_text(CUBE.format(layer=1) + "\n")
    with pytest.raises(pytest.UsageError, match="every line must be `test-id reason`"):
        read_expected_failures(tmp_path / "xfails.txt")
