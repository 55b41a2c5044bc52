"""The benchmark of a prompt on several GPUs, by two gloo processes on CPUs."""

from __future__ import annotations

import json

import pytest
import torch

from linmu.optimized.benchmarks.context_parallel import main, prompt

from ..ranks import run_ranks

QUICK = "--quick --prefill 80 --kinds video text --layers 1 --step 80 --step_layers 1"


def test_it_measures_a_prefill_and_a_step_of_one_process_and_of_two_and_compares_them(tmp_path):
    run_ranks(2, tmp_path, main, [*QUICK.split(), "--output", str(tmp_path / "found")])
    found = json.loads((tmp_path / "found" / "results.json").read_text())
    assert {"device", "commit", "date", "torch", "triton", "backend"} <= found["environment"].keys()
    places = [(line["part"], line["kind"], line["ranks"]) for line in found["lines"]]
    works = [("prefill", "video"), ("prefill", "text"), ("step", "video")]
    assert places == [(*work, ranks) for work in works for ranks in (1, 2)]
    for one, two in zip(found["lines"][::2], found["lines"][1::2], strict=True):
        assert two["speedup"] == one["seconds"] / two["seconds"] > 0
        off = {name: value for name, value in two.items() if name.endswith("_off")}
        assert len(off) == 2 and max(off.values()) < 1e-3, off
    table = (tmp_path / "found" / "README.md").read_text()
    assert f"| {found['lines'][1]['speedup']:.2f} | logits " in table


@pytest.mark.parametrize(
    ("rank", "flags", "message"),
    [
        ({}, "--quick", "torchrun must start it, got one process"),
        ({"LOCAL_RANK": "0"}, "", "a CUDA GPU a process must be there, got none; add --quick"),
        ({"LOCAL_RANK": "0"}, "--quick --kinds film", "invalid choice: 'film'"),
    ],
)
def test_what_cannot_run_is_refused(monkeypatch, capsys, rank, flags, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for name, value in rank.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        main(flags.split())
    assert message in capsys.readouterr().err


def test_a_video_has_a_frame_at_least():
    with pytest.raises(ValueError, match="at least 80 tokens, got 79"):
        prompt("video", 79, (4, 4), torch.device("cpu"))
    coords = prompt("video", 100, (4, 4), torch.device("cpu"))["linmu_coords"]
    assert (coords[0, :, 0] >= 0).nonzero().flatten().tolist() == list(range(32, 64))
    assert coords[0, 63].tolist() == [0, 1, 3, 3]
