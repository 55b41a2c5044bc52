"""Command line, backends under test, hypothesis profiles, expected failures."""

from __future__ import annotations

import gc
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tensors are small, and workers share the cores

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

from .harness import compare, operator_cases
from .harness.backends import NAMES, OWN, Backend, load, machine, own_backends

EXAMPLES = 20
THOROUGH = 25  # times as many
HERE = Path(__file__).parent
PROPERTY_OF = "linmu property of"  # of a test's user properties: (backend, name)
BACKENDS = pytest.StashKey[list[Backend]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("linmu", "LinMU conformance")
    group.addoption(
        "--backend",
        action="append",
        default=[],
        metavar="MODULE[@cuda]",
        help="test this module instead of our own backends (repeatable), with tensors on the GPU if it ends "
        "in @cuda; it exports names of " + ", ".join(NAMES),
    )
    group.addoption("--xfails", metavar="FILE", help="tests expected to fail: one `test-id reason` per line")
    group.addoption(
        "--few-shapes",
        action="store_true",
        help="draw few shapes, for backends that compile for every one; masks and numbers vary as before",
    )
    group.addoption(
        "--thorough", action="store_true", help=f"{THOROUGH} times as many random cases, fresh ones"
    )


def pytest_configure(config: pytest.Config) -> None:
    needs = "needs(*names): what the test uses of the backend; a third party's backend may lack it"
    config.addinivalue_line("markers", needs)
    config.addinivalue_line(
        "markers", "trial_of_the_reference: runs on the reference only, whatever is under test"
    )
    common = {
        "deadline": None,
        "database": None,
        "print_blob": False,
        "phases": [phase for phase in Phase if phase is not Phase.explain],
        "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
    }
    settings.register_profile("default run", max_examples=EXAMPLES, derandomize=True, **common)
    settings.register_profile("thorough", max_examples=THOROUGH * EXAMPLES, **common)
    if config.getoption("few_shapes"):
        operator_cases.draw_few_shapes()
    settings.load_profile("thorough" if config.getoption("thorough") else "default run")
    torch.set_float32_matmul_precision("highest")  # float32 means IEEE on every side
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    names = config.getoption("backend")
    if names and "" not in sys.path:  # as `python -m pytest` has it: a backend may lie in the current folder
        sys.path.insert(0, str(config.invocation_params.dir))
    try:
        config.stash[BACKENDS] = [load(name) for name in names] if names else own_backends()
    except ImportError as error:
        raise pytest.UsageError(f"--backend: must name an importable module, got {names}: {error}") from error


@pytest.hookimpl(optionalhook=True, tryfirst=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """What `-n auto` means."""
    from .workers import number_of_workers

    return None if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ else number_of_workers()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Who gets which tests, unless --dist says so."""
    if config.getoption("dist") != "load":
        return None
    from .workers import Scheduling

    config.option.loadscopereorder = False  # the order is that of collection
    return Scheduling(config, log)


def pytest_report_header(config: pytest.Config) -> list[str]:
    backends = [f"linmu backend: {backend.describe()}" for backend in config.stash[BACKENDS]]
    silent = set(OWN) - {backend.name for backend in config.stash[BACKENDS]}
    untested = [f"linmu backend: {name} not tested" for name in sorted(silent)]
    return [f"linmu: {machine()}; {settings().max_examples} cases per property", *backends, *untested]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for backend in config.stash[BACKENDS]:
        if not backend.own:
            terminalreporter.section(f"properties of {backend.name}")
            for line in properties_table(backend, terminalreporter):
                terminalreporter.write_line(line)
    reports = (report for outcome in ("passed", "failed") for report in terminalreporter.getreports(outcome))
    rows = [value for report in reports for name, value in report.user_properties if name == "sm_90"]
    if rows:
        terminalreporter.section("kernels compiled for sm_90")
        for line in compiled_table(rows):
            terminalreporter.write_line(line)


def properties_table(backend: Backend, terminalreporter: pytest.TerminalReporter) -> Iterator[str]:
    """How many properties of each name were tried, how many passed, and what was not tested."""
    counts: dict[str, Counter] = {name: Counter() for name in NAMES}
    for outcome in ("passed", "failed", "error", "xfailed", "xpassed"):
        for report in terminalreporter.getreports(outcome):
            of = dict(report.user_properties).get(PROPERTY_OF)
            if of is not None and of[0] == backend.name:
                counts[of[1]][outcome] += 1
    yield f"{'':26}{'tried':>8}{'passed':>8}{'failed':>8}"
    for name, found in counts.items():
        if name in backend.missing:
            yield f"{name:26}  not implemented, so not tested"
        elif name in backend.taken_over:
            yield f"{name:26}  taken over from {getattr(backend.module, name).__module__}, so not tested"
        else:
            expected = f"  {found['xfailed']} expected to fail" if found["xfailed"] else ""
            failed = found["failed"] + found["error"] + found["xpassed"]
            yield f"{name:26}{found.total():>8}{found['passed']:>8}{failed:>8}{expected}"


def compiled_table(rows: list) -> Iterator[str]:
    """What each kernel takes of a multiprocessor, as test_compile_sm90.py records it."""
    yield f"{'kernel':26}{'dtype':>6}{'N = P':>7}{'registers':>11}{'spills':>8}{'shared KB':>11}{'wgmma':>7}"
    for kernel, dtype, size, found in sorted(rows, key=lambda row: (row[0], row[1], -row[2])):
        spilled, shared = found["spill_stores"] + found["spill_loads"], found["shared"] / 1024
        yield (
            f"{kernel:26}{dtype:>6}{size:>7}{found['registers']:>11}{spilled:>8}{shared:>11.1f}{found['wgmma']:>7}"
        )


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module:
    """Ids begin with conformance/, wherever the suite lies and whatever part of it is run.

    So those of one run are good for the `--xfails` of another.
    """
    node_id = f"{HERE.name}/{module_path.relative_to(HERE).as_posix()}"
    return pytest.Module.from_parent(parent, path=module_path, nodeid=node_id)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Spare the garbage collector all that is imported: it would look at a million objects again and again,
    a tenth of the run."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # libraries report objects that are left at the end


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run every test that takes a `backend` once per backend."""
    explicit = {name for mark in metafunc.definition.iter_markers("parametrize") for name in mark.args[:1]}
    if "backend" in metafunc.fixturenames and "backend" not in explicit:
        on_trial = metafunc.definition.get_closest_marker("trial_of_the_reference")
        backends = [load("linmu.reference")] if on_trial else metafunc.config.stash[BACKENDS]
        metafunc.parametrize("backend", backends, ids=repr, indirect=True)


@pytest.fixture(scope="session")
def backend(request: pytest.FixtureRequest) -> Backend:
    """The backend under test."""
    return request.param


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Say which test runs, for the commands that reproduce a failure, and add one to whatever has none."""
    backend, function = backend_of(item), getattr(item, "obj", None)
    name = item.name.partition("[")[0]
    module = item.module.__name__.partition("conformance.")[2] if hasattr(item, "module") else ""
    of = backend.name if backend else ""
    test = compare.RunningTest(
        module, name, item.name[len(name) :], of, hasattr(function, "check"), fixed_arguments(item)
    )
    compare.RUNNING.append(test)
    try:
        return (yield)
    except Exception as error:
        told = "reproduce: " in "".join((str(error), *getattr(error, "__notes__", ())))
        if backend and not test.drawn and not told:
            error.add_note(f"  reproduce: {compare.reproduction(test, None)}")
        raise
    finally:
        compare.RUNNING.pop()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("xfails"):
        mark_expected_failures(Path(config.getoption("xfails")), config, items)
    left_out = [item for item in items if not is_tested(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if is_tested(item)]
    if hasattr(config, "workerinput"):
        from .workers import place

        items.sort(key=lambda item: place(item.nodeid))
    for item in items:
        backend = backend_of(item)
        of = [name for name in needed_names(item) if backend and name not in backend.taken_over]
        if of:
            item.user_properties.append((PROPERTY_OF, (backend.name, of[0])))


def backend_of(item: pytest.Item) -> Backend | None:
    """The backend that a test runs on."""
    callspec = getattr(item, "callspec", None)
    backend = callspec.params.get("backend") if callspec else None
    return backend if isinstance(backend, Backend) else None


def fixed_arguments(item: pytest.Item) -> dict[str, tuple[Any, int | str]] | None:
    """What a test takes besides a backend, each with its place in the table of parameters; None if it takes
    fixtures, which no call outside of pytest can give it."""
    callspec = getattr(item, "callspec", None)
    if callspec is None or set(item.fixturenames) - {"request"} != set(callspec.params):
        return None
    given, rows = callspec.params, rows_of_parameters(item)
    return {name: (value, rows[name]) for name, value in given.items() if name in rows}


def rows_of_parameters(item: pytest.Item) -> dict[str, int | str]:
    """Where each parameter of a test stands in the tables of its marks: the name of the row, or its place."""
    given, found = item.callspec.params, {}
    for mark in item.iter_markers("parametrize"):
        for place, (row, values) in enumerate(compare.table_of(mark)):
            if all(value is given[name] for name, value in values.items()):
                found |= dict.fromkeys(values, place if row is None else row)
    return found


def needed_names(item: pytest.Item) -> list[str]:
    """What the test needs of its backend."""
    return [name for mark in item.iter_markers("needs") for name in mark.args]


def is_tested(item: pytest.Item) -> bool:
    """Whether a third party's backend has all that the test needs, some of it its own."""
    backend, names = backend_of(item), needed_names(item)
    if backend is None or backend.own or not names:
        return True
    return not set(names) & set(backend.missing) and not set(names) <= set(backend.taken_over)


def mark_expected_failures(path: Path, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Strict xfail marks from `path`; an id without a reason, or one that matches no test, is an error."""
    reasons = read_expected_failures(path)
    by_id = {item.nodeid: item for item in items}
    for test_id in reasons.keys() & by_id.keys():
        by_id[test_id].add_marker(pytest.mark.xfail(reason=reasons[test_id], strict=True))
    chosen_by_id = any("::" in argument for argument in config.args)
    collected = {item.nodeid.split("::")[0] for item in items}
    stale = [
        test_id
        for test_id in reasons.keys() - by_id.keys()
        if test_id.split("::")[0] in collected or not (HERE.parent / test_id.split("::")[0]).exists()
    ]
    if stale and not chosen_by_id:
        raise pytest.UsageError(f"--xfails: every id must match a test, got {sorted(stale)}; remove them")


def read_expected_failures(path: Path) -> dict[str, str]:
    """test id -> reason; blank lines and lines that start with # are comments."""
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise pytest.UsageError(f"--xfails: must be a readable file, got {path}: {error}") from error
    reasons: dict[str, str] = {}
    for line in (line.strip() for line in lines):
        if not line or line.startswith("#"):
            continue
        test_id, reason = re.match(r"(\S+?\[.*?\](?=\s|$)|\S+)(.*)", line).groups()  # parameters have spaces
        if not reason.strip():
            raise pytest.UsageError(f"--xfails: every line must be `test-id reason`, got {line!r}")
        reasons[test_id] = reason.strip()
    return reasons
