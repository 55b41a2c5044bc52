"""Steps of a lesson from graphs give the losses and gradients of the lesson as it is, and say where not.

On a CPU a tape stands for a CUDA graph: all but the capture itself is the product's.
"""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate.utils import send_to_device
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from linmu import optimized
from linmu.optimized import engine
from linmu.optimized.graphs import training_step
from linmu.optimized.graphs.decoder import Limits
from linmu.optimized.graphs.training_step import TrainingGraphs
from linmu.optimized.training import Lesson, Objective, attach_teacher
from linmu.reference.training.batch_facts import Facts, WithFacts, ask, placeholders_of
from linmu.reference.training.parameter_groups import MIXER, MLPS, belongs
from linmu.reference.training.safety.memory import leave_inputs_alone, recompute_layers

from ..student import tiny_checkpoint as tiny
from ..student.tape import tape
from ..student.tiny_checkpoint import build_teacher, every_kind, picture, prompt, shake_mixers
from ..student.tiny_families import text_decoder

LIMITS = Limits((8, 12, 16, 24, 32, 48, 64), 8, 512, 2)
OBJECTIVES = {
    "i": Objective(mixer=1.0, inputs="teacher"),
    "ii, teacher's": Objective(mixer=1.0, layer=0.5, inputs="teacher"),
    "ii, student's": Objective(mixer=1.0, layer=0.5),
    "iii": Objective(layer=0.3, logits=1.0, end_to_end=True, temperature=2.0),
}


def lesson_of(teacher: nn.Module, recompute: bool = False, layers: list[int] | None = None) -> Lesson:
    """Its students learn M-MATE and adapters of the MLPs, in float64."""
    student = shake_mixers(optimized.convert(teacher, {"text_window": 4}, layers=layers)).double()
    attach_teacher(student, teacher.double())
    if recompute:
        recompute_layers(student)
    torch.manual_seed(0)
    target = r".*layers\.\d+\.mlp\.(gate_proj|up_proj|down_proj)"
    get_peft_model(student, LoraConfig(r=2, target_modules=target, init_lora_weights=False))
    leave_inputs_alone(student)
    for name, parameter in student.double().named_parameters():
        if ".visual." not in name:
            parameter.requires_grad_(belongs(name, (*MIXER, *MLPS)))
    return Lesson(student.train(), OBJECTIVES["i"])


class Both:
    """One lesson twice, over weights of their own: as it is, and from graphs."""

    def __init__(self, teacher: nn.Module, recompute: bool = False, layers: list[int] | None = None) -> None:
        self.eager, self.fast = (lesson_of(copy.deepcopy(teacher), recompute, layers) for _ in range(2))
        self.fast.graphs = TrainingGraphs(self.fast, LIMITS, lambda: tape)

    def teach(self, *batches: dict[str, Tensor]) -> None:
        """Forward and backward of batches, gradients accumulated; losses and gradients must be the same, but
        for what Hugging Face's norms round to float32."""
        for batch in batches:
            terms = [lesson(**batch) for lesson in (self.eager, self.fast)]
            for each in terms:
                (each["loss"] / len(batches)).backward()
            want, got = ({name: term.detach() for name, term in each.items()} for each in terms)
            torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-12)
        wanted = dict(self.eager.named_parameters())
        for name, parameter in self.fast.named_parameters():
            want = wanted[name].grad
            assert (parameter.grad is None) == (want is None), name
            if want is not None:
                distance, size = float((parameter.grad - want).norm()), float(want.norm())
                assert distance <= 1e-6 * size + 1e-12, (name, distance, size)

    def set(self, objective: Objective) -> None:
        for lesson in (self.eager, self.fast):
            lesson.objective = objective
            lesson.zero_grad()

    def step(self) -> None:
        """What an optimizer does: weights change where they lie."""
        for lesson in (self.eager, self.fast):
            with torch.no_grad():
                for parameter in lesson.parameters():
                    if parameter.grad is not None:
                        parameter.sub_(0.01 * parameter.grad)
            lesson.zero_grad()


def short(layers: int = 1) -> nn.Module:
    """A language model whose tape is short."""
    teacher = text_decoder(llama=True).teacher
    del teacher.model.layers[layers:]
    teacher.config.num_hidden_layers = layers
    return teacher


@pytest.fixture(scope="module")
def text() -> Both:
    return Both(short())


@pytest.fixture(scope="module")
def sees() -> Both:
    return Both(build_teacher())


def words(seed: int, length: int = 11, rows: int = 2, padding: int = 0, packed: bool = False) -> dict:
    """A batch of text: its first row padded, the first tokens not supervised."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 20, (rows, length), generator=draw)
    mask = torch.ones_like(ids)
    mask[0, length - padding :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : 4 + seed % 3] = -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if packed:
        places = torch.arange(length).expand(rows, length)
        begin = 3 + seed % 4
        batch["linmu_sequence"] = (places >= begin).long()
        batch["position_ids"] = torch.where(places < begin, places, places - begin)
    return batch


@pytest.mark.parametrize("stage", ["i", "ii, student's"])
def test_steps_of_text_are_those_of_the_lesson(text, stage):
    text.set(OBJECTIVES[stage])
    before = text.fast.graphs.runs
    for number in range(3):  # the first of a shape runs as it is, the second is captured
        text.teach(words(number))
        text.step()
    assert text.fast.graphs.runs - before == 2


def test_steps_of_a_hybrid_are_those_of_the_lesson():
    """Gradients go through the attention that is kept, of whose padding a graph is told."""
    pair = Both(short(2), layers=[0])
    pair.set(OBJECTIVES["iii"])
    for number in range(2):
        pair.teach(words(number, padding=2))
    assert pair.fast.graphs.runs == 1


@pytest.mark.parametrize("kind", ["padded and packed", "recomputed"])
def test_padded_packed_and_recomputed_steps_accumulate(text, kind):
    """Of shapes that share a graph, and of objectives that follow each other."""
    pair, odd = text, kind == "padded and packed"
    if not odd:
        pair = Both(short(), recompute=True)
    pair.fast.graphs = TrainingGraphs(pair.fast, LIMITS, lambda: tape)
    for place, stage in enumerate(("i", "iii"), start=1):
        pair.set(OBJECTIVES[stage])
        shapes = ((0, 11), (1, 10), (2, 11))
        pair.teach(*(words(seed, length, padding=2 * odd, packed=odd) for seed, length in shapes))
        pair.step()
        assert pair.fast.graphs.runs == 2 * place


@pytest.mark.parametrize("stage", ["ii, teacher's", "iii"])
def test_steps_with_pictures_are_those_of_the_lesson(sees, stage):
    sees.set(OBJECTIVES[stage])
    before = sees.fast.graphs.runs
    inputs = every_kind("right")
    inputs = {name: each.double() if each.is_floating_point() else each for name, each in inputs.items()}
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, :5] = -100
    for _ in range(3):
        sees.teach(inputs | {"labels": labels})
        sees.step()
    assert sees.fast.graphs.runs - before == 2


def packed_pictures(before: int, length: int = 23, rows: int = 2) -> dict[str, Tensor]:
    """Packed rows: an image, text; text of `before` tokens, a video, padding."""
    image, video = picture(tiny.IMAGE, (1, 2, 3)), picture(tiny.VIDEO, (2, 2, 2))
    texts = [tiny.words(count, count) for count in (before, 3, length - 10 - before, before, 2)]
    samples = [[prompt(texts[1], image, seed=before), prompt(texts[2] + texts[0][:-1])]]
    samples.append([prompt(texts[3]), prompt(texts[4], video, seed=before)])
    samples, parts = samples[:rows], []
    for row in samples:
        counts = torch.tensor([sample["input_ids"].shape[1] for sample in row])
        told = {"linmu_sequence": torch.arange(2).repeat_interleave(counts)[None]}
        told["position_ids"] = torch.cat([torch.arange(count) for count in counts])[None]
        for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            told[name] = torch.cat([sample[name] for sample in row], dim=1)
        pad = length - int(counts.sum())
        parts.append({name: nn.functional.pad(tensor, (0, pad)) for name, tensor in told.items()})
    batch = {name: torch.cat([row[name] for row in parts]) for name in parts[0]}
    for sample in (sample for row in samples for sample in row):
        pictures = sample.keys() - batch.keys()  # one of a kind
        batch |= {n: sample[n].double() if sample[n].is_floating_point() else sample[n] for n in pictures}
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    begins = batch["position_ids"] == 0
    return batch | {"labels": labels.masked_fill(begins, -100)}


@pytest.mark.parametrize("stage, length, rows", [("i", 24, 1), ("iii", 23, 2)], ids=["full", "padded"])
def test_packed_rows_with_pictures_are_those_of_the_lesson(sees, stage, length, rows):
    """Where samples begin, and their pictures, is not what it was when the step was captured."""
    sees.set(OBJECTIVES[stage])
    before = sees.fast.graphs.runs
    for begin in (5, 7, 4):
        sees.teach(packed_pictures(begin, length, rows))
        sees.step()
    assert sees.fast.graphs.runs - before == 2


def teach(lesson: Lesson, batch: dict[str, Tensor]) -> Tensor:
    lesson.zero_grad()
    loss = lesson(**batch)["loss"]
    loss.backward()
    return loss


def said(capsys) -> str:
    return capsys.readouterr().err


@pytest.fixture
def fast(text, monkeypatch) -> Lesson:
    """The lesson from graphs, with none captured and nothing said yet."""
    monkeypatch.setattr(engine, "_announced", set())
    text.set(OBJECTIVES["i"])
    text.fast.graphs = TrainingGraphs(text.fast, LIMITS, lambda: tape)
    return text.fast


def test_it_is_said_which_way_steps_run(fast, capsys):
    for number in range(3):
        teach(fast, words(number, 5))
    assert said(capsys).count("training steps run from CUDA graphs, the first of 2 rows of 8") == 1


def hooked(lesson: Lesson):
    return lesson.layers[0].mlp.register_forward_hook(lambda *_: None).remove


def frozen(lesson: Lesson):
    trained = [p for p in lesson.parameters() if p.requires_grad]
    lesson.requires_grad_(False)
    return lambda: [p.requires_grad_(True) for p in trained]


def sharded(lesson: Lesson):
    """Its memory is elsewhere, and asking for its address fails."""
    norm, own = lesson.student.model.norm, lesson.student.model.norm.weight
    norm._parameters["weight"] = type("Sharded", (nn.Parameter,), {"data_ptr": None})(own.detach(), False)
    return lambda: norm._parameters.update(weight=own)


def several(lesson: Lesson):
    before, training_step.processes = training_step.processes, lambda: 2
    return lambda: setattr(training_step, "processes", before)


OBSTACLES = {
    "several processes train together": (several, {}),
    "weights that are sharded or quantised": (sharded, {}),
    "hooks on its modules": (hooked, {}),
    "nothing is trained": (frozen, {}),
    "the arguments inputs_embeds": (None, {"inputs_embeds": torch.zeros(2, 5, 4)}),
    "position_ids without linmu_sequence": (None, {"position_ids": torch.arange(5).expand(2, 5)}),
    "batches without tokens": (None, {"attention_mask": torch.zeros(2, 5, dtype=torch.int64)}),
    "batches beyond 8 rows": (None, words(0, 5, rows=9)),
    "a mask other than": (None, {"attention_mask": torch.ones(2, 1, 5)}),
}


@pytest.mark.parametrize("says", OBSTACLES)
def test_what_graphs_cannot_do_is_said_once(fast, capsys, says):
    prepare, changes = OBSTACLES[says]
    undo = prepare(fast) if prepare else None
    batch = words(0, 5) | changes
    labels = batch.pop("labels")
    for _ in range(3):
        assert fast.graphs(labels, batch) is None
    if undo:
        undo()
    assert said(capsys).count(f"training steps run without CUDA graphs: {says}") == 1


def test_a_step_without_gradients_runs_as_it_is(fast, capsys):
    with torch.no_grad():
        for _ in range(3):
            fast(**words(0, 5))
    assert not fast.graphs.graphs
    assert "steps" not in said(capsys)


def test_other_weights_and_other_trained_ones_need_another_graph(fast, text):
    batch = words(0, 5)
    for change in ("none", "storage", "requires_grad"):
        name, parameter = next((n, p) for n, p in fast.named_parameters() if p.requires_grad)
        if change == "storage":
            parameter.data = parameter.data.clone()
        if change == "requires_grad":
            for lesson in (fast, text.eager):
                lesson.get_parameter(name).requires_grad_(False)
        for _ in range(2):
            text.teach(batch)
            text.step()
        assert len(fast.graphs.graphs) == 1
    for lesson in (fast, text.eager):
        lesson.get_parameter(name).requires_grad_(True)


def test_the_graph_used_longest_ago_makes_room(fast):
    for length in (5, 5, 9, 9, 14, 14):
        teach(fast, words(0, length))
    lengths = [graph.buffers.call["input_ids"].shape[1] for graph in fast.graphs.graphs.values()]
    assert lengths == [12, 16]  # of at most two


def test_a_backward_after_the_next_forward_is_refused(fast):
    for _ in range(2):
        teach(fast, words(0, 5))
    first, _ = fast(**words(0, 5))["loss"], fast(**words(3, 5))["loss"]
    with pytest.raises(RuntimeError, match="backward must come before the next batch's forward"):
        first.backward()


def test_what_cannot_be_captured_says_how_to_turn_graphs_off(fast, monkeypatch):
    monkeypatch.setattr(fast.layers[0].mlp, "forward", lambda x: x * x.sum().item())
    teach(fast, words(0, 5))
    with pytest.raises(RuntimeError, match=r"got RuntimeError: .*waits for the device.*--no_cuda_graphs"):
        teach(fast, words(0, 5))
    monkeypatch.undo()
    assert not fast.layer_outputs[0]
    assert fast.student.get_parameter(next(n for n, _ in fast.student.named_parameters())) is not None


def test_facts_of_a_collated_batch_are_what_its_device_would_say(sees):
    inputs = every_kind("right")
    for kept in (slice(0, 3), slice(1, 2)):  # with pictures, and text alone
        batch = {name: inputs[name][kept] for name in ("input_ids", "attention_mask")}
        batch["labels"] = batch["input_ids"].clone().index_fill(1, torch.tensor([0, 1, 5]), -100)
        collator = WithFacts(lambda items, batch=batch: batch, placeholders_of(sees.fast))
        got = send_to_device(collator([]), "cpu")["facts"]
        masks = sees.fast.token_masks(batch, batch["labels"])
        assert got == ask(masks, batch["attention_mask"], batch["labels"])
        assert ("vision" in got.groups) == (kept.start == 0)
        assert got.has_padding
        assert got.positions == batch["input_ids"].shape[1] - 3


def test_facts_are_believed(fast, monkeypatch):
    monkeypatch.setattr(training_step, "ask", None)
    facts = Facts(("text", "answering"), False, 0)
    for number in range(3):
        assert fast(facts=facts, **words(number, 5))["loss"].isfinite()
    assert fast.graphs.runs == 2
