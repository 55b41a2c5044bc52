"""The settings of a stage in the words of `transformers.Trainer`."""

from __future__ import annotations

from pathlib import Path

from transformers import TrainingArguments

from .config import Config
from .stages import Stage


class OneDevice(TrainingArguments):
    """Arguments of a process that trains on one device: the Trainer would spread a lone process over all GPUs
    by `nn.DataParallel`."""

    @property
    def n_gpu(self) -> int:
        return min(super().n_gpu, 1)


def arguments_of(stage: Stage, config: Config, folder: Path, on_gpu: bool) -> OneDevice:
    """What the Trainer of a stage is told; its checkpoints go to `folder`."""
    optimizer, watch = config.optimizer, config.watch
    steps = config.of_stage(stage.name).steps
    return OneDevice(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=optimizer.batch_size,
        gradient_accumulation_steps=optimizer.gradient_accumulation,
        learning_rate=stage.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, round(optimizer.warmup * steps)),
        max_grad_norm=1.0,
        weight_decay=0.0,
        bf16=config.dtype == "bfloat16",
        use_cpu=config.cpu,
        seed=config.seed,
        save_steps=watch.save_every,
        save_total_limit=2,
        logging_steps=watch.log_every,
        logging_nan_inf_filter=False,  # it asks the device every step; StageTrainer stops the run
        dataloader_num_workers=config.samples.workers,
        dataloader_pin_memory=on_gpu,
        accelerator_config={"non_blocking": on_gpu},
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,  # `with_gradient_anchor` sees to it that there are none
        disable_tqdm=True,
        report_to=watch.report,
        run_name=f"{Path(config.output).name}, stage {stage.name}",
    )
