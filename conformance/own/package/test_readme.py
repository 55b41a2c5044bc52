"""Every code block of every README runs, and what they say about the tree is so.

The two installing commands run letter for letter, in a fresh clone and environment, in `.ci/run`; here they
are only read. Every other block runs here, each page on its own: a file is written, Python is executed in one
namespace from top to bottom, a shell command is run with the options appended that `SHORTER` names, a Hub
name is replaced by the bundled teacher. What cannot run here (it needs a GPU, or several machines) is `text`.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from linmu.reference.demo import TEACHER
from linmu.reference.prompts.chat_collator import content_blocks
from linmu.reference.training.data.turns import document_of, read_turns

from ..forks import COMMANDS, run_forked

ROOT = Path(__file__).resolve().parents[3]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for folder in (".github", "conformance", "optimized", "reference", ".")
    for path in (ROOT / folder).glob("*.md" if folder == "." else "**/*.md")
    if "results" not in path.parts
)
README = (ROOT / "README.md").read_text()


@dataclass(frozen=True)
class Block:
    """One fenced code block: `marker` is the HTML comment on the line above it, if any."""

    line: int
    marker: str
    language: str
    source: str


def read_blocks(text: str) -> list[Block]:
    """All fenced code blocks of a Markdown text, in order."""
    pattern = r"(?:^<!-- (?P<marker>[^\n]*) -->\n)?^```(?P<language>\w*)\n(?P<source>.*?)^```$"
    return [
        Block(
            text.count("\n", 0, match.start()) + 1, match["marker"] or "", match["language"], match["source"]
        )
        for match in re.finditer(pattern, text, re.MULTILINE | re.DOTALL)
    ]


BLOCKS = read_blocks(README)
LONGEST = 260  # lines of the first page: what is read in one sitting


def blocks_marked(marker: str) -> list[Block]:
    return [block for block in BLOCKS if block.marker.startswith(marker)]


def test_the_first_page_is_short():
    assert len(README.splitlines()) <= LONGEST


@pytest.mark.parametrize("page", PAGES)
def test_no_code_block_is_overlooked(page):
    text = (ROOT / page).read_text()
    fences = [line for line in text.splitlines() if line.lstrip().startswith(("```", "~~~"))]
    assert len(fences) == 2 * len(read_blocks(text))
    handled = {"bash", "python", "json", "yaml", "text", "bibtex"}
    assert [block for block in read_blocks(text) if block.language not in handled] == []


def test_ci_runs_exactly_the_two_commands_of_the_readme():
    listed = subprocess.run(
        ["bash", ROOT / ".ci/run", "--list"], capture_output=True, text=True, check=True
    ).stdout
    (distill,), (test,) = blocks_marked("ci: distill"), blocks_marked("ci: test")
    assert listed == distill.source + test.source
    assert len(listed.splitlines()) == 2


@pytest.mark.parametrize(
    ("marker", "job"), [("ci: distill", "python distill.py"), ("ci: test", "pytest -n auto conformance/")]
)
def test_each_command_makes_an_environment_installs_and_does_its_job(marker, job):
    (block,) = blocks_marked(marker)
    make, install, work = (shlex.split(part) for part in block.source.split("&&"))
    assert make == ["python3", "-m", "venv", ".venv"]
    assert install[:2] == [".venv/bin/pip", "install"]
    assert work == shlex.split(f".venv/bin/{job}")
    torch, *editable = install[2:]
    assert re.fullmatch(r"torch==\d+\.\d+\.\*", torch), "the install line must name the torch that CI proves"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert editable[0] == "-e"
    assert set(re.fullmatch(r"\.\[(.*)\]", editable[1])[1].split(",")) <= set(extras)


def test_the_tour_names_every_file_that_is_the_paper():
    tour = (ROOT / "reference" / "README.md").read_text()
    files = {path.name for path in (ROOT / "reference").glob("*.py")} - {"__init__.py"}
    assert sorted(name for name in files if name not in tour) == []


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_leads_to_a_file(page):
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)[^)]*\)", (ROOT / page).read_text())
    assert [link for link in links if not ((ROOT / page).parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_path_that_is_written_down_exists(page):
    folders = r"`((?:reference|optimized|conformance|\.github|\.ci)/[\w./-]*)`"
    paths = re.findall(folders, (ROOT / page).read_text())
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_citation_names_the_paper_and_invents_no_author():
    (entry,) = (block.source for block in BLOCKS if block.language == "bibtex")
    value = r"\{((?:[^{}]|\{[^{}]*\})*)\}"  # braces, and others within
    fields = dict(re.findall(rf"(\w+)\s*=\s*{value}", entry))
    assert fields["title"].replace("{", "").replace("}", "") == "LinMU: Multimodal Understanding Made Linear"
    assert (fields["eprint"], fields["year"]) == ("2601.01322", "2026")
    assert "author" not in fields


# What is appended to a shell command so that it ends in seconds, from the options that it documents itself.
STEPS = "--stage_i.steps 1 --stage_ii.steps 1 --stage_iii.steps 1"
SHORTER = {
    "python distill.py": f"--preset smoke {STEPS} --batch_size 1 --eval_samples 1 --cpu",
    "python distill.py evaluate": "--eval_samples 2 --batch_size 1 --cpu",
    "python distill.py ablate": f"--preset smoke {STEPS} --batch_size 1 --eval_samples 1 --cpu "
    "--seeds 1 --variants full",
    "pytest conformance/": "-k inverse",
    "pytest --pyargs linmu.conformance": "-k inverse",
    "python -m linmu.reference.student.convert": "",
    "python -m linmu.optimized.benchmark": "--only decode --lengths 320 --layers 1",
}
NOT_RUN = {".github/CONTRIBUTING.md": "it installs, and runs the whole suite"}
HUB_TEACHER = "Qwen/Qwen2.5-VL-3B-Instruct"


def shortened(command: str) -> str:
    """The command with its options of `SHORTER`; a new kind of command needs an entry there."""
    start = max((start for start in SHORTER if command.startswith(start)), key=len)
    return f"{command.strip()} {SHORTER[start]}"


def run_shell(source: str, folder: Path) -> str:
    """Run one command with this interpreter's programs first on the path; return what it prints."""
    program, *arguments = shlex.split(shortened(source))
    if program == "python":  # in a fork that has imported everything
        start = 1 if arguments[0] == "-m" else 0
        program = arguments[start] if start else folder / arguments[start]
        done = run_forked(COMMANDS, program, *arguments[start + 1 :], folder=folder)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", "-euo", "pipefail", "-c", shortened(source)]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def make_pictures(jsonl: str, folder: Path) -> None:
    """A small picture for every path that the example data names."""
    rows = [json.loads(line) for line in jsonl.splitlines()]
    read = [read_turns(row) for row in rows if document_of(row) is None]
    names = {block["image"] for messages in read for block in content_blocks(messages, "image")}
    videos = [block["video"] for messages in read for block in content_blocks(messages, "video")]
    names |= {name for video in videos for name in video}
    assert names
    for shade, name in enumerate(sorted(names)):
        Image.new("RGB", (32, 24), (40 * shade, 90, 160)).save(folder / name)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the tree, so that what the README writes lands there; tests run in it."""
    ignored = shutil.ignore_patterns(
        ".git", ".venv*", "__pycache__", ".*_cache", "runs", "build", "*.egg-info"
    )
    shutil.copytree(ROOT, tmp_path, ignore=ignored, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_page(page: str, folder: Path) -> dict[str, object]:
    """Run every block of a page in `folder`; return the names that its Python blocks left."""
    names: dict[str, object] = {}
    for block in read_blocks((ROOT / page).read_text()):
        source = block.source.replace(HUB_TEACHER, str(TEACHER))
        if block.marker.startswith("file: "):
            (folder / block.marker.removeprefix("file: ")).write_text(source)
        if block.language == "json":
            make_pictures(source, folder)
        elif block.language == "bash" and not block.marker.startswith("ci: "):
            output = run_shell(source, folder)
            if source.startswith("pytest"):
                assert re.search(r"\b[1-9]\d* passed", output), output
        elif block.language == "python":
            code = "\n" * block.line + source  # so that a traceback shows the page's line numbers
            exec(compile(code, page, "exec"), names)
    return names


def has_code(page: str) -> bool:
    """Whether there is anything to run on a page."""
    return any(block.language in ("bash", "python") for block in read_blocks((ROOT / page).read_text()))


@pytest.mark.parametrize("page", [page for page in PAGES if has_code(page) and page not in NOT_RUN])
def test_the_blocks_run_from_top_to_bottom(page, checkout):
    names = run_page(page, checkout)
    if page == "README.md":
        assert names["tokens"].shape[1] > names["inputs"]["input_ids"].shape[1]
        assert names["y"].shape == (1, 10, 4, 16)
        assert names["final_state"].shape == (1, 4, 16, 16)
        assert (checkout / "untrained" / "model.safetensors").is_file()
