"""The grids of every family: written out by hand, and found again by painting on the pictures themselves."""

from __future__ import annotations

import inspect

import pytest
import torch
from PIL import ImageChops
from torch import Tensor

from linmu.reference.prompts.grids import Placement, placement_coords
from linmu.reference.prompts.layouts import PromptLayout
from linmu.reference.prompts.llava_onevision_layout import LlavaOnevisionPromptLayout
from linmu.reference.student.families import FAMILIES

from .tiny_families import BUILDERS, QWEN, Tiny

VISION = [name for name in BUILDERS if name not in ("qwen2", "llama")]


@pytest.fixture(scope="module", params=VISION)
def tiny(request) -> Tiny:
    return BUILDERS[request.param]()


def prompt_layout_of(tiny: Tiny) -> PromptLayout:
    return FAMILIES[type(tiny.teacher)].prompt_layout


def segments(tiny: Tiny, inputs: dict[str, Tensor], row: int = 0) -> list[list[tuple[int, ...]]]:
    """The cells of each segment of a row, in the order of the prompt."""
    found = prompt_layout_of(tiny).placements(tiny.teacher.config, inputs["input_ids"], inputs)
    return [[tuple(cell) for cell in p.coordinates.tolist()] for p in found if p.row == row]


def box(frames: int, height: int, width: int) -> list[tuple[int, ...]]:
    """The cells of a grid, row by row."""
    return [(t, y, x) for t in range(frames) for y in range(height) for x in range(width)]


def mosaic(rows: int, columns: int, side: int) -> list[tuple[int, ...]]:
    """The cells of tiles side by side, tile by tile."""
    cells = [(0, tile // columns, tile % columns) for tile in range(rows * columns)]
    return [(0, y * side + i, x * side + j) for _, y, x in cells for _, i, j in box(1, side, side)]


GRIDS = {
    **{key: {"wide": [box(1, 2, 4)], "tall": [box(1, 5, 2)], "video": [box(3, 2, 3)]} for key in QWEN},
    "llava_onevision": {  # of 6·9 tokens 4·9 are no padding; 9·9 are more than 1.1² · 5 tiles, so they shrink
        "wide": [box(1, 3, 3), box(1, 4, 9)],
        "tall": [box(1, 3, 3), box(1, 9, 3)],
        "large": [box(1, 3, 3), box(1, 6, 6)],
        "video": [box(3, 2, 2)],
    },
    "internvl": {"wide": [box(1, 3, 3)] * 3, "tall": [box(1, 3, 3)] * 3, "video": [box(1, 3, 3)] * 3},
    "idefics3": {
        "wide": [mosaic(2, 3, 2), box(1, 2, 2)],
        "tall": [mosaic(3, 1, 2), box(1, 2, 2)],
    },
    "smolvlm": {
        "wide": [mosaic(2, 3, 2), box(1, 2, 2)],
        "tall": [mosaic(3, 1, 2), box(1, 2, 2)],
    },
}


def test_each_picture_has_the_grid_that_is_written_here(tiny):
    for name, wanted in GRIDS[tiny.name].items():
        inputs = tiny.video(3) if name == "video" else tiny.inputs(f"a {{{name}}} b")
        assert segments(tiny, inputs) == wanted, name


PIXELS_PER_TOKEN = {"llava_onevision": 4}  # 8 in the other families
DETAIL = {"llava_onevision": 1}  # the segment that shows the cell best, 0 in the others


@torch.no_grad()
def features(tiny: Tiny, inputs: dict[str, Tensor]) -> Tensor:
    """What the vision tower puts in the place of each placeholder, in order: (tokens, width)."""
    encode = tiny.teacher.get_image_features
    wanted = inspect.signature(encode).parameters
    given = {name: value for name, value in inputs.items() if name in wanted}
    found = encode(**given, return_dict=True).pooler_output
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in found])


@pytest.mark.parametrize("cell", [(0, 0), (1, 1), (2, 0), (2, 1)])
def test_what_is_painted_on_a_cell_is_seen_by_the_token_of_that_cell(tiny, cell):
    picture, size = tiny.picture("tall", 0), PIXELS_PER_TOKEN.get(tiny.name, 8)
    corner = (cell[1] * size, cell[0] * size)
    area = (*corner, corner[0] + size, corner[1] + size)
    painted = picture.copy()
    painted.paste(ImageChops.invert(picture.crop(area)), corner)
    before, after = (tiny.inputs("{tall}", given=image) for image in (picture, painted))
    change = (features(tiny, after) - features(tiny, before)).norm(dim=-1)
    ids = before["input_ids"]
    placements = prompt_layout_of(tiny).placements(tiny.teacher.config, ids, before)
    coords = placement_coords(placements, ids.shape, ids.device)[0]
    coords = coords[ids[0] == tiny.teacher.config.image_token_id]  # (tokens, 4)
    detail = DETAIL.get(tiny.name, 0)
    change = change.where(coords[:, 0] == detail, 0)
    assert coords[change.argmax()].tolist() == [detail, 0, *cell]


def test_a_prompt_that_lacks_a_token_is_refused(tiny):
    inputs = tiny.inputs("a {tall} b")
    ids = inputs["input_ids"]
    last = int((ids[0] == tiny.teacher.config.image_token_id).nonzero()[-1])
    shorter = torch.cat([ids[:, :last], ids[:, last + 1 :]], dim=1)
    with pytest.raises(
        ValueError, match=r"assign_placeholders: (a span must be whole|every run of image tokens)"
    ):
        prompt_layout_of(tiny).placements(tiny.teacher.config, shorter, inputs)


@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
def test_tiles_in_rows_of_unequal_length_are_refused(name):
    tiny = BUILDERS[name]()
    inputs = tiny.inputs("a {wide} b")
    ids = inputs["input_ids"]
    marker = tiny.processor.tokenizer.convert_tokens_to_ids("<row_1_col_2>")
    at = int((ids[0] == marker).nonzero()[0])
    broken = torch.cat([ids[:, : at - 1], ids[:, :1], ids[:, at - 1 :]], dim=1)  # a letter between two tiles
    with pytest.raises(ValueError, match=r"rows of equal length.*got rows of \[1, 2, 3\]; pass linmu_coords"):
        prompt_layout_of(tiny).placements(tiny.teacher.config, broken, inputs)


@pytest.mark.parametrize(
    ("counts", "past", "wanted"),
    [
        ([1, 1], 4, [1]),
        ([2], 4, [2]),
        ([1, 2], 4, [2]),
        ([3], 0, [3]),
        ([2, 1], 8, None),
        ([2, 1], 4, "error"),
    ],
)
def test_an_image_stays_alone_or_one_of_several_when_others_are_dropped(counts, past, wanted):
    """LLaVA-OneVision shows an image that is alone in full; `batch_num_images` must go on to say which is."""
    total = sum(counts)
    cells = torch.zeros(1, 3, dtype=torch.int64)
    placements = [Placement(0, "image", n, torch.tensor([4 * n]), cells) for n in range(total)]
    inputs = {"pixel_values": torch.arange(total), "image_sizes": torch.ones(total, 2)}
    inputs["batch_num_images"] = torch.tensor(counts)
    layout = LlavaOnevisionPromptLayout()
    if wanted == "error":
        with pytest.raises(ValueError, match="one of several must come last, or be several, got"):
            layout.drop_cached(None, placements, past, inputs)
        return
    layout.drop_cached(None, placements, past, inputs)
    assert inputs["pixel_values"].tolist() == list(range(past // 4, total))
    kept = inputs.get("batch_num_images")
    assert (None if kept is None else kept.tolist()) == (None if wanted == [1] else wanted)
