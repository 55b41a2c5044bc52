"""Which engine of linmu.optimized runs: said once, forced where asked, refused where it cannot."""

from __future__ import annotations

import pytest
import torch

from linmu import optimized
from linmu.optimized import engine


@pytest.fixture(autouse=True)
def nothing_said_or_forced(monkeypatch):
    monkeypatch.setattr(engine, "_announced", set())
    monkeypatch.setattr(engine, "_forced", None)
    monkeypatch.delenv("LINMU_ENGINE", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def scan():
    x, dt, A = torch.randn(1, 5, 1, 2), torch.rand(1, 5, 1), -torch.rand(1)
    return optimized.selective_scan(x, dt, A, x, x)


def test_the_engine_is_said_once_with_its_reason(capsys):
    scan()
    scan()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("linmu.optimized: torch engine from scan on (")
    assert "TRITON_INTERPRET" in said[0]


@pytest.mark.parametrize("how", ["set_engine", "environment"])
def test_a_forced_engine_that_cannot_run_is_an_error_that_says_why(how, monkeypatch):
    if how == "environment":
        monkeypatch.setenv("LINMU_ENGINE", "triton")
    else:
        optimized.set_engine("triton")
    with pytest.raises(RuntimeError, match="triton engine is forced and must be able to run, got: the"):
        scan()


def test_an_unknown_engine_is_refused_by_name(monkeypatch):
    with pytest.raises(ValueError, match="set_engine: the engine must be one of triton, torch, got 'cuda'"):
        optimized.set_engine("cuda")
    monkeypatch.setenv("LINMU_ENGINE", "fast")
    with pytest.raises(ValueError, match="LINMU_ENGINE: the engine must be one of triton, torch, got 'fast'"):
        scan()


def test_float16_scans_say_that_they_take_the_float32_kernels(capsys):
    scan_tiles = pytest.importorskip("linmu.optimized.scan.kernels.tiles", reason="triton is for Linux only")
    kinds = [scan_tiles.token_dtype(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float16)]
    assert kinds == [torch.bfloat16, torch.float32, torch.float32]
    said = capsys.readouterr().err.splitlines()
    assert said == ["linmu.optimized: float16 scans run on the float32 kernels"]
