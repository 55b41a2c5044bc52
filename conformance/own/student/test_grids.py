"""Placeholders and grids become coordinates, and whatever does not fit is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from linmu.reference.prompts.grids import (
    assign_placeholders,
    cuts_a_span,
    grid_coordinates,
    placement_coords,
    with_newlines,
)
from linmu.reference.prompts.qwen_layout import Qwen2PromptLayout, Qwen3PromptLayout

TEXT, IMAGE, VIDEO = 0, 1, 2
CONFIG = SimpleNamespace(
    image_token_id=IMAGE, video_token_id=VIDEO, vision_config=SimpleNamespace(spatial_merge_size=2)
)


def find(rows: list[list[int]], images: list[list[int]] | None = None, videos: list[list[int]] | None = None):
    inputs = {"image_grid_thw": images, "video_grid_thw": videos}
    return Qwen2PromptLayout().placements(CONFIG, torch.tensor(rows), inputs)


def coords(rows: list[list[int]], *grids) -> Tensor:
    ids = torch.tensor(rows)
    return placement_coords(find(rows, *grids), ids.shape, ids.device)


def test_tokens_of_a_grid_are_numbered_row_by_row():
    found = coords([[TEXT, *[VIDEO] * 8, TEXT]], None, [[2, 4, 4]])
    cells = [[0, t, y, x] for t in (0, 1) for y in (0, 1) for x in (0, 1)]
    assert found.tolist() == [[[-1] * 4, *cells, [-1] * 4]]


def test_grids_are_taken_in_the_order_of_the_batch_and_segments_count_per_row():
    rows = [[IMAGE, TEXT, IMAGE, IMAGE, TEXT], [TEXT, VIDEO, TEXT, IMAGE, IMAGE]]
    found = find(rows, [[1, 2, 2], [1, 2, 4], [1, 4, 2]], [[1, 2, 2]])
    assert [(p.row, p.start, p.modality, p.item, p.coordinates.tolist()) for p in found] == [
        (0, 0, "image", 0, [[0, 0, 0]]),
        (0, 2, "image", 1, [[0, 0, 0], [0, 0, 1]]),
        (1, 3, "image", 2, [[0, 0, 0], [0, 1, 0]]),
        (1, 1, "video", 0, [[0, 0, 0]]),
    ]
    assert coords(rows, [[1, 2, 2], [1, 2, 4], [1, 4, 2]], [[1, 2, 2]])[..., 0].tolist() == [
        [0, -1, 1, 1, -1],
        [-1, 0, -1, 1, 1],
    ]


def test_images_without_text_between_them_are_told_apart():
    assert coords([[IMAGE, IMAGE, IMAGE]], [[1, 2, 2], [1, 2, 4]])[0, :, 0].tolist() == [0, 1, 1]


def test_an_image_next_to_a_video_is_told_apart():
    assert coords([[VIDEO, IMAGE, IMAGE]], [[1, 4, 2]], [[1, 2, 2]])[0, :, 0].tolist() == [0, 1, 1]


def test_text_alone_has_no_placement():
    assert find([[TEXT, TEXT]]) == []


@pytest.mark.parametrize(
    ("row", "images", "message"),
    [
        (
            [IMAGE, IMAGE, TEXT],
            [[1, 4, 4]],
            "image 0 needs 4 image tokens, got 2 from position 0 of row 0",
        ),
        ([IMAGE, IMAGE, TEXT], [[1, 2, 2]], "every run of image tokens must have a grid, got none left"),
        ([IMAGE, TEXT], None, "pass the images, or linmu_coords"),
        (
            [IMAGE, TEXT],
            [[1, 2, 2], [1, 2, 2]],
            "every image grid must have its placeholder tokens.*1 grids too",
        ),
        ([IMAGE, TEXT], [[1, 1, 2]], "a span must be whole"),
    ],
    ids=["cut", "too few grids", "no grids", "too many grids", "an empty grid"],
)
def test_placeholders_and_grids_that_do_not_fit_are_refused(row, images, message):
    with pytest.raises(ValueError, match=message):
        find([row], images)


def test_a_split_cuts_a_span_only_between_its_tokens():
    found = coords([[TEXT, IMAGE, IMAGE, TEXT, VIDEO], [TEXT] * 5], [[1, 2, 4]], [[1, 2, 2]])
    assert [position for position in range(6) if cuts_a_span(found, position)] == [2]
    found[0, 3] = torch.tensor([1, 1, 0, 0])  # a second frame of the video, before a newline token
    found[0, 4] = -1
    found[0, 0] = torch.tensor([1, 0, 0, 0])
    assert [position for position in range(6) if cuts_a_span(found, position)] == [1, 2, 3]


def test_frames_apart_are_one_video_where_the_family_says_so():
    row = [[TEXT, VIDEO, VIDEO, TEXT, VIDEO, VIDEO, TEXT]]
    inputs = {"video_grid_thw": [[2, 2, 4]]}
    placements = Qwen3PromptLayout().placements(CONFIG, torch.tensor(row), inputs)
    found = placement_coords(placements, (1, 7), torch.device("cpu"))[0].tolist()
    frame = [[[0, t, 0, 0], [0, t, 0, 1]] for t in (0, 1)]
    assert found == [[-1] * 4, *frame[0], [-1] * 4, *frame[1], [-1] * 4]
    with pytest.raises(ValueError, match="a span must be whole: video 0 needs 4 video tokens, got 2"):
        Qwen2PromptLayout().placements(CONFIG, torch.tensor(row), inputs)


def test_newlines_are_placeholders_without_a_cell():
    line = with_newlines(grid_coordinates(1, 2, 2), 2)
    assert line.tolist() == [[0, 0, 0], [0, 0, 1], [-1] * 3, [0, 1, 0], [0, 1, 1], [-1] * 3]
    (placement,) = assign_placeholders(torch.tensor([[TEXT, *[IMAGE] * 6]]), IMAGE, "image", [[line]])
    assert placement.positions.tolist() == [1, 2, 4, 5]
