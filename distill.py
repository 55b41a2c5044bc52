"""Distil a vision-language model into LinMU, in three stages (LinMU, arXiv 2601.01322).

    python distill.py                                          the bundled teacher, on a CPU, in minutes
    python distill.py --teacher DIR_OR_HUB_ID --data FILE.jsonl --preset vlm --output runs/mine
    python distill.py evaluate STUDENT --data FILE.jsonl       a student's folder, measured
    python distill.py ablate                                   the first with one thing left out at a time

    i    Flex-MA and the gates learn to mix as attention does, layer by layer, on the teacher's hidden states
    ii   Local-Swin learns too; first on the teacher's hidden states, then on the student's own
    iii  everything in M-MATE and LoRA adapters on the decoder's MLPs learn the teacher's answers, end to end

A line of FILE.jsonl is {"messages": [...], "kind": "optional name"}, messages as chat templates take them,
with {"type": "image", "image": PATH} and {"type": "video", "video": [FRAME_PATH, ...] or FILE} blocks, paths
relative to FILE; or in the forms that reference/training/data/turns.py lists.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, field
from typing import Any, Literal

from linmu.reference.training.commands.ablation import ablate
from linmu.reference.training.commands.command_line import (
    RefusedError,
    check,
    from_json,
    numbers,
    parse_flags,
)
from linmu.reference.training.commands.dry_run import dry_run
from linmu.reference.training.commands.evaluate_command import judge
from linmu.reference.training.run import Run
from linmu.reference.training.stages import STAGES, Stage
from linmu.reference.training.teacher_student import Objective
from linmu.reference.training.variants import apply_variant


def about(help: str, default: Any) -> Any:
    """A field of `Config` with its help text."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Config:
    """Every setting of a run; each is a flag of the same name."""

    preset: Literal["demo", "smoke", "vlm"] = about(
        "defaults of all other flags: demo (bundled teacher, minutes on a CPU), smoke (the same in a minute, "
        "to see it run), vlm (a real teacher on a GPU)",
        "demo",
    )
    teacher: str = about("'demo', a local folder, or a Hub id of a Qwen2-VL or Qwen2.5-VL model", "demo")
    data: str = about(
        "'demo', or where conversations are: a JSONL file, a folder of a Hugging Face data set, "
        "OWNER/NAME[:SPLIT] on the Hub, or several of them with weights, like a.jsonl@3,b.jsonl@1",
        "demo",
    )
    eval_data: str = about("held-out conversations, named like --data; '' = every 20th sample of --data", "")
    streaming: bool = about("read --data on the way instead of listing all samples first", False)
    output: str = about("folder of the run", "runs/demo")
    stages: str = about("stages to run, in order", "i,ii,iii")
    steps: str = about("optimizer steps of stages i, ii and iii", "100,400,600")
    backend: Literal["reference", "optimized"] = about(
        "whose M-MATE runs: linmu.reference or linmu.optimized", "optimized"
    )
    seed: int = about("of data order, adapters and everything else drawn", 0)
    dry_run: bool = about(
        "check all samples, say what would be trained, on what, in how much memory, and stop", False
    )
    resume: bool = about("go on where the run in --output was killed", False)
    overwrite: bool = about("empty --output first", False)
    allow_missing_stage: bool = about("start a stage although the one before it has not been run", False)
    batch_size: int = about("conversations per device and step", 16)
    gradient_accumulation: int = about("batches per step", 1)
    gradient_checkpointing: bool = about("recompute layers in the backward pass, to save memory", False)
    dtype: Literal["float32", "bfloat16"] = about(
        "of the teacher's weights; what is trained is kept in float32", "float32"
    )
    mixer: str = about(
        "options of LinMUConfig as JSON, all others at their defaults",
        '{"window_thw": [2, 4, 4], "scan_rope": true, "output_gate": true}',
    )
    layers: str = about("decoder layers to convert: 'all' or numbers, like 0,1,2", "all")
    lr_new: float = about("stage i, tensors that the teacher does not have", 1.2e-2)
    lr_copied: float = about("stage i, tensors copied from the teacher; stage ii takes half of both", 4e-3)
    lr_student: float = about("stage iii, M-MATE", 4e-4)
    lr_lora: float = about("stage iii, adapters", 1e-3)
    lora_rank: int = about("of the adapters", 16)
    lora_targets: str = about(
        "projections of the decoder's MLPs with adapters", "gate_proj,up_proj,down_proj"
    )
    tune: Literal["lora", "full", "none"] = about(
        "the decoder's MLPs in stage iii: adapters, all their weights, or not at all", "lora"
    )
    objectives: str = about(
        "changes to the losses of a stage as JSON: weights (mixer, block, logits), inputs (teacher or "
        'student), end_to_end, temperature; like {"ii": {"inputs": "teacher"}, "iii": {"block": 0.0}}',
        '{"iii": {"block": 10.0}}',
    )
    init: Literal["attention", "random"] = about("what Flex-MA and Local-Swin start from", "attention")
    branches: Literal["both", "flex", "local"] = about("which branches of M-MATE there are", "both")
    warmup: float = about("share of a stage's steps in which its learning rate rises", 0.05)
    temperature: float = about("of the logit loss", 1.0)
    calibration_batches: int = about(
        "batches that set Flex-MA's norms to the teacher's head outputs; 0 = leave at 1", 4
    )
    eval_samples: int = about("held-out conversations to evaluate on", 450)
    save_every: int = about("steps between checkpoints", 100)
    log_every: int = about("steps between lines of metrics.jsonl", 10)
    workers: int = about("processes that prepare batches; 0 = the main one", 0)
    on_broken: Literal["refuse", "skip"] = about(
        "what to do about a sample that cannot be read; it is named either way", "refuse"
    )
    max_pixels: int = about(
        "bound on the pixels of one image or frame, to save memory; 0 = the processor's own", 0
    )
    max_length: int = about("bound on the tokens of a sample, a longer one is broken; 0 = none", 0)
    supervise: Literal["answers", "all"] = about(
        "which text the logit loss is taken on: the assistant's answers, or all of it", "answers"
    )
    group_by_length: bool = about(
        "fill batches with samples of about one length, so that little is padded", False
    )
    max_frames: int = about("bound on the frames of a video, evenly thinned; 0 = all", 0)
    report: Literal["none", "tensorboard", "trackio", "wandb"] = about(
        "where to watch the run, beside metrics.jsonl", "none"
    )
    cpu: bool = about("stay on the CPU although there is a GPU", False)

    def __post_init__(self) -> None:
        unknown = [stage for stage in self.stage_list if stage not in STAGES]
        check(not unknown and self.stage_list, "--stages must be among i,ii,iii", self.stages)
        in_order = [stage for stage in STAGES if stage in self.stage_list]
        check(list(self.stage_list) == in_order, "--stages must be in order, each once", self.stages)
        check(
            len(numbers("steps", self.steps)) == 3,
            "--steps must be three numbers, like 100,100,400",
            self.steps,
        )
        check(min(numbers("steps", self.steps)) >= 1, "--steps must be positive", self.steps)
        check(isinstance(self.mixer_options, dict), "--mixer must be a JSON object", self.mixer)
        changes = self.objective_changes
        for_stages = isinstance(changes, dict) and set(changes) <= set(STAGES)
        check(for_stages, "--objectives must be a JSON object of stages", self.objectives)
        check(not (self.resume and self.overwrite), "--resume and --overwrite must not both be given", "both")
        no_pair = "--teacher and --data must both be demo, or neither"
        check((self.teacher == "demo") == (self.data == "demo"), no_pair, f"{self.teacher}, {self.data}")
        check(
            self.data != "demo" or not self.eval_data,
            "--eval_data must come with --data FILE",
            self.eval_data,
        )
        alike = "the bundled data, whose samples are all short"
        check(
            not self.group_by_length or self.data != "demo", "--group_by_length must come with --data", alike
        )
        check(
            not self.streaming or (self.eval_data and not self.group_by_length),
            "--streaming must come with --eval_data, and without --group_by_length",
            f"{self.eval_data!r}, {self.group_by_length}",
        )
        for name in (
            "batch_size",
            "gradient_accumulation",
            "lora_rank",
            "eval_samples",
            "save_every",
            "log_every",
        ):
            check(getattr(self, name) >= 1, f"--{name} must be at least 1", getattr(self, name))

    @property
    def stage_list(self) -> tuple[str, ...]:
        """The stages to run."""
        return tuple(self.stages.split(","))

    @property
    def mixer_options(self) -> dict[str, Any]:
        """Options of M-MATE, by name."""
        return from_json("mixer", self.mixer)

    @property
    def objective_changes(self) -> dict[str, dict[str, Any]]:
        """Changes to the losses, by stage."""
        return from_json("objectives", self.objectives)

    @property
    def layer_list(self) -> tuple[int, ...] | None:
        """Layers to convert, None = all."""
        return None if self.layers == "all" else numbers("layers", self.layers)

    def steps_of(self, stage: str) -> int:
        """Optimizer steps of a stage."""
        return numbers("steps", self.steps)[STAGES.index(stage)]


PRESETS: dict[str, dict[str, Any]] = {
    "demo": {},
    "smoke": {
        "steps": "4,4,8", "calibration_batches": 1, "eval_samples": 64, "save_every": 4,
        "log_every": 2,
    },
    "vlm": {
        "steps": "2000,2000,10000", "batch_size": 1, "gradient_accumulation": 16, "dtype": "bfloat16",
        "mixer": '{"scan_rope": true}', "objectives": "{}", "gradient_checkpointing": True,
        "lr_new": 1e-3, "lr_copied": 2e-4, "lr_student": 5e-5, "lr_lora": 1e-4, "eval_samples": 200,
        "save_every": 500, "workers": 4,
        "output": "runs/vlm",
    },
}  # fmt: skip


def stage_of(name: str, config: Config) -> Stage:
    """The three stages (LinMU, arXiv 2601.01322; weights and routes: Choice)."""
    flex, local, mix = ".mixer.flex_ma.", ".mixer.local_swin.", ".mixer.mix_proj."
    if name == "i":
        return Stage(
            name, (flex, mix), (Objective(mixer=1.0, inputs="teacher"),), config.lr_new, config.lr_copied
        )
    if name == "ii":
        both = tuple(Objective(mixer=1.0, block=0.5, inputs=inputs) for inputs in ("teacher", "student"))
        return Stage(name, (flex, local, mix), both, config.lr_new / 2, config.lr_copied / 2)
    answers = Objective(logits=1.0, block=0.3, end_to_end=True, temperature=config.temperature)
    trained = (flex, local, mix, "lora_")
    return Stage(name, trained, (answers,), config.lr_student, config.lr_student, config.lr_lora)


def main(arguments: list[str] | None = None) -> Any:
    """Do what the command line asks for; returns what it printed or wrote at the end."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["ablate"]:
        return ablate(arguments[1:], parse, distil)
    if arguments[:1] == ["evaluate"]:
        return judge(arguments[1:], parse)
    return distil(parse(arguments))


def distil(config: Config) -> dict[str, Any]:
    """Distil, or describe it; returns what `results.json` holds."""
    run = Run(config)
    stages = [apply_variant(stage_of(name, config), config) for name in config.stage_list]
    if config.dry_run:
        run.open()
        dry_run(run, stages)
        return run.results
    run.prepare()
    for stage in stages:
        run.teach(stage)
    return run.finish()


def parse(arguments: list[str]) -> Config:
    """The command line as a `Config`."""
    return parse_flags(Config, PRESETS, arguments, about=__doc__.split("\n")[0])


if __name__ == "__main__":
    try:
        main()
    except RefusedError as error:
        sys.exit(str(error))
