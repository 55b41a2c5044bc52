"""Every variant of a distillation trains what it says, and the ablation runs them all."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from linmu.reference import MMATE, Lesson, Objective, logit_loss
from linmu.reference.demo import TEACHER
from linmu.reference.student.backend import BACKENDS, Backend
from linmu.reference.student.convert import convert
from linmu.reference.training.commands.ablation import (
    OF_TEXT,
    VARIANTS,
    ablate,
    table_of,
    variant_of,
    with_stages,
)
from linmu.reference.training.commands.command_line import parse
from linmu.reference.training.commands.main import main
from linmu.reference.training.config import StudentSettings, check_settings, settings_of
from linmu.reference.training.parameter_groups import MIXER, ParameterGroup
from linmu.reference.training.refusal import RefusedError
from linmu.reference.training.run import Run
from linmu.reference.training.run_folder import claim_folder
from linmu.reference.training.stages import stage_of
from linmu.reference.training.student_start import start
from linmu.reference.training.teacher_student import attach_teacher

from ..student.tiny_families import BUILDERS
from .figures import drawn
from .flags import steps

pytestmark = pytest.mark.trial_of_the_reference

FLEX_MA, LOCAL_SWIN, MIX, ADAPTERS, TUNED = ParameterGroup
TINY = ["--batch_size", "2", "--eval_samples", "2", "--calibration_batches", "1", "--cpu"]
TINY += ["--save_every", "9", "--log_every", "1", "--backend", "optimized"]
ONE = [*TINY, "--stages", "iii", *steps(1, 1, 2), "--allow_missing_stage"]


def moved(folder) -> set[str]:
    """Names of the saved student's tensors that differ from the teacher's."""
    student, teacher = (
        AutoModelForImageTextToText.from_pretrained(f).state_dict() for f in (folder / "student", TEACHER)
    )
    return {name for name in student.keys() & teacher.keys() if not torch.equal(student[name], teacher[name])}


@pytest.mark.parametrize(
    ("flags", "tuned"),
    [
        (["--tune", "none", "--layers", "0", "2"], r"^$"),
        (["--tune", "full", "--mlp_learning_rate", "1e-3"], r"\.mlp\.(gate|up|down)_proj\.weight$"),
        (["--lora_targets", "down_proj", "--lora_rank", "2"], r"\.mlp\.down_proj\.weight$"),
    ],
)
def test_stage_iii_tunes_what_it_is_asked_to(tmp_path, flags, tuned):
    main([*ONE, *flags, "--output", str(tmp_path)])
    names = moved(tmp_path)
    assert all(re.search(tuned, name) and ".visual." not in name for name in names)
    assert bool(names) == ("none" not in flags)
    if "full" in flags:
        assert len(names) == 3 * 4
    settings = json.loads((tmp_path / "student" / "config.json").read_text())["linmu"]
    assert settings["layers"] == ([0, 2] if "--layers" in flags else [0, 1, 2, 3])


def opened(*flags: str) -> Run:
    """A run with teacher and student in place, before anything is written."""
    run = Run(parse([*TINY, *flags]))
    run.open()
    return run


def test_one_process_takes_one_gpu_of_several(tmp_path, monkeypatch):
    """The Trainer would wrap the lesson in `nn.DataParallel`, with so many times the batch."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    run = Run(parse([flag for flag in TINY if flag != "--cpu"]))
    run.open()
    trainer = run.trainer(run.stages[0], tmp_path)
    assert trainer.args.n_gpu == 1 and trainer.args.train_batch_size == run.config.optimizer.batch_size
    trainer.model.close()


@pytest.mark.parametrize("layers", [["1", "3"], ["-1"]])
def test_a_hybrid_may_keep_its_first_layers_attention(tmp_path, layers):
    rows = main([*TINY, *steps(1, 1, 1), "--layers", *layers, "--output", str(tmp_path)])["rows"]
    measured = [row["layer"] for row in rows["stage iii"]["layers"]]
    assert measured == [int(layer) % 4 for layer in layers]


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_what_is_tuned_is_the_students_alone(tune):
    """The teacher's logits stay as they are, whatever becomes of adapters or tuned copies."""
    run = opened("--tune", tune)
    inputs = run.encoder(run.training.__getitems__(range(2)))
    del inputs["labels"]
    before = {role: run.lesson().run(role, inputs) for role in ("teacher", "student")}
    run.add_adapters()
    with torch.no_grad():
        for name, parameter in run.student.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.add_(0.1)
    after = {role: run.lesson().run(role, inputs) for role in ("teacher", "student")}
    assert torch.equal(before["teacher"], after["teacher"])
    assert not torch.allclose(before["student"], after["student"], atol=1e-2)


def test_adapters_ask_for_no_gradient_of_the_embeddings():
    """With recomputed layers peft would, and the frozen vision tower would be differentiated too."""
    run = opened("--gradient_checkpointing")
    run.add_adapters()
    run.set_free(stage_of("iii", run.config))
    assert not run.student.get_input_embeddings()(torch.tensor([[0]])).requires_grad


def test_a_random_start_keeps_nothing_of_attention():
    own, random = (
        {name: p.detach() for name, p in opened("--init", init).student.named_parameters()}
        for init in ("attention", "random")
    )
    for name, tensor in own.items():
        copied = ".mixer." in name and re.search(r"\.(q|k|v|o)_proj\.weight$", name)
        assert torch.equal(tensor, random[name]) != bool(copied) or name.endswith("_proj.bias"), name


def decoder_of_text(window: int) -> torch.nn.Module:
    """A language model's student with its teacher, as `--preset text` makes it."""
    teacher = BUILDERS["llama"]().teacher
    student = convert(teacher, {"text_only": True, "text_window": window})
    attach_teacher(student, teacher)
    return student


@pytest.mark.parametrize("window", [0, 3])
def test_a_decoder_of_text_starts_its_window_as_it_is_asked_to(window):
    """`text_only` leaves out what vision uses; a text window stays, and with it Local-Swin and the mix."""
    own, random, flex = (decoder_of_text(window) for _ in range(3))
    start(random, StudentSettings(init="random"))
    start(flex, StudentSettings(branches="flex"))
    before, after, pinned = (dict(each.named_parameters()) for each in (own, random, flex))
    copied = {name for name in before if re.search(r"\.mixer\..*\.[qkvo]_proj\.weight$", name)}
    assert {name for name in before if not torch.equal(before[name], after[name])} == copied
    assert any("local_swin" in name for name in copied) == bool(window)
    mixes = [tensor for name, tensor in pinned.items() if name.endswith("mix_proj.bias")]
    assert bool(mixes) == bool(window) and all(torch.sigmoid(mix) == 1 for mix in mixes)


def test_text_without_a_window_has_no_other_branch():
    check_settings(parse(["--preset", "text", "--data", "a.jsonl", "--teacher", "a", "--branches", "local"]))
    flags = ["--mixer.text_only", "--mixer.text_window", "0", "--branches", "local"]
    with pytest.raises(SystemExit):
        parse(flags)


def test_settings_of_a_stage_change_its_losses_alone():
    flags = ["--stage_ii.inputs", "teacher", "--stage_ii.layer", "0.25"]
    flags += ["--stage_iii.layer", "0", "--stage_iii.temperature", "2"]
    stages = {name: stage_of(name, parse(flags)) for name in ("i", "ii", "iii")}
    assert stages["i"] == stage_of("i", parse([]))
    assert stages["ii"].objectives == (Objective(mixer=1.0, layer=0.25, inputs="teacher"),)
    assert stages["iii"].objectives == (Objective(logits=1.0, end_to_end=True, temperature=2.0),)


def test_a_rate_for_new_tensors_is_that_of_the_others_unless_it_is_given():
    none = ["--stage_iii.learning_rate_new", "None"]
    stage = stage_of("iii", parse(["--stage_iii.learning_rate", "3e-5", *none]))
    assert (stage.learning_rate, stage.learning_rate_new) == (3e-5, 3e-5)
    stage = stage_of("i", parse(["--stage_i.learning_rate", "3e-5"]))
    assert (stage.learning_rate, stage.learning_rate_new) == (3e-5, 1.2e-2)


def test_every_group_of_parameters_is_trained_where_it_is_said(tmp_path):
    run = opened()
    run.add_adapters()
    names = [name for name, _ in run.student.named_parameters()]
    mixers = [name for name in names if ".mixer." in name]
    for name in mixers:
        assert sum(group.matches(name) for group in MIXER) == 1, name
    assert {group for group in ParameterGroup if any(map(group.matches, names))} == {*MIXER, ADAPTERS}
    for branches, stages in {
        "both": {"i": {FLEX_MA, MIX}, "ii": {FLEX_MA, LOCAL_SWIN, MIX}, "iii": {*MIXER, ADAPTERS}},
        "flex": {"i": {FLEX_MA}, "ii": {FLEX_MA}, "iii": {FLEX_MA, ADAPTERS}},
        "local": {"i": {LOCAL_SWIN}, "ii": {LOCAL_SWIN}, "iii": {LOCAL_SWIN, ADAPTERS}},
    }.items():
        for name, trained in stages.items():
            assert {*stage_of(name, parse(["--branches", branches])).trained} == trained


def test_projections_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(RefusedError, match="--lora_targets must be among the linear projections of"):
        main([*ONE, "--lora_targets", "q_proj", "--output", str(tmp_path)])


def test_bfloat16_with_checkpointing_and_accumulation_trains_in_float32(tmp_path):
    flags = ["--dtype", "bfloat16", "--gradient_checkpointing", "--gradient_accumulation", "2"]
    main([*TINY, *flags, *steps(1, 2, 2), "--output", str(tmp_path)])
    taught = load_file(tmp_path / "stage_iii" / "taught.safetensors")
    assert {tensor.dtype for tensor in taught.values()} == {torch.float32}
    saved = load_file(tmp_path / "student" / "model.safetensors")
    kept = {tensor.dtype for name, tensor in saved.items() if "flex_ma.A_log" in name or "mix_proj" in name}
    others = {tensor.dtype for name, tensor in saved.items() if ".mlp." in name or "q_proj" in name}
    assert (kept, others) == ({torch.float32}, {torch.bfloat16})


def test_variants_of_the_ablation_take_as_many_steps_in_all():
    base = parse(steps(80, 380, 140))
    for name in VARIANTS:
        config = variant_of(base, name, 0)
        assert sum(config.of_stage(stage).steps for stage in config.stages) == 600, name
        assert (name.startswith("without stage")) == (config.stages != ("i", "ii", "iii"))
    shared = with_stages(base, ("i", "iii"))
    assert [shared.of_stage(stage).steps for stage in shared.stages] == [218, 382]


def test_the_ablation_leaves_out_one_thing_at_a_time(tmp_path, capsys, pytestconfig):
    """In as few steps as can be; all variants in a thorough run."""
    few = ["without stage ii", "without Local-Swin", "without Flex-MA"]
    names = list(VARIANTS) if pytestconfig.getoption("thorough") else few
    flags = [*TINY, *steps(1, 1, 1), "--output", str(tmp_path), "--calibration_batches", "0"]
    with drawn():
        main(["ablate", "--seeds", "1", "--variants", ",".join(names), *flags])
    table = (tmp_path / "ablation.md").read_text()
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == names
    assert table in capsys.readouterr().out and (tmp_path / "ablation.png").is_file()

    def tensors(name: str) -> dict[str, torch.Tensor]:
        folder = tmp_path / name.replace(" ", "_") / "seed_0"
        return load_file(folder / "student" / "model.safetensors")

    for gone, pinned in (("without Local-Swin", 1.0), ("without Flex-MA", 0.0)):
        mix = [v for k, v in tensors(gone).items() if k.endswith("mix_proj.bias")]
        assert torch.equal(torch.sigmoid(torch.stack(mix)).round(decimals=6), torch.full((4, 1), pinned))
    silent = [v for k, v in tensors("without Flex-MA").items() if k.endswith("flex_ma.o_proj.weight")]
    assert len(silent) == 4 and not any(map(torch.any, silent))
    assert not (tmp_path / "without_stage_ii" / "seed_0" / "stage_ii").exists()


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("without the reverse scan", "reverse_scan"),
        ("raster instead of Rotary-Major", "rotary_major"),
    ],
)
def test_variants_of_the_scan_switch_one_option_off(name, option):
    base = parse([])
    assert variant_of(base, name, 0).mixer == replace(base.mixer, **{option: False})


def test_the_table_shows_mean_and_spread():
    rows = [
        {"accuracy": 0.5, "perplexity": 2.0, "kl": 1.0, "agreement": 0.7},
        {"accuracy": 0.7, "perplexity": 2.0, "kl": 1.0, "agreement": 0.9},
    ]
    told = "| full | 0.600 ± 0.141 | 2.000 ± 0.000 | 1.000 ± 0.000 | 0.800 ± 0.141 |"
    assert told in table_of({"full": rows})


def test_decoders_of_text_have_an_ablation_of_their_own(tmp_path):
    """Each variant is another run that may be; perplexity counts, relative to the teacher's."""
    ran: list[dict] = []

    def run(config):
        check_settings(config)
        changed = settings_of(replace(config, output="", seed=0))
        assert changed not in ran
        ran.append(changed)
        row = {"accuracy": 0.0, "perplexity": 11.0, "kl": 0.1, "agreement": 0.9}
        return {"rows": {"teacher": {"perplexity": 10.0}, f"stage {config.stages[-1]}": row}}

    flags = ["--preset", "text", "--teacher", "a", "--data", "a.jsonl", "--output", str(tmp_path)]
    with drawn():
        table = ablate(["--seeds", "1", *flags], run)
    assert len(ran) == len(OF_TEXT) and "| half the text window | 0.000 ± 0.000 | 1.100 ± 0.000 |" in table


def test_what_other_settings_reached_is_not_taken_over(tmp_path):
    ran = []

    def run(config):
        ran.append(config)
        claim_folder(config, {})
        row = {"accuracy": 0.5, "perplexity": 11.0, "kl": 0.1, "agreement": 0.9}
        results = {"rows": {"teacher": {"perplexity": 10.0}, "stage iii": row}}
        (Path(config.output) / "results.json").write_text(json.dumps(results))
        (Path(config.output) / "student").mkdir()
        (Path(config.output) / "student" / "config.json").write_text("{}")
        return results

    flags = ["--seeds", "1", "--variants", "full", "--output", str(tmp_path)]
    tables = [ablate(flags, run) for _ in range(2)]
    assert len(ran) == 1 and tables[0] == tables[1]
    with pytest.raises(RefusedError, match=r"settings it began with, got other values of \['stage_iii'\]"):
        ablate([*flags, "--stage_iii.learning_rate", "1e-5"], run)


def test_no_layer_at_all_is_refused():
    with pytest.raises(RefusedError, match="--layers must name a layer to convert, or be left out, got none"):
        check_settings(replace(parse([]), student=StudentSettings(layers=())))


def test_unknown_variants_are_refused():
    with pytest.raises(RefusedError, match=r"--variants must be among .*got \['half'\]"):
        main(["ablate", "--variants", "half"])


def test_a_run_and_evaluate_take_mixer_and_losses_from_the_backend(tmp_path, monkeypatch):
    """From the one that is registered under the name of --backend, whichever package that is."""
    used = set()

    class OwnMMATE(MMATE):
        def forward(self, *args, **kwargs):
            used.add("mixer")
            return super().forward(*args, **kwargs)

    def own_loss(*args, **kwargs):
        used.add("loss")
        return logit_loss(*args, **kwargs)

    class OwnLesson(Lesson):
        logit_loss = staticmethod(own_loss)

    monkeypatch.setitem(BACKENDS, "reference", Backend("reference", OwnMMATE, Lesson=OwnLesson))
    main([*ONE, "--backend", "reference", "--output", str(tmp_path)])
    assert used == {"mixer", "loss"}
    used.clear()
    main(
        [
            "evaluate",
            str(tmp_path / "student"),
            "--teacher",
            "demo",
            "--backend",
            "reference",
            *TINY[:4],
            "--cpu",
        ]
    )
    assert used == {"mixer", "loss"}
