"""Which versions of vLLM the plugin takes; vLLM itself is not needed."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from linmu.optimized.serving import vllm_plugin


@pytest.fixture
def registered(monkeypatch):
    """Return a function from a version to the names that are registered under it."""
    found: dict[str, str] = {}
    backends = SimpleNamespace(MambaAttentionBackendEnum=SimpleNamespace(CUSTOM=0), register_backend=None)
    stand_ins = {
        "vllm": SimpleNamespace(ModelRegistry=SimpleNamespace(register_model=found.__setitem__)),
        "vllm.model_executor.models.config": SimpleNamespace(MODELS_CONFIG_MAP={}),
        "vllm.v1.attention.backends.registry": backends,
        f"{vllm_plugin.__name__}.settings": SimpleNamespace(StudentSettings=None),
    }
    for name, module in stand_ins.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(backends, "register_backend", lambda *args, **kwargs: None)

    def register(version: str) -> list[str]:
        monkeypatch.setattr(vllm_plugin, "version", lambda name: version)
        vllm_plugin.register()
        return list(found)

    return register


def test_a_tested_version_is_taken(registered):
    assert registered("0.32.1") == list(vllm_plugin.MODELS)


@pytest.mark.parametrize(
    ("version", "reason"), [("0.25.0", "it was not tried"), ("0.26.0", "frames per second")]
)
def test_a_version_that_was_tried_in_part_is_taken_with_a_warning(registered, version, reason):
    with pytest.warns(RuntimeWarning, match=reason):
        assert registered(version) == list(vllm_plugin.MODELS)


@pytest.mark.parametrize("version", ["0.27.1", "0.33.0"])
def test_other_versions_are_left_alone(registered, version):
    with pytest.warns(RuntimeWarning, match="none are served"):
        assert registered(version) == []
