"""Every wrong argument is a ValueError that says where, which argument, what must hold and what came."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from linmu.reference import LinMUConfig, VisionLayout, WindowState

from ..harness.layouts import Layout, Text, Vision
from ..harness.module_cases import ModuleCase, initial
from ..harness.operator_cases import BidirectionalCase, ConvCase, LossCase, ScanCase, WindowCase
from ..harness.sliding_window_cases import STATE, SlidingWindowCase

LAYOUT = Layout(((Text(1), Vision(0, (1, 1, 3)), Text(1)), (Text(5),)))
SIZES = {"heads": 4, "groups": 2, "state": 3, "head_dim": 6, "dtype": "float32", "seed": 0}
CONFIG = LinMUConfig(width=6, heads=2, groups=1, head_dim=2)

VALID: dict[str, dict[str, Any]] = {
    "selective_scan": ScanCase(2, 5, mask="some", initial_state=True, reverse=False, **SIZES).inputs(),
    "bidirectional_scan": BidirectionalCase(LAYOUT, initial_state=True, skip=True, **SIZES).inputs(),
    "window_attention": WindowCase(2, 5, windows=2, scale=None, **SIZES).inputs(),
    "causal_conv": ConvCase(2, 5, 3, 4, True, "some", True, "float32", 0).inputs(),
    "hidden_loss": LossCase(2, 5, 7, "none", 1.0, "float32", 0).inputs(),
    "scan_order": {"coords": LAYOUT.coords, "layer_index": 1},
    "inverse_order": {"order": torch.tensor([[1, 0]])},
    "window_ids": {"coords": LAYOUT.coords, "window_thw": (2, 2, 2), "shifted": True},
}
VALID["hidden_loss"]["valid"] = torch.ones(2, 5, dtype=torch.bool)
del VALID["hidden_loss"]["mask"]
VALID["logit_loss"] = {**VALID["hidden_loss"], "mask": VALID["hidden_loss"]["valid"], "temperature": 1.0}
del VALID["logit_loss"]["valid"]
VALID["scan_step"] = {
    "state": VALID["selective_scan"]["initial_state"],
    **{name: VALID["selective_scan"][name][:, 0] for name in ("x", "dt", "B", "C")},
    "A": VALID["selective_scan"]["A"],
    "D": torch.ones(4),
    "valid": torch.tensor([True, False]),
}

SLIDING = SlidingWindowCase(
    2, 5, window=3, asks="some", valid="left", packed=True, initial_state=True, scale=None, **SIZES
).inputs()
WINDOW_STATE = WindowState(*(SLIDING.pop(name) for name in STATE))
VALID["sliding_window_attention"] = SLIDING | {"initial_state": WINDOW_STATE}


def half_text() -> torch.Tensor:
    """One token with a segment and no place in it."""
    coords = LAYOUT.coords.clone()
    coords[0, 2, 3] = -1
    return coords


def interleaved() -> torch.Tensor:
    """Tokens of two segments that take turns, in the second row."""
    coords = torch.full((2, 4, 4), -1)
    coords[1] = 0
    coords[1, :, 0] = torch.tensor([0, 1, 0, 1])
    coords[1, 2:, 3] = 1
    return coords


EMPTY_SCAN = {name: VALID["selective_scan"][name][:, :0] for name in ("x", "dt", "B", "C", "mask")}
EMPTY_WINDOW = {name: SLIDING[name][:, :0] for name in ("q", "k", "v", "asks", "valid", "sequence")}
EMPTY_CONV = {name: VALID["causal_conv"][name][:, :0] for name in ("u", "mask")}

# operator, what is changed, and words that the message must hold: the argument (or size) and what came
WRONG: tuple[tuple[str, dict[str, Any], tuple[str, ...]], ...] = (
    ("selective_scan", {"x": torch.randn(2, 5, 6)}, ("x", "B, L, G, P", "(2, 5, 6)")),
    ("selective_scan", {"x": torch.ones(2, 5, 2, 6, dtype=torch.int64)}, ("x", "float", "int64")),
    (
        "selective_scan",
        {"x": torch.randn(2, 5, 3, 6), "B": torch.randn(2, 5, 3, 3)},
        ("multiple of groups", "H=4", "G=3"),
    ),
    ("selective_scan", {"x": [1.0]}, ("x", "tensor", "list")),
    ("selective_scan", {"dt": torch.ones(2, 4, 4)}, ("dt", "B, L, H", "(2, 4, 4)")),
    ("selective_scan", {"dt": torch.ones(2, 5, 2)}, ("dt", "B, L, H", "(2, 5, 2)")),
    ("selective_scan", {"dt": torch.ones(2, 5, 4, dtype=torch.complex64)}, ("dt", "float", "complex64")),
    ("selective_scan", {"A": -torch.ones(2)}, ("A", "(H)", "(2,)")),
    ("selective_scan", {"A": -torch.ones(2, 4)}, ("A", "(H)", "(2, 4)")),
    ("selective_scan", {"B": torch.randn(2, 5, 4, 3)}, ("B", "B, L, G, N", "(2, 5, 4, 3)")),
    ("selective_scan", {"B": torch.randn(2, 5, 2, 5)}, ("B", "B, L, G, N", "(2, 5, 2, 5)")),
    ("selective_scan", {"C": torch.randn(2, 6, 4, 3)}, ("C", "B, L, H, N", "(2, 6, 4, 3)")),
    ("selective_scan", {"C": torch.randn(1, 5, 4, 3)}, ("C", "B, L, H, N", "(1, 5, 4, 3)")),
    ("selective_scan", {"mask": torch.ones(2, 4, dtype=torch.bool)}, ("mask", "B, L", "(2, 4)")),
    ("selective_scan", {"mask": torch.ones(2, 5)}, ("mask", "bool", "float32")),
    ("selective_scan", {"mask": torch.ones(2, 5, dtype=torch.bool, device="meta")}, ("device", "meta")),
    (
        "selective_scan",
        {"initial_state": torch.randn(2, 4, 6, 3)},
        ("initial_state", "B, H, N, P", "(2, 4, 6, 3)"),
    ),
    ("selective_scan", {"initial_state": torch.randn(2, 2, 3, 6)}, ("initial_state", "(2, 2, 3, 6)")),
    ("selective_scan", {"sequence": torch.zeros(2, 5)}, ("sequence", "int64", "float32")),
    ("selective_scan", {"sequence": torch.zeros(2, 4, dtype=torch.int64)}, ("sequence", "B, L", "(2, 4)")),
    ("selective_scan", EMPTY_SCAN, ("L", "at least 1", "0")),
    ("bidirectional_scan", {"sequence": torch.zeros(2, 5)}, ("sequence", "int64", "float32")),
    (
        "bidirectional_scan",
        {"sequence": torch.zeros(2, 4, dtype=torch.int64)},
        ("sequence", "B, L", "(2, 4)"),
    ),
    ("causal_conv", {"sequence": torch.zeros(2, 5)}, ("sequence", "int64", "float32")),
    ("causal_conv", {"sequence": torch.zeros(2, 4, dtype=torch.int64)}, ("sequence", "B, L", "(2, 4)")),
    ("bidirectional_scan", {"gate": torch.ones(2, 5, 1)}, ("gate", "B, L, H", "(2, 5, 1)")),
    ("bidirectional_scan", {"gate": None}, ("gate", "tensor")),
    ("bidirectional_scan", {"segment": LAYOUT.segment.int()}, ("segment", "int64", "int32")),
    ("bidirectional_scan", {"segment": LAYOUT.segment[:, :4]}, ("segment", "B, L", "(2, 4)")),
    ("bidirectional_scan", {"valid": torch.ones(2, 5)}, ("valid", "bool", "float32")),
    ("bidirectional_scan", {"valid": torch.ones(5, dtype=torch.bool)}, ("valid", "B, L", "(5,)")),
    ("bidirectional_scan", {"D": torch.ones(6)}, ("D", "(H)", "(6,)")),
    ("bidirectional_scan", {"dt": torch.ones(2, 5, 2)}, ("dt", "B, L, H", "(2, 5, 2)")),
    (
        "bidirectional_scan",
        {"initial_state": torch.ones(2, 4, 3)},
        ("initial_state", "B, H, N, P", "(2, 4, 3)"),
    ),
    ("scan_step", {"state": torch.ones(2, 4, 3, 3)}, ("state", "B, H, N, P", "(2, 4, 3, 3)")),
    ("scan_step", {"x": torch.ones(2, 1, 2, 6)}, ("x", "B, G, P", "(2, 1, 2, 6)")),
    (
        "scan_step",
        {"x": torch.randn(2, 3, 6), "B": torch.randn(2, 3, 3)},
        ("multiple of groups", "H=4", "G=3"),
    ),
    ("scan_step", {"dt": torch.ones(2, 2)}, ("dt", "(2, 2)")),
    ("scan_step", {"C": torch.ones(2, 4)}, ("C", "B, H, N", "(2, 4)")),
    ("scan_step", {"valid": torch.ones(2, 1, dtype=torch.bool)}, ("valid", "(2, 1)")),
    ("scan_step", {"D": torch.ones(2)}, ("D", "(H)", "(2,)")),
    ("window_attention", {"q": torch.randn(2, 5, 12)}, ("q", "B, L, H, N", "(2, 5, 12)")),
    ("window_attention", {"k": torch.randn(2, 5, 2, 4)}, ("k", "B, L, G, N", "(2, 5, 2, 4)")),
    (
        "window_attention",
        {"k": torch.randn(2, 5, 3, 3), "v": torch.randn(2, 5, 3, 6)},
        ("multiple of groups", "H=4", "G=3"),
    ),
    ("window_attention", {"v": torch.randn(2, 5, 4, 6)}, ("v", "B, L, G, P", "(2, 5, 4, 6)")),
    ("window_attention", {"v": torch.ones(2, 5, 2, 6).int()}, ("v", "float", "int32")),
    ("window_attention", {"window_id": torch.zeros(2, 5)}, ("window_id", "int64", "float32")),
    ("window_attention", {"window_id": torch.zeros(5, dtype=torch.int64)}, ("window_id", "B, L", "(5,)")),
    ("sliding_window_attention", {"q": torch.randn(2, 5, 12)}, ("q", "B, L, H, N", "(2, 5, 12)")),
    ("sliding_window_attention", {"k": torch.randn(2, 5, 2, 4)}, ("k", "B, L, G, N", "(2, 5, 2, 4)")),
    ("sliding_window_attention", {"v": torch.randn(2, 5, 4, 6)}, ("v", "B, L, G, P", "(2, 5, 4, 6)")),
    ("sliding_window_attention", {"v": torch.ones(2, 5, 2, 6).int()}, ("v", "float", "int32")),
    (
        "sliding_window_attention",
        {"k": torch.randn(2, 5, 3, 3), "v": torch.randn(2, 5, 3, 6), "initial_state": None},
        ("multiple of groups", "H=4", "G=3"),
    ),
    ("sliding_window_attention", EMPTY_WINDOW, ("L", "at least 1", "0")),
    ("sliding_window_attention", {"window": 0}, ("window", "at least 1", "0")),
    ("sliding_window_attention", {"window": 2.5}, ("window", "int", "2.5")),
    ("sliding_window_attention", {"asks": torch.ones(2, 4).bool()}, ("asks", "B, L", "(2, 4)")),
    ("sliding_window_attention", {"valid": torch.ones(2, 5)}, ("valid", "bool", "float32")),
    ("sliding_window_attention", {"sequence": torch.ones(2, 5).int()}, ("sequence", "int64", "int32")),
    ("sliding_window_attention", {"initial_state": (1, 2, 3)}, ("initial_state", "WindowState", "tuple")),
    ("sliding_window_attention", {"window": 4}, ("initial_state.k", "B, W-1, G, N", "(2, 2, 2, 3)")),
    (
        "sliding_window_attention",
        {"initial_state": WINDOW_STATE._replace(present=torch.ones(2, 2))},
        ("initial_state.present", "bool", "float32"),
    ),
    (
        "sliding_window_attention",
        {"initial_state": WINDOW_STATE._replace(present=None)},
        ("initial_state.present", "B, W-1", "None"),
    ),
    ("causal_conv", {"u": torch.randn(5, 3)}, ("u", "B, L, channels", "(5, 3)")),
    ("causal_conv", {"weight": torch.randn(4, 4)}, ("weight", "channels, K", "(4, 4)")),
    ("causal_conv", {"weight": torch.randn(3, 1, 4)}, ("weight", "channels, K", "(3, 1, 4)")),
    ("causal_conv", {"weight": torch.randn(3, 0)}, ("weight", "at least one tap", "0")),
    ("causal_conv", {"bias": torch.randn(4)}, ("bias", "channels", "(4,)")),
    ("causal_conv", {"mask": torch.ones(2, 5).int()}, ("mask", "bool", "int32")),
    (
        "causal_conv",
        {"initial_state": torch.randn(2, 4, 3)},
        ("initial_state", "B, K-1, channels", "(2, 4, 3)"),
    ),
    ("causal_conv", EMPTY_CONV, ("L", "at least 1", "0")),
    ("scan_order", {"coords": LAYOUT.coords.float()}, ("coords", "int64", "float32")),
    ("scan_order", {"coords": LAYOUT.coords[..., :3]}, ("coords", "B, L, 4", "(2, 5, 3)")),
    ("scan_order", {"coords": half_text()}, ("coords", "-1", "[0, 0, 0, -1]")),
    ("scan_order", {"coords": interleaved()}, ("interleave", "segment 1", "segment 0")),
    ("scan_order", {"layer_index": -1}, ("layer_index", "-1")),
    ("inverse_order", {"order": torch.ones(1, 2)}, ("order", "int64", "float32")),
    ("inverse_order", {"order": torch.tensor([1, 0])}, ("order", "B, L", "(2,)")),
    ("window_ids", {"coords": interleaved()}, ("interleave", "segment 1", "segment 0")),
    ("window_ids", {"window_thw": (2, 0, 2)}, ("window_thw", "(2, 0, 2)")),
    ("window_ids", {"window_thw": (2, 2)}, ("window_thw", "(2, 2)")),
    ("hidden_loss", {"student": torch.ones(5, 7)}, ("student", "B, L, D", "(5, 7)")),
    ("hidden_loss", {"teacher": torch.ones(2, 5, 8)}, ("teacher", "B, L, D", "(2, 5, 8)")),
    ("hidden_loss", {"valid": torch.ones(2, 5)}, ("valid", "bool", "float32")),
    ("logit_loss", {"teacher": torch.ones(2, 5, 8)}, ("teacher", "B, L, V", "(2, 5, 8)")),
    ("logit_loss", {"mask": torch.ones(2, 4, dtype=torch.bool)}, ("mask", "B, L", "(2, 4)")),
    ("logit_loss", {"temperature": 0.0}, ("temperature", "positive", "0.0")),
    ("logit_loss", {"student": torch.ones(2, 5, 7).int()}, ("student", "float", "int32")),
)


def described(wrong: tuple[str, dict[str, Any], tuple[str, ...]]) -> str:
    """A test id: the operator, the argument that is wrong, and what is wrong about it."""
    operator, changes, words = wrong
    return re.sub(r"[^\w.+-]+", "_", f"{operator}-{'+'.join(changes)}-{words[-1]}").strip("_")


def assert_says(call: Callable[[], Any], where: str, words: tuple[str, ...]) -> None:
    """The call raises `where: ... must ..., got ...` with all words in it."""
    with pytest.raises(ValueError) as raised:
        call()
    message = str(raised.value)
    assert re.fullmatch(rf"{where}: .*\bmust\b.*, got .*", message, flags=re.DOTALL), f"form of: {message}"
    for word in words:
        assert word in message, f"{word!r} must be in: {message}"


def rows_of_wrong() -> list:
    """One parameter per row of WRONG, marked with the operator that it needs."""
    return [pytest.param(*wrong, id=described(wrong), marks=pytest.mark.needs(wrong[0])) for wrong in WRONG]


@pytest.mark.parametrize(("operator", "changes", "words"), rows_of_wrong())
def test_a_wrong_argument_is_named(backend, operator, changes, words):
    """Shape, dtype, type or value: the message holds the argument, its letters, and what came."""
    call = getattr(backend, operator)
    assert_says(lambda: call(**{**VALID[operator], **changes}), operator, words)


@pytest.mark.parametrize("operator", [pytest.param(name, marks=pytest.mark.needs(name)) for name in VALID])
def test_right_arguments_are_accepted(backend, operator):
    """What the rows above change is valid before the change."""
    getattr(backend, operator)(**VALID[operator])


def tensors_of(given: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Every tensor among the arguments, those of a state as argument.field."""
    found = {}
    for name, value in given.items():
        parts = (
            {f"{name}.{field}": part for field, part in value._asdict().items()}
            if isinstance(value, WindowState)
            else {}
        )
        found |= parts or ({name: value} if isinstance(value, torch.Tensor) else {})
    return found


def with_other(given: dict[str, Any], name: str, tensor: torch.Tensor) -> dict[str, Any]:
    """The arguments with another tensor of `tensors_of`."""
    argument, _, field = name.partition(".")
    return given | {argument: given[argument]._replace(**{field: tensor}) if field else tensor}


ONE_TENSOR = ("scan_order", "inverse_order", "window_ids")  # which has its device from nowhere else


@pytest.mark.parametrize("operator", [pytest.param(name, marks=pytest.mark.needs(name)) for name in VALID])
def test_every_argument_is_checked(backend, operator):
    """For its kind of number, its number of axes, and its device."""
    given, call = VALID[operator], getattr(backend, operator)
    for name, tensor in tensors_of(given).items():
        kind, longer = torch.int64 if tensor.is_floating_point() else torch.float32, tensor[..., None]
        wrong = {
            (name, str(kind).removeprefix("torch.")): tensor.to(kind),
            (name, str(tuple(longer.shape))): longer,
        }
        if operator not in ONE_TENSOR:
            wrong["device", "meta"] = tensor.to("meta")
        for words, other in wrong.items():
            changed = with_other(given, name, other)
            assert_says(lambda changed=changed: call(**changed), operator, words)


OF_ANY_SIZE = {("window_attention", "v", 3)}


@pytest.mark.parametrize(
    "operator",
    [pytest.param(name, marks=pytest.mark.needs(name)) for name in VALID if name not in ONE_TENSOR],
)
def test_every_size_is_checked(backend, operator):
    """An argument that is one longer along any axis fits the others no more."""
    given, call = VALID[operator], getattr(backend, operator)
    for name, tensor in tensors_of(given).items():
        for axis in range(tensor.ndim):
            if (operator, name, axis) not in OF_ANY_SIZE:
                longer = torch.cat([tensor, tensor.narrow(axis, 0, 1)], dim=axis)
                changed = with_other(given, name, longer)
                assert_says(lambda changed=changed: call(**changed), operator, ())


WRONG_INPUTS = (
    ({"hidden_states": torch.ones(2, 5, 7)}, ("hidden_states", "B, L, D", "(2, 5, 7)")),
    ({"hidden_states": torch.ones(5, 6)}, ("hidden_states", "B, L, D", "(5, 6)")),
    ({"layout": VisionLayout(LAYOUT.only(0).coords)}, ("layout", "(B, L)", "(1, 5)")),
    ({"valid": torch.ones(2, 5)}, ("valid", "bool", "float32")),
    ({"valid": torch.ones(2, 4, dtype=torch.bool)}, ("valid", "B, L", "(2, 4)")),
    ({"layout": None, "sequence": torch.ones(2, 5)}, ("sequence", "int64", "float32")),
    ({"layout": None, "sequence": torch.ones(2, 4).long()}, ("sequence", "B, L", "(2, 4)")),
    ({"sequence": torch.ones(2, 5).long()}, ("sequence", "layout")),
)
WRONG_ANGLES = {
    "shorter": (torch.ones(2, 4, 2), "(2, 4, 2)"),
    "longer": (torch.ones(2, 6, 2), "(2, 6, 2)"),
    "half as wide": (torch.ones(2, 5, 1), "(2, 5, 1)"),
    "twice as wide": (torch.ones(2, 5, 4), "(2, 5, 4)"),
    "without rows": (torch.ones(5, 2), "(5, 2)"),
}


@pytest.mark.parametrize(("changes", "words"), WRONG_INPUTS)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.needs(n)) for n in ("FlexMA", "LocalSwin")]
)
def test_a_wrong_input_of_a_module_is_named(backend, name, changes, words):
    """The branches check what they are given before they compute."""
    case = ModuleCase(LAYOUT, CONFIG, 0, "float32", 0)
    given = {"hidden_states": case.hidden_states(), **case.arguments(name), **changes}
    assert_says(lambda: initial(backend, name, case)(**given), name, words)


@pytest.mark.parametrize("which", ("cos", "sin"))
@pytest.mark.parametrize("angles", WRONG_ANGLES)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.needs(n)) for n in ("FlexMA", "LocalSwin", "MMATE")]
)
def test_angles_of_another_shape_are_refused(backend, name, angles, which):
    """Rotary angles that would broadcast, or be cut, turn heads by those of other tokens."""
    config = replace(CONFIG, scan_rope=True, text_window=3)
    case, (tensor, shape) = ModuleCase(LAYOUT, config, 0, "float32", 0), WRONG_ANGLES[angles]
    given = {"hidden_states": case.hidden_states(), **case.arguments(name)}
    given["position_embeddings"] = tuple(
        tensor if part == which else right
        for part, right in zip(("cos", "sin"), given["position_embeddings"], strict=True)
    )
    with pytest.raises(ValueError, match=rf"\b{which} must .*{re.escape(shape)}"):
        initial(backend, name, case)(**given)
