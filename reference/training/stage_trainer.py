"""`transformers.Trainer` for one stage of distillation: its losses, its learning rates, its checkpoints.

A checkpoint holds what the stage may change (M-MATE and adapters), the optimizer, the schedule, the step and
the random state; the data's order is a function of the step, so a resumed run sees what an unbroken one would
have seen.
"""

from __future__ import annotations

import math
import os
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import SequentialSampler
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, rotate_checkpoints

from ..student.split_forward import context_parallel
from .batch_facts import WithFacts, placeholders_of
from .parameter_groups import MLPS, belongs
from .safety.atomic_writes import PART, finish_folder
from .safety.distributed_means import processes, total
from .safety.guards import (
    TrainingStoppedError,
    refuse_idle_training,
    refuse_infinite_gradients,
    refuse_infinite_loss,
    refuse_infinite_tensors,
)
from .safety.late_questions import LateQuestions, heeds_marks, is_on_gpu, plain
from .stages import Stage
from .taught_tensors import load_taught, taught_tensors


class StageTrainer(Trainer):
    """`transformers.Trainer` for one stage: its objectives, learning rates and checkpoints.

    Args:
        stage: what is trained, on what, and how fast.
        new_names: names within M-MATE of the tensors that were not copied from the teacher.
        mesh: the processes that share a batch's tokens; None = each has a batch of its own. Choice: not
            accelerate's `ParallelismConfig(cp_size)`, which splits the buffers of ring attention and needs
            FSDP. To DDP and FSDP, and to the loss, such a process is one of many that hold some tokens.
        **kwargs: of `transformers.Trainer`.
    """

    def __init__(
        self, stage: Stage, new_names: set[str], mesh: DeviceMesh | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.mesh = mesh
        self.stage, self.new_names = stage, new_names
        self.model_accepts_loss_kwargs = False  # Lesson's **kwargs are the model's, and its loss is a mean
        self.terms: dict[str, list[torch.Tensor]] = defaultdict(list)
        self.part = Path(self.args.output_dir) / f"checkpoint{PART}"
        self.saving, self.may_be_idle = False, True
        self.asks_late, self.facts = is_on_gpu(self.model), None
        if self.model.graphs is not None:
            self.data_collator = WithFacts(self.data_collator, placeholders_of(self.model))
        self.late: LateQuestions | None = None
        self.tokens: list[torch.Tensor] = []  # that were taught and are not counted yet
        if self.is_fsdp_enabled and not all(objective.end_to_end for objective in stage.objectives):
            # such a loss comes from inside the layers: their weights must stay until it has gone back there
            self.accelerator.state.fsdp_plugin.reshard_after_forward = False

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Forward and backward of a batch, and the questions whether its numbers can be trusted."""
        names, self.facts = inputs.pop("names", []), inputs.pop("facts", None)
        self.tokens.append(inputs["attention_mask"].sum())
        loss = super().training_step(model, inputs, num_items_in_batch)
        where = f"stage {self.stage.name}, step {self.state.global_step + 1}"
        late = self.late_questions()
        if late is None:
            refuse_infinite_loss(self.model, loss, where, names, self.last_good())
        for parameter in self.model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                # 0, as `with_gradient_anchor` has it: AdamW's momentum moves what this batch did not reach
                parameter.grad = torch.zeros_like(parameter)
        if self.may_be_idle:
            refuse_idle_training(self.model, self.optimizer, where)
            self.may_be_idle = False
        if late is None:
            refuse_infinite_gradients(self.model.named_parameters(), where, names, self.last_good())
        else:
            late.add(inputs, loss, where, names)
        return loss

    def late_questions(self) -> LateQuestions | None:
        """What asks whether numbers are finite; None = every step is asked at once."""
        optimizer = plain(self.optimizer)
        if processes() > 1 or not (self.asks_late and heeds_marks(optimizer)):
            return None
        if self.late is None:
            self.late = LateQuestions(self.model, optimizer, self.last_good)
        return self.late

    def ask_now(self) -> None:
        """Wait for what was not asked yet: stop if a step was not finite, and count the tokens."""
        if self.late is not None:
            self.late.ask()
        if self.tokens:
            self.state.num_input_tokens_seen += int(total(torch.stack(self.tokens).sum()))
            self.tokens.clear()

    def train(self, *args, **kwargs):
        self.tidy_checkpoints()
        result = super().train(*args, **kwargs)
        self.ask_now()
        return result

    def tidy_checkpoints(self) -> None:
        """Remove what a process that was killed while it saved would have removed."""
        if self.args.should_save and Path(self.args.output_dir).is_dir():
            shutil.rmtree(self.part, ignore_errors=True)
            rotate_checkpoints(self.args.output_dir, self.args.save_total_limit)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of this step's objective: objectives follow each other, each for as many steps."""
        objectives = self.stage.objectives
        self.model.objective = objectives[self.state.global_step * len(objectives) // self.state.max_steps]
        facts = {} if self.facts is None else {"facts": self.facts}
        with context_parallel(self.model.student, self.mesh):
            terms = model(**inputs, **facts)
        for name, value in terms.items():
            self.terms[name].append(value.detach())
        return (terms["loss"], terms) if return_outputs else terms["loss"]

    def mean_terms(self) -> dict[str, float]:
        """Means of the loss's terms since the last call, over all processes."""
        own = {name: torch.stack(values).mean() for name, values in self.terms.items()}
        means = {name: float(total(mean)) / processes() for name, mean in own.items()}
        self.terms.clear()
        return means

    def log(self, logs, start_time=None):
        if "loss" in logs:
            self.ask_now()
            logs |= self.mean_terms()  # of all processes, so all ask
        super().log(logs, start_time)

    def create_optimizer(self, model=None):
        """One group of parameters for each learning rate."""
        groups: dict[float, list[torch.nn.Parameter]] = defaultdict(list)
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                groups[self.learning_rate(name)].append(parameter)
        kind, options = self.get_optimizer_cls_and_kwargs(self.args)
        self.optimizer = kind([{"params": group, "lr": rate} for rate, group in groups.items()], **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        """A linear rise over the warm-up, then a cosine; the first step learns, and so does the last."""
        warmup = self.args.get_warmup_steps(num_training_steps)

        def share_of_rate(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            done = (step + 1 - warmup) / (num_training_steps + 1 - warmup)
            return 0.5 * (1 + math.cos(math.pi * done))

        self.lr_scheduler = LambdaLR(self.optimizer if optimizer is None else optimizer, share_of_rate)
        return self.lr_scheduler

    def learning_rate(self, name: str) -> float:
        """Of a tensor: MLPs, M-MATE's own tensors and copied ones learn at different rates."""
        if belongs(name, MLPS):
            return self.stage.mlp_learning_rate
        is_new = name.split(".mixer.")[-1] in self.new_names
        return self.stage.learning_rate_new if is_new else self.stage.learning_rate

    def _get_train_sampler(self, train_dataset=None):
        # InOrder has shuffled: a resumed run sees the same samples
        return SequentialSampler(self.train_dataset)

    def _get_output_dir(self, trial=None):
        return str(self.part) if self.saving else self.args.output_dir

    def _save_checkpoint(self, model, trial=None):
        """Save beside the last checkpoint, and only then take its place: a kill or a full disk loses
        nothing."""
        where = f"stage {self.stage.name}, step {self.state.global_step}"
        self.ask_now()
        refuse_infinite_tensors(taught_tensors(self.model.student), where, self.last_good())
        folder = Path(self.args.output_dir)
        if self.args.should_save:
            shutil.rmtree(self.part, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            self.saving = True
            super()._save_checkpoint(model, trial)
            written = self.part / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            torch.save(dict(self.terms), written / f"terms_{self.args.process_index}.pt")
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                finish_folder(written, folder / written.name)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(self.part, ignore_errors=True)
            raise TrainingStoppedError(
                f"{where}: a checkpoint must fit on the disk, got {error}; {self.last_good()}, make room and "
                "go on with --resume"
            ) from error
        finally:
            self.saving = False
        self.tidy_checkpoints()

    def save_model(self, output_dir=None, _internal_call=False):
        taught = taught_tensors(self.model.student)  # gathered, so by all processes
        if self.args.should_save:
            os.makedirs(output_dir, exist_ok=True)
            save_file(taught, Path(output_dir) / "taught.safetensors")

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        folder = Path(resume_from_checkpoint)
        load_taught(self.model.student, folder / "taught.safetensors")
        terms = folder / f"terms_{self.args.process_index}.pt"
        self.terms.update(torch.load(terms, map_location=self.args.device) if terms.is_file() else {})

    def last_good(self) -> str:
        """What to say of the last checkpoint."""
        folder = Path(self.args.output_dir)
        last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        return f"the last good checkpoint is {last}" if last else "there is no checkpoint of this stage yet"
