"""Defaults of all settings, by what is distilled: `--preset`."""

from __future__ import annotations

from dataclasses import replace

from .config import (
    Config,
    MixerOptions,
    MLPSettings,
    OptimizerSettings,
    SampleSettings,
    StageSettings,
    StudentSettings,
    WatchSettings,
)

DEMO = Config(
    # What was tried, and what it was worth: reference/demo/README.md. A text window is worth the time that it
    # takes on a CPU, no more. The windows hold every video of the demo whole, its larger pictures in parts.
    mixer=MixerOptions(window_thw=(4, 4, 4), text_window=0, scan_rope=True, output_gate=True),
    stage_i=StageSettings(
        steps=100, learning_rate=4e-3, learning_rate_new=1.2e-2, mixer=1.0, inputs=("teacher",)
    ),
    stage_ii=StageSettings(
        steps=400,
        learning_rate=2e-3,
        learning_rate_new=6e-3,
        mixer=1.0,
        layer=0.5,
        inputs=("teacher", "student"),
    ),
    stage_iii=StageSettings(
        steps=660,
        learning_rate=4e-4,
        learning_rate_new=1.2e-3,
        layer=3.0,
        logits=1.0,
        end_to_end=True,
        temperature=2.0,
    ),
)
PRESETS = {
    "demo": DEMO,
    "smoke": replace(
        DEMO,
        preset="smoke",
        stage_i=replace(DEMO.stage_i, steps=4),
        stage_ii=replace(DEMO.stage_ii, steps=4),
        stage_iii=replace(DEMO.stage_iii, steps=8),
        student=StudentSettings(calibration_batches=1),
        watch=WatchSettings(eval_samples=64, save_every=4, log_every=2),
    ),
    # What brought SmolLM2-135M that sees to its teacher's accuracy (results/smollm2-135m-sees): stages, the
    # weight of the layers' error, and rates times 576 / 2,048, its width by Qwen2.5-VL-3B's, rounded: AdamW
    # moves every output of a matrix by about rate times inputs (muP, arXiv 2203.03466). For another width,
    # multiply by 2,048 / width. Not measured: a teacher of this width, and 16 prompts a step.
    "vlm": replace(
        DEMO,
        preset="vlm",
        output="runs/vlm",
        dtype="bfloat16",
        mixer=MixerOptions(scan_rope=True, text_window=256),
        samples=SampleSettings(workers=4),
        mlps=MLPSettings(mlp_learning_rate=1e-4, lora_rank=64),
        optimizer=OptimizerSettings(batch_size=1, gradient_accumulation=16, gradient_checkpointing=True),
        watch=WatchSettings(eval_samples=200, save_every=500),
        stage_i=replace(DEMO.stage_i, steps=50, learning_rate=6e-4, learning_rate_new=2e-3),
        stage_ii=replace(DEMO.stage_ii, steps=120, learning_rate=3e-4, learning_rate_new=8e-4),
        stage_iii=replace(
            DEMO.stage_iii,
            steps=2100,
            learning_rate=1e-4,
            learning_rate_new=2e-4,
            layer=1.0,
            temperature=1.0,
        ),
    ),
    # SmolLM2-135M: 1.019 times its teacher's perplexity after these 13 M tokens, in 3.5 minutes of one H200
    # (results/smollm2-135m, run N). A wider model may need lower rates, and more text needs more steps.
    "text": replace(
        DEMO,
        preset="text",
        output="runs/text",
        dtype="bfloat16",
        mixer=MixerOptions(scan_rope=True, text_window=512, text_only=True),
        samples=SampleSettings(workers=4),
        mlps=MLPSettings(mlp_learning_rate=1e-3, lora_rank=64),
        optimizer=OptimizerSettings(batch_size=16),
        watch=WatchSettings(eval_samples=200, save_every=500),
        stage_i=replace(DEMO.stage_i, steps=50, learning_rate=2e-3, learning_rate_new=8e-3),
        stage_ii=replace(DEMO.stage_ii, steps=80, learning_rate=1e-3, learning_rate_new=3e-3),
        stage_iii=replace(
            DEMO.stage_iii,
            steps=700,
            learning_rate=1e-3,
            learning_rate_new=2e-3,
            layer=0.3,
            temperature=1.0,
        ),
    ),
}
