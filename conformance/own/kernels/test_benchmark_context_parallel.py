"""The benchmark of a prompt on several GPUs, by two gloo processes on CPUs."""

from __future__ import annotations

import json

from linmu.optimized.benchmarks.context_parallel import main

from ..ranks import run_ranks

QUICK = "--quick --prefill 80 --kinds video,text --layers 1 --step 80 --step_layers 1"


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
