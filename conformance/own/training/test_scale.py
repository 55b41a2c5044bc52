"""Two processes train as one does: the same losses in every stage, however unevenly the tokens fall."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.utils.data import BatchSampler, SequentialSampler
from transformers import PreTrainedModel

from linmu.reference.demo import TEACHER, DigitsQuestions
from linmu.reference.training.commands.main import main
from linmu.reference.training.data.conversations import InOrder, SharedBatches
from linmu.reference.training.safety.distributed_means import share

from ..ranks import free_port
from .flags import steps

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.trial_of_the_reference

TINY = [*steps(3, 4, 3), "--calibration_batches", "1", "--cpu"]
TINY += ["--backend", "optimized", "--save_every", "9", "--log_every", "1", "--eval_samples", "7"]
TINY += ["--teacher", str(TEACHER), "--preset", "smoke"]
# AdamW's first step moves every tensor by its learning rate, whatever its gradient: where that is rounding
# alone, the direction is chance. End to end, at the preset's rates, it would show as 1e-4 in the next loss.
TINY += ["--stage_iii.learning_rate", "1e-5", "--mlp_learning_rate", "1e-5"]
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",  # as `accelerate launch --use_fsdp` sets it
}
# As the README writes it; without an accelerator to shard on, accelerate copies what is trained.
LAUNCH = "launch --use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP --num_processes 2"


@pytest.fixture(scope="module")
def uneven(tmp_path_factory) -> Path:
    """Conversations of very different lengths, some without a picture, answers long and short."""
    folder = tmp_path_factory.mktemp("uneven")
    rows = []
    for index, item in enumerate(DigitsQuestions("train", 0, kinds=("cell", "read")).__getitems__(range(12))):
        (text, image), answer = item["messages"][0]["content"], item["messages"][1]["content"][0]["text"]
        image["image"].save(folder / f"{index}.png")
        question = {"role": "user", "content": "<image>" + text["text"]}
        said = {"role": "assistant", "content": " ".join([answer] * (1 + 5 * (index % 3)))}
        rows.append({"messages": [question, said], "images": [f"{index}.png"]})
        rows.append({"messages": [{"role": "user", "content": "1 2 3 " * (index % 4 + 1)}, said]})
    path = folder / "uneven.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def work(rank: int, world: int, port: int, environment: dict[str, str], arguments: list[str]) -> None:
    """One process of several, as torchrun starts it."""
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (as long as the process)
    os.environ |= environment | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    AcceleratorState._reset_state(reset_partial_state=True)
    if environment:
        take_for_accelerators()
        load_on_the_first_process_alone(rank)
    main(arguments)
    torch.distributed.destroy_process_group()


def take_for_accelerators() -> None:
    """Make accelerate shard here too: it does so on accelerators only, although gloo can."""
    start = PartialState.__init__

    def start_as_accelerator(self, *args, **kwargs) -> None:
        start(self, *args, **kwargs)
        self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = start_as_accelerator


def load_on_the_first_process_alone(rank: int) -> None:
    """What transformers 5.17 does where it is told to load for FSDP; later ones do less of it."""
    load = PreTrainedModel.from_pretrained.__func__

    @torch.no_grad()
    def load_zeros(cls, *args, **kwargs):
        model = load(cls, *args, **kwargs)
        if rank > 0 and os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true":
            for parameter in model.parameters():
                parameter.zero_()
        return model

    PreTrainedModel.from_pretrained = classmethod(load_zeros)


def run_together(arguments: list[str], environment: dict[str, str] | None = None) -> None:
    """The same command in two processes that share each batch."""
    port = free_port()
    fork = multiprocessing.get_context("fork")
    started = [
        fork.Process(target=work, args=(rank, 2, port, environment or {}, arguments)) for rank in range(2)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(300)
    assert [process.exitcode for process in started] == [0, 0]


def losses(folder: Path) -> dict[tuple[str, int], dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    terms = ("loss", "mixer", "layer", "logits", "grad_norm")
    return {(line["stage"], line["step"]): {t: line[t] for t in terms if t in line} for line in lines}


def data_of(uneven: Path) -> list[str]:
    """Trained on and, an odd number of them, held out."""
    return ["--data", str(uneven), "--eval_data", str(uneven)]


@pytest.fixture(scope="module")
def alone(uneven, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    AcceleratorState._reset_state(reset_partial_state=True)
    main([*TINY, *data_of(uneven), "--batch_size", "4", "--output", str(folder / "run")])
    return folder / "run"


def check_steps(one: dict, two: dict) -> None:
    """The steps of `two` have the losses and gradient norms that `one` has there."""
    for place, terms in two.items():
        norms = one[place].pop("grad_norm"), terms.pop("grad_norm")
        assert terms == pytest.approx(one[place], rel=1e-5), place
        assert norms[1] == pytest.approx(norms[0], rel=1e-4), place  # AdamW enlarges what rounding differs in


def check_losses(alone: Path, together: Path) -> None:
    """Both runs wrote the same losses, gradient norms and table, and a student."""
    one, two = losses(alone), losses(together)
    assert one.keys() == two.keys() and {stage for stage, _ in one} == {"i", "ii", "iii"}
    check_steps(one, two)
    assert (together / "student" / "model.safetensors").is_file()
    check_tables(alone, together)


def check_tables(alone: Path, together: Path) -> None:
    """Both runs measured the same, to the arithmetic's precision: every row, kind and layer."""
    one, two = (json.loads((folder / "results.json").read_text())["rows"] for folder in (alone, together))
    assert one.keys() == two.keys()
    for name, row in one.items():
        assert row.keys() == two[name].keys()
        for measure, value in row.items():
            got = two[name][measure]
            if measure == "layers":
                for mine, its in zip(value, got, strict=True):
                    assert its == pytest.approx(mine, rel=1e-4), (name, its)
            elif measure in ("accuracy", "kinds", "agreement"):
                assert got == pytest.approx(value), (name, measure)
            else:
                assert got == pytest.approx(value, rel=1e-4), (name, measure)


def test_two_sharded_processes_that_share_the_tokens_see_the_losses_of_one(alone, uneven, tmp_path):
    """Layers that are computed again send again what they sent, in the same order on both processes."""
    arguments = [*TINY, *data_of(uneven), "--batch_size", "4", "--output", str(tmp_path / "run")]
    arguments += ["--context_parallel", "2", "--gradient_checkpointing"]
    run_together([*arguments, "--stages", "i", "--eval_samples", "1"], FSDP)
    two = losses(tmp_path / "run")
    assert list(two) == [("i", 1), ("i", 2), ("i", 3)]
    check_steps(losses(alone), two)


@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
def test_two_processes_see_the_losses_of_one(alone, uneven, tmp_path, kind):
    arguments = [*TINY, *data_of(uneven), "--batch_size", "2", "--output", str(tmp_path / "run")]
    run_together(arguments, FSDP if kind == "FSDP2" else None)
    check_losses(alone, tmp_path / "run")


def test_accelerate_launches_two_processes_that_see_the_losses_of_one(alone, uneven, tmp_path):
    """And only one of the two prints and logs."""
    arguments = [*TINY, *data_of(uneven), "--batch_size", "2", "--output", str(tmp_path / "run")]
    accelerate = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *LAUNCH.split()]
    command = [*accelerate, "--main_process_port", str(free_port()), str(ROOT / "distill.py"), *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list((tmp_path / "run" / "stage_i").glob("checkpoint-*/rng_state_1.pth")), "one process, not two"
    check_losses(alone, tmp_path / "run")
    for line in ("stage iii trains", "losses "):
        assert sum(each.startswith(line) for each in done.stdout.splitlines()) == 1, done.stdout
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == len(losses(alone))


def test_two_sharded_processes_resume_to_the_losses_of_one(alone, uneven, tmp_path):
    arguments = [*TINY, *data_of(uneven), "--batch_size", "2", "--output", str(tmp_path / "run")]
    arguments += ["--save_every", "1"]
    run_together([*arguments, "--stages", "i"], FSDP)
    last = tmp_path / "run" / "stage_i"
    assert list(last.glob("checkpoint-*/*fsdp*")), "the weights must have been sharded"
    shutil.rmtree(last / "checkpoint-3")
    (last / "taught.safetensors").unlink()
    run_together([*arguments, "--stages", "i", "--resume"], FSDP)
    one, two = losses(alone), losses(tmp_path / "run")
    assert list(two) == [("i", 1), ("i", 2), ("i", 3)]
    check_steps(one, two)


@pytest.mark.parametrize(("processes", "shared", "batch"), [(4, 2, 3), (2, 2, 1), (3, 3, 2)])
def test_processes_that_share_tokens_get_the_same_batches(processes, shared, batch):
    """As accelerate deals batches out: one to each process in turn."""
    samples = InOrder(list(range(100)), 4 * batch * processes // shared)
    data = SharedBatches(samples, batch, shared)
    batches = BatchSampler(SequentialSampler(data), batch, drop_last=False)
    dealt = [list(BatchSamplerShard(batches, processes, rank)) for rank in range(processes)]
    got = [[data.__getitems__(indices) for indices in own] for own in dealt]
    for first in range(0, processes, shared):
        assert all(got[rank] == got[first] for rank in range(first, first + shared))
    steps = zip(*got[::shared], strict=True)
    assert [item for step in steps for own in step for item in own] == list(range(len(samples)))


def test_a_single_process_takes_its_own_mean():
    assert PartialState(cpu=True).num_processes == 1
    assert share(torch.tensor([3.0, 0.0])).tolist() == [1.0, 1.0]
