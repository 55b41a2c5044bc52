"""Every setting of a distillation, once, in nested dataclasses.

Each setting is a flag of its name (`--max_pixels 200000`), those of the mixer and of a stage after a dot
(`--stage_iii.learning_rate 1e-4`), and a key of a settings file. `commands/command_line.py` reads all three.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from typing import Annotated, Any, Literal, get_type_hints

import docstring_parser
import tyro

from ..config import TEACHER_SIZES, LinMUConfig
from .refusal import check

STAGES = ("i", "ii", "iii")
StageName = Literal["i", "ii", "iii"]
Whose = Literal["teacher", "student"]


def mixer_options() -> type:
    """A dataclass of what `LinMUConfig` leaves to choose; the teacher gives the sizes."""
    types, help = get_type_hints(LinMUConfig), docstring_parser.parse(LinMUConfig.__doc__ or "").params
    told = {name: param.description for param in help for name in param.arg_name.split(", ")}
    chosen = [option for option in fields(LinMUConfig) if option.name not in TEACHER_SIZES]
    members = [
        (option.name, Annotated[types[option.name], tyro.conf.arg(help=told[option.name])], option.default)
        for option in chosen
    ]
    options = make_dataclass("MixerOptions", members, frozen=True)
    options.__doc__ = "Options of M-MATE, as of LinMUConfig."
    return options


MixerOptions: Any = mixer_options()


@dataclass(frozen=True)
class SampleSettings:
    """How conversations are read."""

    streaming: bool = False
    """read --data on the way instead of listing all samples first"""
    on_broken: Literal["refuse", "skip"] = "refuse"
    """what to do about a sample that cannot be read; it is named either way"""
    supervise: Literal["answers", "all"] = "answers"
    """which text has the logit loss: the assistant's answers, or all of it"""
    max_length: int = 0
    """bound on the tokens of a sample, a longer one is broken; 0 = none"""
    max_pixels: int = 0
    """bound on the pixels of one image or frame, to save memory; 0 = the processor's own"""
    max_frames: int = 0
    """bound on the frames of a video, evenly thinned; 0 = all"""
    group_by_length: bool = False
    """fill batches with samples of about one length, so that little is padded"""
    packing: bool = False
    """lay the samples of a batch side by side, in rows of a fixed number of tokens, not each in its own"""
    packing_tokens: int = 0
    """tokens of a row with --packing, a longer sample is broken; 0 = --max_length"""
    workers: int = 0
    """processes that prepare batches; 0 = the main one"""

    @property
    def row_tokens(self) -> int:
        """Tokens of a packed row; 0 = rows are not packed."""
        return (self.packing_tokens or self.max_length) if self.packing else 0

    @property
    def most_tokens(self) -> int:
        """Tokens that a sample may have; 0 = any number."""
        return min(filter(None, (self.max_length, self.row_tokens)), default=0)


@dataclass(frozen=True)
class StudentSettings:
    """What the student starts as."""

    layers: tuple[int, ...] | None = None
    """decoder layers to convert, by index; None = all"""
    init: Literal["attention", "random"] = "attention"
    """what Flex-MA and Local-Swin start from"""
    branches: Literal["both", "flex", "local"] = "both"
    """which branches of M-MATE there are"""
    calibration_batches: int = 4
    """batches that set Flex-MA's norms to the teacher's head outputs; 0 = leave at 1"""


@dataclass(frozen=True)
class MLPSettings:
    """What stage iii does with the decoder's MLPs."""

    tune: Literal["lora", "full", "none"] = "lora"
    """adapters, all of the MLPs' weights, or nothing"""
    mlp_learning_rate: float = 1e-3
    """of adapters, or of the weights"""
    lora_rank: int = 16
    """of the adapters"""
    lora_targets: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    """projections with adapters"""


@dataclass(frozen=True)
class OptimizerSettings:
    """What a step of any stage is."""

    batch_size: int = 16
    """conversations per device and batch"""
    gradient_accumulation: int = 1
    """batches per step"""
    context_parallel: int = 1
    """devices that share the tokens of each conversation: a step of long ones in less memory each"""
    gradient_checkpointing: bool = False
    """recompute layers in the backward pass, to save memory"""
    cuda_graphs: bool = True
    """on a GPU, run each step's forward and backward from one CUDA graph, where the backend can"""
    warmup: float = 0.05
    """share of a stage's steps in which its learning rate rises"""


@dataclass(frozen=True)
class WatchSettings:
    """What is measured and kept on the way."""

    eval_samples: int = 450
    """held-out conversations to evaluate on"""
    save_every: int = 100
    """steps between checkpoints"""
    log_every: int = 10
    """steps between lines of metrics.jsonl"""
    report: Literal["none", "tensorboard", "trackio", "wandb"] = "none"
    """where to watch the run, beside metrics.jsonl"""


@dataclass(frozen=True)
class StageSettings:
    """How fast a stage learns, and what: the loss is the weighted sum of three terms."""

    steps: int = 100
    """optimizer steps"""
    learning_rate: float = 4e-4
    """of M-MATE's tensors"""
    learning_rate_new: float | None = None
    """of those among them that were not copied from the teacher; None = the same"""
    mixer: float = 0.0
    """weight of the error of each mixer's output"""
    layer: float = 0.0
    """weight of the error of each decoder layer's output"""
    logits: float = 0.0
    """weight of the KL divergence from the teacher's logits"""
    inputs: tuple[Whose, ...] = ("student",)
    """whose hidden states go into the layers; of two, each for half of the steps"""
    end_to_end: bool = False
    """let gradients flow from layer to layer; needs the student's own hidden states"""
    temperature: float = 1.0
    """of the logits"""


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    preset: Literal["demo", "smoke", "vlm", "text"] = "demo"
    """defaults of all other flags: the bundled teacher, the same in a minute, or a real teacher on a GPU,
    one that sees or a language model"""
    settings: str = ""
    """a YAML or JSON file of settings, named like the flags, those after a dot nested; flags win"""
    teacher: str = "demo"
    """'demo', a local folder, or a Hub id, of a family that LinMU supports"""
    data: tuple[str, ...] = ("demo",)
    """'demo', or files, FOLDER[:SPLIT], OWNER/NAME[:SPLIT] on the Hub; a.jsonl@3 with a weight"""
    eval_data: tuple[str, ...] = ()
    """held-out conversations, named like --data; none = every 20th sample of --data"""
    output: str = "runs/demo"
    """folder of the run"""
    stages: tuple[StageName, ...] = STAGES
    """stages to run, in order"""
    allow_missing_stage: bool = False
    """start a stage although the one before it has not been run"""
    dry_run: bool = False
    """check all samples, say what would be trained, on what, in how much memory, and stop"""
    resume: bool = False
    """go on where the run in --output was killed; `--resume DIR` also takes DIR's own settings"""
    overwrite: bool = False
    """empty --output first, if a run wrote it"""
    backend: Literal["reference", "optimized"] = "optimized"
    """whose M-MATE runs: linmu.reference or linmu.optimized"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """of the teacher's weights; what is trained is kept in float32"""
    seed: int = 0
    """of data order, adapters and everything else drawn"""
    cpu: bool = False
    """stay on the CPU although there is a GPU"""
    samples: tyro.conf.OmitArgPrefixes[SampleSettings] = field(default_factory=SampleSettings)
    student: tyro.conf.OmitArgPrefixes[StudentSettings] = field(default_factory=StudentSettings)
    mlps: tyro.conf.OmitArgPrefixes[MLPSettings] = field(default_factory=MLPSettings)
    optimizer: tyro.conf.OmitArgPrefixes[OptimizerSettings] = field(default_factory=OptimizerSettings)
    watch: tyro.conf.OmitArgPrefixes[WatchSettings] = field(default_factory=WatchSettings)
    mixer: MixerOptions = field(default_factory=MixerOptions)
    stage_i: StageSettings = field(default_factory=StageSettings)
    stage_ii: StageSettings = field(default_factory=StageSettings)
    stage_iii: StageSettings = field(default_factory=StageSettings)

    def of_stage(self, name: str) -> StageSettings:
        """The settings of a stage."""
        return getattr(self, f"stage_{name}")


UNPREFIXED = (
    "samples",
    "student",
    "mlps",
    "optimizer",
    "watch",
)  # groups whose settings are flags without a dot
OF_ONE_CALL = ("settings", "dry_run", "resume", "overwrite")  # what is asked for once, and not kept


def settings_of(config: Config) -> dict[str, Any]:
    """What `config.json` keeps of a run: a settings file."""
    settings = asdict(config)
    for group in UNPREFIXED:
        settings |= settings.pop(group)
    return {name: value for name, value in settings.items() if name not in OF_ONE_CALL}


def check_settings(config: Config) -> None:
    """Refuse settings that do not go together.

    Raises:
        RefusedError: and says which.
    """
    in_order = tuple(stage for stage in STAGES if stage in config.stages)
    check(config.stages == in_order and in_order, "--stages must be among i ii iii, in order, each once",
          " ".join(config.stages))  # fmt: skip
    for stage in STAGES:
        check_stage(stage, config.of_stage(stage), stage in config.stages)
    check(0 <= config.seed < 2**32, "--seed must be from 0 to 2³² - 1", config.seed)
    rate = config.mlps.mlp_learning_rate
    check(0 <= rate < math.inf, "--mlp_learning_rate must be finite, 0 or more", rate)
    check(not (config.resume and config.overwrite), "--resume and --overwrite must not both be given", "both")
    check(config.student.layers != (), "--layers must name a layer to convert, or be left out", "none")
    demo, given = config.data == ("demo",), " ".join(config.data)
    check((config.teacher == "demo") == demo, "--teacher and --data must both be demo, or neither",
          f"{config.teacher}, {given}", "the bundled one's folder is reference/demo/teacher")  # fmt: skip
    check(config.data, "--data must name conversations", "nothing")
    check(not demo or not config.eval_data, "--eval_data must come with --data FILE", config.eval_data)
    grouped = config.samples.group_by_length
    alike = "the bundled data, whose samples are all short"
    check(not (grouped and demo), "--group_by_length must come with --data", alike)
    check(
        not config.samples.streaming or (config.eval_data and not grouped),
        "--streaming must come with --eval_data, and without --group_by_length",
        f"{config.eval_data}, {grouped}",
    )
    warmup = config.optimizer.warmup
    check(0 <= warmup <= 1, "--warmup must be a share of the steps, from 0 to 1", warmup)
    flat = settings_of(config)
    for name in (
        "batch_size",
        "gradient_accumulation",
        "context_parallel",
        "lora_rank",
        "eval_samples",
        "save_every",
        "log_every",
    ):
        check(flat[name] >= 1, f"--{name} must be at least 1", flat[name])
    for name in (
        "max_length",
        "max_pixels",
        "max_frames",
        "packing_tokens",
        "workers",
        "calibration_batches",
    ):
        check(flat[name] >= 0, f"--{name} must be 0 or more", flat[name])
    no_window = config.mixer.text_only and not config.mixer.text_window
    must = "--branches local must come with --mixer.text_window, or a teacher that sees"
    check(not (no_window and config.student.branches == "local"), must, "text without a window")
    samples = config.samples
    must = "--packing must come with the tokens of a row, --packing_tokens or --max_length"
    check(not samples.packing or samples.row_tokens, must, "neither")
    check(
        samples.packing or not samples.packing_tokens,
        "--packing_tokens must come with --packing",
        "no --packing",
    )


def check_stage(name: str, stage: StageSettings, runs: bool) -> None:
    """Refuse a stage that cannot be, or that runs without a loss."""
    flag = f"--stage_{name}"
    check(stage.steps >= 1, f"{flag}.steps must be at least 1", stage.steps)
    check(stage.inputs, f"{flag}.inputs must be teacher, student or both", "nothing")
    alone = "teacher" in stage.inputs and (stage.logits or stage.end_to_end)
    must = f"{flag}.logits and {flag}.end_to_end need {flag}.inputs student"
    check(not alone, must, " ".join(stage.inputs))
    rates = [rate for rate in (stage.learning_rate, stage.learning_rate_new) if rate is not None]
    must = f"{flag}.learning_rate must be finite, 0 or more"
    check(all(0 <= rate < math.inf for rate in rates), must, rates)
    check(0 < stage.temperature < math.inf, f"{flag}.temperature must be positive", stage.temperature)
    weights = {"mixer": stage.mixer, "layer": stage.layer, "logits": stage.logits}
    for loss, weight in weights.items():
        check(0 <= weight < math.inf, f"{flag}.{loss} must be finite, 0 or more", weight)
    must = f"one of {', '.join(f'{flag}.{loss}' for loss in weights)} must be above 0"
    check(not runs or any(weights.values()), must, "a stage without a loss")
