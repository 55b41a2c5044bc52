"""One distillation from a teacher to a student's folder: what `distill.py` runs."""

from __future__ import annotations

import importlib
import json
import time
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PrinterCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint

from ..demo import TEACHER
from ..prompts.packing_collator import PackingCollator
from ..student.backend import backend_of
from ..student.convert import convert
from ..student.families import student_class_of
from .calibration import calibrate_norms
from .commands.description import about_stage, about_student
from .config import STAGES, Config
from .data.conversations import InOrder, SharedBatches, skipped
from .data.digest import digests
from .data.open_data import batch_of, chat_collator, in_order, open_data
from .evaluation.evaluation import evaluate
from .evaluation.held_out import HeldOut
from .evaluation.plots import plot_layers, plot_losses
from .evaluation.scores import table
from .example import first_example, how_to_ask
from .lesson import Lesson, Objective
from .mlps import add_adapters, peft_settings
from .parameter_groups import MIXER, belongs
from .progress import Progress
from .refusal import check
from .run_folder import check_data, check_folder, claim_folder, taught_path
from .safety.atomic_writes import whole_file, whole_folder, write_text
from .safety.distributed_means import weights_on_every_process
from .safety.guards import refuse_infinite_weights
from .safety.memory import recompute_layers
from .stage_trainer import StageTrainer
from .stages import Stage, stage_of, steps_before
from .student_start import start
from .taught_tensors import load_taught, taught_tensors
from .teacher import open_processor, open_teacher, refused_as_teacher
from .teacher_student import attach_teacher, detach_teacher
from .trainer_arguments import arguments_of

ON_TEACHERS_STATES = Objective(mixer=1.0, inputs="teacher")


class Run:
    """One distillation, its folder, and its models.

    What it writes there: `run_folder.WRITTEN`. README.md says what each is, under "The folder".
    """

    def __init__(self, config: Config) -> None:
        self.config, self.folder = config, Path(config.output)
        self.backend = backend_of(config.backend)
        self.process = PartialState(cpu=config.cpu)
        self.device = self.process.device
        self.results: dict[str, Any] = {"rows": {}}
        self.adapters: Any = None
        self.stages = [stage_of(name, config) for name in config.stages]

    def prepare(self) -> None:
        """Open teacher and data, claim the folder, and measure the student before any training."""
        self.open()
        if self.process.is_main_process:
            claim_folder(self.config, self.digests)
        self.process.wait_for_everyone()
        if (self.folder / "results.json").is_file():
            self.results = json.loads((self.folder / "results.json").read_text())
        self.calibrate()
        if "converted" not in self.results["rows"]:
            self.evaluate("converted")
        self.save_example()

    def open(self) -> None:
        """Look at the folder, load the teacher, convert it, and open the data; nothing is written.

        Raises:
            RefusedError: for whatever can be known to fail before anything is trained.
        """
        if self.process.is_main_process:
            check_folder(self.config)
        set_seed(self.config.seed)
        self.teacher = str(TEACHER) if self.config.teacher == "demo" else self.config.teacher
        with refused_as_teacher(self.teacher):
            self.processor = open_processor(self.teacher)
            self.encoder = chat_collator(self.processor, self.config.samples)
        row_tokens = self.config.samples.row_tokens
        self.collator = PackingCollator(self.encoder, row_tokens) if row_tokens else self.encoder
        self.broken = self.folder / "broken.jsonl"
        self.training, held_out = open_data(self.config, self.encoder, self.broken, self.batches_at_once)
        if self.process.is_main_process:
            self.digests = digests(self.training, held_out)
            check_data(self.config, self.digests)
        self.held_out = HeldOut(held_out, self.encoder, self.config)
        with refused_as_teacher(self.teacher):
            self.student = self.convert(self.teacher)
        if any(stage.trains_mlps for stage in self.stages):
            peft_settings(self.student, self.config.mlps)  # refused now, not in hours
        for line in about_student(self.student, self.config, self.device):
            self.say(line)
        gpus = torch.cuda.device_count() if self.device.type == "cuda" else 1
        if gpus > self.process.num_processes == 1:
            self.say(f"one GPU of {gpus} is used; `torchrun --nproc_per_node {gpus} distill.py ...` uses all")

    @property
    def batches_at_once(self) -> int:
        """Processes with a batch of their own: all, or one of each group that shares its tokens.

        Raises:
            RefusedError: if the groups do not come out even.
        """
        processes, group = self.process.num_processes, self.config.optimizer.context_parallel
        must, hint = "--context_parallel must divide the number of processes", "torchrun --nproc_per_node"
        check(processes % group == 0, must, f"{group} for {processes}", hint)
        return processes // group

    def convert(self, folder: str) -> PreTrainedModel:
        """Teacher -> student with the teacher beside it, all frozen, M-MATE in float32."""
        settings, dtype = self.config.student, getattr(torch, self.config.dtype)
        with weights_on_every_process():
            teacher = open_teacher(folder, dtype).to(self.device)
        refuse_infinite_weights(teacher, "--teacher", folder)
        mixer = asdict(self.config.mixer)
        sees = student_class_of(teacher).prompt_layout is not None
        must, hint = "--mixer.text_only must be off for a teacher that sees", "take --preset vlm"
        check(not (mixer["text_only"] and sees), must, "text_only", hint)
        student = convert(teacher, mixer, layers=settings.layers, backend=self.backend)
        attach_teacher(student, teacher)
        student.requires_grad_(False)
        self.saved_dtypes = {name: parameter.dtype for name, parameter in student.named_parameters()}
        for name, parameter in student.named_parameters():
            if belongs(name, MIXER):
                parameter.data = parameter.data.float()
        start(student, settings)
        if self.config.optimizer.gradient_checkpointing:
            recompute_layers(student)
        return student

    def lesson(self, objective: Objective = ON_TEACHERS_STATES) -> Lesson:
        """The student as something that gives a loss."""
        lesson = self.backend.Lesson(self.student, objective)
        # What accelerate shards one by one: not the vision tower, which a batch of text does not enter.
        lesson._no_split_modules = [type(self.student.get_decoder().layers[0]).__name__]
        return lesson

    def calibrate(self) -> None:
        """Set Flex-MA's norms to the teacher's head outputs."""
        size = self.config.optimizer.batch_size
        samples = self.config.student.calibration_batches * size * self.batches_at_once
        if not samples:
            return
        lesson = self.lesson()
        loader = DataLoader(InOrder(self.training, min(samples, len(self.training))), size, collate_fn=list)
        with self.autocast():
            calibrate_norms(lesson, (self.on_device(batch_of(self.encoder, items)) for items in loader))
        lesson.close()

    def on_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch where the model is."""
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def autocast(self):
        """bfloat16 arithmetic where the teacher is bfloat16."""
        enabled = self.config.dtype == "bfloat16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    def evaluate(self, name: str) -> None:
        """Measure the student and keep the row; the teacher's row comes with the first."""
        started = time.perf_counter()
        lesson = self.lesson()
        with self.autocast():
            measured = evaluate(lesson, self.held_out.batches(), self.device)
        lesson.close()
        self.results["rows"].setdefault("teacher", measured["teacher"])
        self.results["rows"][name] = measured["student"]
        if self.process.is_main_process:  # kept for the final table and for a resumed run
            write_text(self.folder / "results.json", json.dumps(self.results, indent=1))
        row = measured["student"]
        self.say(
            f"{name}: accuracy {row['accuracy']:.3f}, KL {row['kl']:.4f}, agreement {row['agreement']:.3f}, "
            f"mixer error {row['mixer_error']:.3f}, layer error {row['layer_error']:.3f} "
            f"({time.perf_counter() - started:.0f} s)"
        )

    def say(self, line: str) -> None:
        """Print one line, from one process."""
        if self.process.is_main_process:
            print(line, flush=True)

    def teach(self, stage: Stage) -> None:
        """Run one stage, or take over its result if it is done."""
        folder = self.folder / f"stage_{stage.name}"
        done = taught_path(self.config, stage.name)
        if not done.is_file():
            self.start_from_previous(stage)
        if stage.trains_mlps:
            self.add_adapters()
        if done.is_file():
            load_taught(self.student, done)
        else:
            trainer = self.trainer(stage, folder)
            trainer.train(resume_from_checkpoint=self.last_checkpoint(folder))
            if self.config.watch.report == "wandb":  # which alone would log the next stage into this run
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
        if stage.trains_mlps:
            self.add_adapters()
        load_taught(self.student, done)

    def start_from_previous(self, stage: Stage) -> None:
        """Load what the stage before has taught; where that is missing, it has been allowed."""
        if stage.name == STAGES[0]:
            return
        path = taught_path(self.config, STAGES[STAGES.index(stage.name) - 1])
        if path.is_file():
            load_taught(self.student, path)

    def last_checkpoint(self, folder: Path) -> str | None:
        """Where a killed stage goes on."""
        return get_last_checkpoint(str(folder)) if self.config.resume and folder.is_dir() else None

    def add_adapters(self) -> None:
        """Put adapters, or tuned copies, of the decoder's MLPs into the student."""
        self.adapters = add_adapters(self.student, self.config.mlps, self.config.seed)

    def set_free(self, stage: Stage) -> None:
        """Freeze all but what the stage trains, and say so."""
        for name, parameter in self.student.named_parameters():
            parameter.requires_grad_(belongs(name, stage.trained))
        for line in about_stage(self.student, stage):
            self.say(line)

    def trainer(self, stage: Stage, folder: Path) -> StageTrainer:
        """Set the Trainer up for what the stage trains."""
        self.set_free(stage)
        config, optimizer = self.config, self.config.optimizer
        on_gpu = self.device.type == "cuda"
        per_step = optimizer.batch_size * optimizer.gradient_accumulation * self.batches_at_once
        seen = steps_before(stage.name, config) * per_step
        count = config.of_stage(stage.name).steps * per_step
        samples = in_order(config, self.training, count, seen, self.batches_at_once)
        shared = SharedBatches(samples, optimizer.batch_size, optimizer.context_parallel)
        lesson = self.lesson(stage.objectives[0])
        if optimizer.cuda_graphs and on_gpu:
            lesson.accelerate()
        new_names = set(lesson.layers[0].self_attn.mixer.initial_values())
        trainer = StageTrainer(
            stage,
            new_names,
            self.context_mesh,
            model=lesson,
            args=arguments_of(stage, config, folder, on_gpu),
            train_dataset=shared if optimizer.context_parallel > 1 else samples,
            data_collator=partial(batch_of, self.collator.with_names),
        )
        trainer.remove_callback(PrinterCallback)
        progress = Progress(stage.name, self.folder / "metrics.jsonl", optimizer.context_parallel)
        trainer.add_callback(progress)
        return trainer

    @cached_property
    def context_mesh(self) -> DeviceMesh | None:
        """The processes that share this one's batch, which follow each other; None = it has its own."""
        group = self.config.optimizer.context_parallel
        if group == 1:
            return None
        sizes, names = (self.batches_at_once, group), ("data", "context")
        return init_device_mesh(self.device.type, sizes, mesh_dim_names=names)["context"]

    def save_example(self) -> None:
        """Write the picture of a held-out question, for the command that asks the student."""
        looked_at = range(min(100, self.held_out.count))
        self.example = first_example(self.held_out.samples[index] for index in looked_at)
        if self.example and self.process.is_main_process:
            with whole_file(self.folder / "example.png") as part:
                self.example.picture.save(part, "PNG")

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
            with whole_file(self.folder / "loss.png") as part:
                plot_losses(self.folder / "metrics.jsonl", part)
            with whole_file(self.folder / "layers.png") as part:
                plot_layers(self.results["rows"], part)
        self.say("\n" + table(self.results["rows"]))
        self.say_skipped()
        self.say(
            f"\nlosses {self.folder / 'loss.png'}, layers {self.folder / 'layers.png'}, "
            f"metrics {self.folder / 'metrics.jsonl'}, student {folder}"
        )
        if self.example:
            self.say(how_to_ask(self.example, folder, self.folder / "example.png"))
        return self.results
