"""From a GGUF file to a Hugging Face folder, once: dequantizing takes a quarter of a minute even for 135M parameters.

The folder holds float32 safetensors under `$XDG_CACHE_HOME/rlhf/gguf` (`~/.cache/rlhf/gguf`), named after the file's
content, and appears under its name only when it is complete: processes that convert at the same time do not disturb each
other. Delete it whenever you like.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import struct
import tempfile
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from shutil import rmtree
from typing import Any

from rlhf_core.errors import MissingPackage, UsageError
from rlhf_core.util.atomic_files import fsync_tree
from rlhf_core.util.messages import progress

__all__ = ["convert_gguf"]

SAMPLES, SAMPLE_BYTES = 32, 2**16
"""Number and size of the pieces of a file that identify it."""


def convert_gguf(file: Path) -> Path:
    """The folder with the model and the tokenizer of the GGUF file.

    Raises:
        MissingPackage: what reads GGUF is not installed.
        UsageError: the file cannot be read.
    """
    folder = _cache() / f"{file.stem}-{_fingerprint(file)}"
    if folder.is_dir():
        return folder
    for package in ("gguf", "accelerate"):  # transformers needs both
        if importlib.util.find_spec(package) is None:
            raise MissingPackage(f"{file.name} needs the package {package!r}: pip install 'rlhf-core[gguf]'")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _convert(file, temporary)
        fsync_tree(temporary)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster
                raise
    finally:
        rmtree(temporary, ignore_errors=True)
    return folder


def _convert(file: Path, folder: Path) -> None:
    """Write the model and the tokenizer as a plain checkpoint: the quantization is no part of it any more."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rlhf_core.lazy import torch

    progress.info(f"converting {file.name} to {folder.parent} (only once)")
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        with redirect_stderr(StringIO()):  # its progress bar has no switch
            model: Any = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(**where)
    except (ValueError, NotImplementedError, LookupError, OSError, struct.error) as error:
        raise UsageError(f"{file}: transformers cannot read this GGUF file: {str(error).splitlines()[0]}") from error
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config._name_or_path = file.stem
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "rlhf" / "gguf"


def _fingerprint(file: Path) -> str:
    """Tells files apart by size and by pieces all over them, without reading gigabytes."""
    size = file.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=6)
    with file.open("rb") as stream:
        for i in range(SAMPLES):
            stream.seek(max(0, size - SAMPLE_BYTES) * i // (SAMPLES - 1))
            digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()
