"""One distillation from a teacher to a student's folder: what `distill.py` runs."""

from __future__ import annotations

import importlib
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from peft import get_peft_model
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset
from transformers import (
    AutoModelForImageTextToText,
    PreTrainedModel,
    PrinterCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from ..demo import TEACHER
from ..prompts.chat_collator import ChatCollator
from ..prompts.processors import load_processor
from .calibration import calibrate_norms
from .commands.command_line import check
from .commands.description import about_stage, about_student
from .data.conversations import InOrder, skipped
from .data.open_data import in_order, open_data
from .evaluation.evaluation import evaluate, table
from .evaluation.plots import plot_layers, plot_losses
from .progress import Progress
from .safety.atomic_writes import remove_folder, whole_file, whole_folder, write_text
from .safety.memory import leave_inputs_alone, recompute_layers
from .stages import STAGES, Stage, StageTrainer, load_taught, taught_tensors
from .teacher_student import Lesson, Objective, attach_teacher, detach_teacher
from .variants import COPY, LORA, start, tuner

if TYPE_CHECKING:
    from distill import Config

# settings that may change when a run goes on
FREE = ("dry_run", "resume", "overwrite", "stages", "allow_missing_stage", "workers", "report")


class Run:
    """One distillation, its folder, and its models.

    The folder holds config.json, metrics.jsonl, results.json, loss.png, a folder per stage with its
    checkpoints and, when it is done, `taught.safetensors`, and at the end the student.
    """

    def __init__(self, config: Config) -> None:
        self.config, self.folder = config, Path(config.output)
        self.backend = importlib.import_module(f"linmu.{config.backend}")
        self.process = PartialState(cpu=config.cpu)
        self.device = self.process.device
        self.results: dict[str, Any] = {"rows": {}}
        self.adapters: Any = None

    def prepare(self) -> None:
        """Claim the folder, open teacher and data, and measure the student before any training."""
        if self.process.is_main_process:
            self.claim_folder()
        self.process.wait_for_everyone()
        if (self.folder / "results.json").is_file():
            self.results = json.loads((self.folder / "results.json").read_text())
        self.open()
        self.eval_batches = self.batches(self.held_out, self.config.eval_samples)
        self.calibrate()
        if "converted" not in self.results["rows"]:
            self.evaluate("converted")
        self.save_example(self.held_out)

    def open(self) -> None:
        """Load the teacher, convert it, and open the data; nothing is written."""
        set_seed(self.config.seed)
        self.teacher = str(TEACHER) if self.config.teacher == "demo" else self.config.teacher
        self.processor = load_processor(self.teacher, padding_side="right")
        self.encoder = ChatCollator(
            self.processor, supervise=self.config.supervise, max_length=self.config.max_length
        )
        world_size, self.broken = self.process.num_processes, self.folder / "broken.jsonl"
        self.training, self.held_out = open_data(self.config, self.encoder, self.broken, world_size)
        self.student = self.convert(self.teacher)
        for line in about_student(self.student, self.config, self.device):
            self.say(line)

    def claim_folder(self) -> None:
        """Start a folder, or go on in one whose run had the same settings."""
        path = self.folder / "config.json"
        settings = asdict(self.config)
        if self.config.overwrite and path.is_file():
            remove_folder(self.folder)
        if path.is_file():
            hint = "--resume goes on in it, --overwrite empties it, --output names another"
            may_enter = self.config.resume or self.config.stage_list[0] != "i"
            check(may_enter, "--output must be a folder without a run", self.folder, hint)
            before = json.loads(path.read_text())
            changed = [
                name for name, value in settings.items() if name not in FREE and before.get(name) != value
            ]
            got = f"other values of {changed}"
            check(not changed, "a run must go on with the settings it began with", got, hint)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(settings, indent=1))

    def convert(self, folder: str) -> PreTrainedModel:
        """Teacher -> student with the teacher beside it, all frozen, M-MATE in float32."""
        dtype = getattr(torch, self.config.dtype)
        teacher = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).to(self.device)
        student = self.backend.convert(teacher, self.config.mixer_options, layers=self.config.layer_list)
        attach_teacher(student, teacher)
        student.requires_grad_(False)
        self.saved_dtypes = {name: parameter.dtype for name, parameter in student.named_parameters()}
        for name, parameter in student.named_parameters():
            if ".mixer." in name:
                parameter.data = parameter.data.float()
        start(student, self.config)
        if self.config.gradient_checkpointing:
            recompute_layers(student)
        return student

    def lesson(self, objective: Objective = Objective(mixer=1.0, inputs="teacher")) -> Lesson:  # noqa: B008
        """The student as something that gives a loss."""
        lesson = self.backend.Lesson(self.student, objective)
        # What accelerate shards one by one: not the vision tower, which a batch of text does not enter.
        lesson._no_split_modules = [type(self.student.get_decoder().layers[0]).__name__]
        return lesson

    def batches(self, data: Dataset, samples: int) -> list[tuple[list[str], dict[str, Any]]]:
        """The kinds and tensors of the first `samples` conversations, in batches."""
        loader = DataLoader(InOrder(data, min(samples, len(data))), self.config.batch_size, collate_fn=list)
        return [([item["kind"] for item in items], self.encoder(items)) for items in loader]

    def calibrate(self) -> None:
        """Set Flex-MA's norms to the teacher's head outputs."""
        whole_batch = self.config.batch_size * self.process.num_processes
        samples = self.config.calibration_batches * whole_batch
        if not samples:
            return
        lesson = self.lesson()
        with self.autocast():
            batches = (batch for _, batch in self.batches(self.training, samples))
            calibrate_norms(
                lesson,
                ({name: tensor.to(self.device) for name, tensor in batch.items()} for batch in batches),
            )
        lesson.close()

    def autocast(self):
        """bfloat16 arithmetic where the teacher is bfloat16."""
        enabled = self.config.dtype == "bfloat16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    def evaluate(self, name: str) -> None:
        """Measure the student and keep the row; the teacher's row comes with the first."""
        started = time.perf_counter()
        lesson = self.lesson()
        with self.autocast():
            measured = evaluate(lesson, self.eval_batches, self.device)
        lesson.close()
        self.results["rows"].setdefault("teacher", measured["teacher"])
        self.results["rows"][name] = measured["student"]
        if self.process.is_main_process:  # kept for the final table and for a resumed run
            write_text(self.folder / "results.json", json.dumps(self.results, indent=1))
        row = measured["student"]
        self.say(
            f"{name}: accuracy {row['accuracy']:.3f}, KL {row['kl']:.4f}, agreement {row['agreement']:.3f}, "
            f"mixer error {row['mixer_error']:.3f}, block error {row['block_error']:.3f} "
            f"({time.perf_counter() - started:.0f} s)"
        )

    def say(self, line: str) -> None:
        """Print one line, from one process."""
        if self.process.is_main_process:
            print(line, flush=True)

    def teach(self, stage: Stage) -> None:
        """Run one stage, or take over its result if it is done."""
        folder = self.folder / f"stage_{stage.name}"
        done = folder / "taught.safetensors"
        if not done.is_file():
            self.start_from_previous(stage)
        if stage.lr_lora:
            self.add_adapters()
        if done.is_file():
            load_taught(self.student, done)
        else:
            trainer = self.trainer(stage, folder)
            trainer.train(resume_from_checkpoint=self.last_checkpoint(folder))
            if self.config.report == "wandb":  # which alone would log the next stage into this run
                importlib.import_module("wandb").finish()
            trainer.model.close()
            taught = taught_tensors(self.student)  # gathered, so by all processes
            if self.process.is_main_process:
                with whole_file(done) as part:
                    save_file(taught, part)
            self.process.wait_for_everyone()
            if trainer.is_fsdp_enabled:
                trainer.accelerator.free_memory()
                del trainer  # or the old student would stay beside the new one
                self.replace_sharded(stage, done)
        if f"stage {stage.name}" not in self.results["rows"]:
            self.evaluate(f"stage {stage.name}")

    def replace_sharded(self, stage: Stage, done: Path) -> None:
        """Open the teacher again: a model that was spread over processes cannot be put together in place."""
        self.student = self.adapters = None
        self.student = self.convert(self.teacher)
        if stage.lr_lora:
            self.add_adapters()
        load_taught(self.student, done)

    def start_from_previous(self, stage: Stage) -> None:
        """Load the stage before, which must be done."""
        position = STAGES.index(stage.name)
        if position == 0:
            return
        before = self.folder / f"stage_{STAGES[position - 1]}" / "taught.safetensors"
        if before.is_file():
            load_taught(self.student, before)
        hint = f"run --stages {STAGES[position - 1]} first, or give --allow_missing_stage"
        allowed = before.is_file() or self.config.allow_missing_stage
        check(
            allowed, f"stage {stage.name} must start from stage {STAGES[position - 1]}", f"no {before}", hint
        )

    def last_checkpoint(self, folder: Path) -> str | None:
        """Where a killed stage goes on."""
        return get_last_checkpoint(str(folder)) if self.config.resume and folder.is_dir() else None

    def add_adapters(self) -> None:
        """Adapters, or tuned copies, of the decoder's MLPs."""
        set_seed(self.config.seed)
        self.adapters = get_peft_model(self.student, tuner(self.student, self.config))
        leave_inputs_alone(self.student)
        for name, parameter in self.student.named_parameters():
            if any(part in name for part in (LORA, COPY)):
                parameter.data = parameter.data.float()

    def set_free(self, stage: Stage) -> None:
        """Freeze all but what the stage trains, and say so."""
        for name, parameter in self.student.named_parameters():
            parameter.requires_grad_(any(part in name for part in stage.trained))
        for line in about_stage(self.student, stage):
            self.say(line)

    def trainer(self, stage: Stage, folder: Path) -> StageTrainer:
        """Set the Trainer up for what the stage trains."""
        self.set_free(stage)
        config, steps = self.config, self.config.steps_of(stage.name)
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=config.batch_size,
            gradient_accumulation_steps=config.gradient_accumulation,
            learning_rate=stage.lr_new,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, round(config.warmup * steps)),
            max_grad_norm=1.0,
            weight_decay=0.0,
            bf16=config.dtype == "bfloat16",
            use_cpu=config.cpu,
            seed=config.seed,
            save_steps=config.save_every,
            save_total_limit=2,
            logging_steps=config.log_every,
            include_num_input_tokens_seen="non_padding",
            dataloader_num_workers=config.workers,
            dataloader_pin_memory=self.device.type == "cuda",
            remove_unused_columns=False,
            ddp_find_unused_parameters=False,  # `TeacherStudentMixer` sees to it that there are none
            disable_tqdm=True,
            report_to=config.report,
            run_name=f"{self.folder.name}, stage {stage.name}",
        )
        per_step = config.batch_size * config.gradient_accumulation * arguments.world_size
        seen = sum(config.steps_of(before) for before in STAGES[: STAGES.index(stage.name)]) * per_step
        new_names = set(self.lesson().close().get_decoder().layers[0].self_attn.mixer.initial_values())
        trainer = StageTrainer(
            stage,
            new_names,
            model=self.lesson(stage.routes[0]),
            args=arguments,
            train_dataset=in_order(config, self.training, steps * per_step, seen, arguments.world_size),
            data_collator=self.encoder.with_names,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Progress(trainer, self.folder / "metrics.jsonl"))
        return trainer

    def save_example(self, data: Dataset) -> None:
        """Write one held-out picture with its question, for the command that asks the student."""
        for index in range(min(100, len(data))):
            item = data[index]
            blocks = item["messages"][0]["content"]
            images = [block["image"] for block in blocks if block["type"] == "image"]
            if len(images) == 1:
                images[0].save(self.folder / "example.png")
                self.question = " ".join(block["text"] for block in blocks if block["type"] == "text")
                self.answer = item["messages"][1]["content"][0]["text"]
                return
        self.question = self.answer = ""

    def say_skipped(self) -> None:
        """Print how many samples were skipped, and why."""
        if reasons := skipped(self.broken):
            listing = ", ".join(f"{count} {why}" for why, count in sorted(reasons.items()))
            self.say(f"skipped {sum(reasons.values())} broken samples ({listing}), named in {self.broken}")

    def finish(self) -> dict[str, Any]:
        """Save the student, plot the losses, print the table and what to do next."""
        folder = self.folder / "student"
        student = self.adapters.merge_and_unload() if self.adapters else self.student
        for name, parameter in student.named_parameters():
            if name in self.saved_dtypes:
                parameter.data = parameter.data.to(self.saved_dtypes[name])
        detach_teacher(student)
        if self.process.is_main_process:
            with whole_folder(folder) as part:
                student.save_pretrained(part)
                self.processor.save_pretrained(part)
            plot_losses(self.folder / "metrics.jsonl", self.folder / "loss.png")
            plot_layers(self.results["rows"], self.folder / "layers.png")
        self.say("\n" + table(self.results["rows"]))
        self.say_skipped()
        self.say(
            f"\nlosses {self.folder / 'loss.png'}, layers {self.folder / 'layers.png'}, "
            f"metrics {self.folder / 'metrics.jsonl'}, student {folder}"
        )
        if self.question:
            picture = self.folder / "example.png"
            self.say(f"Ask it (the answer should be {self.answer}):")
            self.say(f"  python -m linmu.reference.demo.ask {folder} {picture} {self.question!r}")
        return self.results
