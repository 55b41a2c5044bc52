"""Lesson: one model that is teacher and student at once gives the losses that two separate models give."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from linmu import optimized, reference
from linmu.reference import (
    Lesson,
    Objective,
    attach_teacher,
    calibrate_norms,
    convert,
    detach_teacher,
    hidden_loss,
    logit_loss,
)
from linmu.reference.student.model import decoder_layers
from linmu.reference.training.safety.memory import recompute_layers
from linmu.reference.training.token_groups import supervised

from ..student.tiny_checkpoint import IMAGE, VIDEO, build_teacher, every_kind, logits_of, shake_mixers

ALONE = Objective(mixer=1.0, inputs="teacher")
TOGETHER = Objective(mixer=1.0, layer=0.5, logits=2.0, end_to_end=True)


class Calls(nn.Module):
    """What every mixer and every decoder layer of a model is given and gives, over one forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.mixer_calls, self.mixer_outputs, self.layer_calls, self.layer_outputs = [], [], [], []
        for layer in decoder_layers(model):
            layer.self_attn.register_forward_hook(self._keep_mixer, with_kwargs=True)
            layer.register_forward_hook(self._keep_layer, with_kwargs=True)

    def _keep_mixer(self, module, args, kwargs, output):
        self.mixer_calls.append(kwargs)
        self.mixer_outputs.append(output[0])

    def _keep_layer(self, module, args, kwargs, output):
        self.layer_calls.append((args, kwargs))
        self.layer_outputs.append(output[0] if isinstance(output, tuple) else output)


class Pair:
    """A student with its teacher attached, and the same two models apart."""

    def __init__(self) -> None:
        self.teacher = build_teacher().double()
        self.student = shake_mixers(convert(self.teacher)).double()
        self.alone = copy.deepcopy(self.student)
        attach_teacher(self.student, self.teacher)
        self.inputs = {k: v.double() if v.is_floating_point() else v for k, v in every_kind("right").items()}
        self.valid = self.inputs["attention_mask"].bool()
        self.labels = self.inputs["input_ids"].masked_fill(~self.valid, -100)
        self.labels[:, :5] = -100

    def lesson(self, objective: Objective) -> Lesson:
        return Lesson(self.student, objective)

    def adapt(self) -> None:
        """Add adapters that change the student's MLPs."""
        torch.manual_seed(0)
        lora = LoraConfig(r=2, target_modules=r".*language_model.*(gate_proj|up_proj|down_proj)")
        get_peft_model(self.student, lora)
        for name, parameter in self.student.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)


@pytest.fixture
def pair() -> Pair:
    return Pair()


def mean(terms: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(terms).mean()


def grouped_loss(student: torch.Tensor, teacher: torch.Tensor, pair: Pair, labelled: bool) -> torch.Tensor:
    """The hidden loss of vision, of text and, if there are labels, of answering tokens, averaged."""
    ids = pair.inputs["input_ids"]
    vision = (ids == IMAGE) | (ids == VIDEO)
    groups = [vision, ~vision & pair.valid]
    if labelled:
        groups.append(torch.nn.functional.pad(pair.labels[:, 1:] != -100, (0, 1)))
    return mean([hidden_loss(student, teacher, group) for group in groups])


def test_as_teacher_the_pair_gives_the_teachers_logits(pair):
    positions = torch.arange(pair.valid.shape[1])
    got = pair.lesson(ALONE).run("teacher", pair.inputs, positions)
    torch.testing.assert_close(got[pair.valid], logits_of(pair.teacher, pair.inputs)[pair.valid])


def test_as_student_the_pair_gives_the_students_logits(pair):
    positions = torch.arange(pair.valid.shape[1])
    got = pair.lesson(ALONE).run("student", pair.inputs, positions)
    torch.testing.assert_close(got, logits_of(pair.alone, pair.inputs))


def test_adapters_work_for_the_student_only(pair):
    pair.adapt()
    lesson, positions = pair.lesson(ALONE), torch.arange(pair.valid.shape[1])
    teacher = lesson.run("teacher", pair.inputs, positions)
    student = lesson.run("student", pair.inputs, positions)
    torch.testing.assert_close(teacher[pair.valid], logits_of(pair.teacher, pair.inputs)[pair.valid])
    assert (student - logits_of(pair.alone, pair.inputs)).abs().max() > 1e-3


def test_stage_i_compares_mixers_on_the_teachers_own_states(pair):
    given, own = Calls(pair.teacher), Calls(pair.alone)
    with torch.no_grad():
        logits_of(pair.teacher, pair.inputs)
        logits_of(pair.alone, pair.inputs)
        own_calls, expected = [*own.mixer_calls], []
        for index, layer in enumerate(decoder_layers(pair.alone)):
            call = own_calls[index] | {"hidden_states": given.mixer_calls[index]["hidden_states"]}
            expected.append(grouped_loss(layer.self_attn(**call)[0], given.mixer_outputs[index], pair, False))
    torch.testing.assert_close(pair.lesson(ALONE)(**pair.inputs)["loss"], mean(expected))


def test_stage_ii_compares_whole_layers_on_the_teachers_own_states(pair):
    given, own = Calls(pair.teacher), Calls(pair.alone)
    with torch.no_grad():
        logits_of(pair.teacher, pair.inputs)
        logits_of(pair.alone, pair.inputs)
        own_calls, expected = [*own.layer_calls], []
        for index, layer in enumerate(decoder_layers(pair.alone)):
            (_, *others), named = own_calls[index]
            output = layer(given.layer_calls[index][0][0], *others, **named)
            expected.append(grouped_loss(output, given.layer_outputs[index], pair, True))
    got = pair.lesson(Objective(layer=0.5, inputs="teacher"))(pair.labels, **pair.inputs)
    torch.testing.assert_close(got["layer"], mean(expected))
    torch.testing.assert_close(got["loss"], 0.5 * mean(expected))


def test_stage_iii_compares_the_students_run_with_the_teachers(pair):
    given, own = Calls(pair.teacher), Calls(pair.alone)
    with torch.no_grad():
        taught, answered = logits_of(pair.teacher, pair.inputs), logits_of(pair.alone, pair.inputs)
    mask = torch.nn.functional.pad(pair.labels[:, 1:] != -100, (0, 1))

    def compare(students: list[torch.Tensor], teachers: list[torch.Tensor]) -> torch.Tensor:
        return mean([grouped_loss(s, t, pair, True) for s, t in zip(students, teachers, strict=True)])

    mixer = compare(own.mixer_outputs, given.mixer_outputs)
    layer = compare(own.layer_outputs, given.layer_outputs)
    logits = logit_loss(answered, taught, mask)
    got = pair.lesson(TOGETHER)(labels=pair.labels, **pair.inputs)
    for name, expected in (("mixer", mixer), ("layer", layer), ("logits", logits)):
        torch.testing.assert_close(got[name], expected)
    torch.testing.assert_close(got["loss"], mixer + 0.5 * layer + 2.0 * logits)


def test_gradients_of_stage_iii_are_those_of_two_separate_models(pair):
    pair.student.requires_grad_(False)
    for layer in decoder_layers(pair.student):
        layer.self_attn.mixer.requires_grad_(True)
    pair.lesson(Objective(logits=1.0, end_to_end=True))(labels=pair.labels, **pair.inputs)["loss"].backward()
    positions, mask = supervised(pair.labels)
    answered = pair.alone(**pair.inputs, use_cache=False).logits[:, positions]
    logit_loss(answered, logits_of(pair.teacher, pair.inputs)[:, positions], mask).backward()
    for taught, alone in zip(decoder_layers(pair.student), decoder_layers(pair.alone), strict=True):
        expected = dict(alone.self_attn.named_parameters())
        for name, parameter in taught.self_attn.mixer.named_parameters():
            torch.testing.assert_close(
                parameter.grad, expected[name].grad, msg=lambda text, n=name: f"{n}: {text}"
            )


@pytest.mark.parametrize("end_to_end", [False, True])
def test_a_layers_loss_reaches_earlier_layers_only_end_to_end(pair, end_to_end):
    pair.student.requires_grad_(False)
    for layer in decoder_layers(pair.student):
        layer.self_attn.mixer.requires_grad_(True)
    lesson = pair.lesson(Objective(layer=1.0, end_to_end=end_to_end))
    lesson(**pair.inputs)
    lesson.layer_outputs[-1]["student"].sum().backward()
    first, last = (decoder_layers(pair.student)[i].self_attn.mixer.mix_proj.weight.grad for i in (0, -1))
    assert last is not None
    assert (first is not None) == end_to_end


def test_teacher_and_student_share_one_copy_of_the_weights():
    teacher = build_teacher()
    student = convert(teacher)
    attach_teacher(student, teacher)
    own = {parameter.data_ptr() for parameter in teacher.parameters()}
    beside = {name for name, p in student.named_parameters() if p.data_ptr() not in own}
    assert beside and all(".mixer." in name for name in beside)


def test_detaching_gives_back_the_student(pair):
    pair.lesson(ALONE).close()
    detach_teacher(pair.student)
    assert pair.student.state_dict().keys() == pair.alone.state_dict().keys()
    torch.testing.assert_close(logits_of(pair.student, pair.inputs), logits_of(pair.alone, pair.inputs))


def test_the_teacher_stays_usable_beside_its_student(pair):
    before = logits_of(build_teacher().double(), pair.inputs)
    pair.lesson(TOGETHER)(labels=pair.labels, **pair.inputs)["loss"].backward()
    torch.testing.assert_close(logits_of(pair.teacher, pair.inputs), before)


def test_attaching_twice_or_to_a_teacher_is_refused(pair):
    with pytest.raises(ValueError, match="attach_teacher: student must have M-MATE layers"):
        attach_teacher(pair.student, pair.teacher)
    with pytest.raises(ValueError, match="Lesson: student must have its teacher attached"):
        Lesson(pair.alone, ALONE)


def test_an_objective_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="inputs must be teacher or student"):
        Objective(mixer=1.0, inputs="both")
    with pytest.raises(ValueError, match="logits and end_to_end need the student's own inputs"):
        Objective(logits=1.0, inputs="teacher")


def test_logits_without_labels_are_refused(pair):
    with pytest.raises(ValueError, match="labels must be given where logits are taught"):
        pair.lesson(TOGETHER)(**pair.inputs)


@pytest.mark.parametrize("package", [reference, optimized])
def test_a_copy_has_a_lesson_of_its_own(package):
    """Copied and pickled while it is open and a batch was taught; the original's stays as it was."""
    teacher = build_teacher(num_hidden_layers=1)
    student = convert(teacher)
    attach_teacher(student, teacher)
    lesson, inputs = package.Lesson(student, TOGETHER), every_kind("right")
    loss = lesson(inputs["input_ids"], **inputs)["loss"]
    kept = lesson.layer_outputs[0]["student"]
    for twin in (copy.deepcopy(lesson), pickle.loads(pickle.dumps(lesson))):
        assert not twin.layer_outputs[0] and not twin.mixers[0].outputs
        assert twin.layers[0] is twin.student.get_decoder().layers[0] is not lesson.layers[0]
        torch.testing.assert_close(twin(inputs["input_ids"], **inputs)["loss"], loss)
    copy.deepcopy(student)(**inputs)
    assert lesson.layer_outputs[0]["student"] is kept
    assert not twin.close().get_decoder().layers[0]._forward_hooks
    assert lesson.layers[0]._forward_hooks


def test_an_error_leaves_the_student_as_student(pair):
    lesson = pair.lesson(TOGETHER)
    pair.student.get_output_embeddings().forward = None  # reached at the end of the teacher's pass
    with pytest.raises(TypeError):
        lesson(pair.labels, **pair.inputs)
    del pair.student.get_output_embeddings().forward
    assert not lesson.layer_outputs[0]
    torch.testing.assert_close(logits_of(pair.student, pair.inputs), logits_of(pair.alone, pair.inputs))


def test_a_lesson_without_its_teacher_is_refused_and_closes(pair):
    """Otherwise the student would be compared with itself."""
    lesson = pair.lesson(Objective(logits=1.0))
    detach_teacher(pair.student)
    with pytest.raises(ValueError, match="student must keep its teacher"):
        lesson(pair.labels, **pair.inputs)
    lesson.close()
    assert not pair.student.get_decoder().layers[0]._forward_hooks


def test_saving_with_the_teacher_attached_is_refused(pair, tmp_path):
    """Its folder could not be opened."""
    with pytest.raises(ValueError, match=r"must be saved without its teacher.*detach_teacher"):
        pair.student.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())


def test_calibration_gives_flex_ma_the_scale_of_the_teachers_heads(pair):
    calibrate_norms(pair.lesson(ALONE), [pair.inputs, pair.inputs])
    heads = []
    for layer in decoder_layers(pair.teacher):
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: heads.append(args[0][pair.valid]))
    logits_of(pair.teacher, pair.inputs)
    for layer, expected in zip(decoder_layers(pair.student), heads, strict=True):
        weight = layer.self_attn.mixer.flex_ma.norm_weight
        torch.testing.assert_close(weight, expected.square().mean(0).sqrt(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "objective",
    [TOGETHER, ALONE, Objective(mixer=1.0, layer=0.5, inputs="teacher"), Objective(mixer=1.0, layer=0.5)],
    ids=["end to end", "mixers on teacher's states", "layers on teacher's states", "layers on their own"],
)
def test_gradient_checkpointing_changes_no_gradient(pair, objective):
    pair.student.requires_grad_(False)
    for layer in decoder_layers(pair.student):
        layer.self_attn.mixer.requires_grad_(True)

    def gradients() -> list[torch.Tensor]:
        pair.student.zero_grad()
        pair.lesson(objective)(labels=pair.labels, **pair.inputs)["loss"].backward()
        mixers = [layer.self_attn.mixer for layer in decoder_layers(pair.student)]
        return [p.grad.clone() for mixer in mixers for p in mixer.parameters()]

    pair.student.train()
    plain = gradients()
    recompute_layers(pair.student)
    for expected, got in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("objective", [ALONE, TOGETHER], ids=["on teacher's states", "end to end"])
def test_recomputed_layers_send_no_gradient_to_the_frozen_tower(pair, objective):
    """On the teacher's states none through the teacher's layers either: they learn nothing."""
    pair.adapt()
    pair.student.requires_grad_(False)
    for layer in decoder_layers(pair.student):
        layer.self_attn.mixer.requires_grad_(True)
    pair.student.train()
    recompute_layers(pair.student)
    entered = []

    def keep(module, args, kwargs) -> None:
        entered.append(args[0] if args else kwargs["hidden_states"])

    layers = decoder_layers(pair.student)
    for layer in layers if objective is ALONE else layers[:1]:
        layer.register_forward_pre_hook(keep, with_kwargs=True)
    pair.lesson(objective)(labels=pair.labels, **pair.inputs)
    assert entered and not any(hidden.requires_grad for hidden in entered)


def test_pictures_are_encoded_once_for_both(pair):
    calls = []
    pair.student.model.visual.register_forward_hook(lambda *_: calls.append(1))
    pair.lesson(TOGETHER)(labels=pair.labels, **pair.inputs)
    assert len(calls) == 2  # the images and the videos
    pair.lesson(TOGETHER)(labels=pair.labels, **pair.inputs)
    assert len(calls) == 4, "features of one batch must not serve the next"
