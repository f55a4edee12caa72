"""A module that a Python user passes as the model: written to OUTPUT/base-model, and read from there like any other.

Every role, rank and engine loads its model by name, and a resumed run has to find the weights that it began with. The module
itself stays as it is.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from rlhf_core.config.python_values import describe
from rlhf_core.errors import UsageError
from rlhf_core.util.atomic_files import fresh_folder
from rlhf_core.util.messages import install_console, progress

__all__ = ["FOLDER", "GivenModel"]

FOLDER = "base-model"
"""Folder of the module inside OUTPUT."""
FINGERPRINT = "fingerprint.txt"
"""File with the hash of the module's weights, config and tokenizer."""

SET_BY_SAVING = ("_name_or_path", "architectures", "dtype", "transformers_version")
"""Keys of a config that saving a model writes into it."""


class GivenModel:
    """A Hugging Face model and its tokenizer.

    Args:
        module: the model.
        tokenizer: its tokenizer; that of the name the module was loaded from where absent.

    Raises:
        UsageError: the module is no Hugging Face model, or has no tokenizer.
    """

    def __init__(self, module: Any, tokenizer: Any = None) -> None:
        transformers = sys.modules.get("transformers")
        if transformers is None or not isinstance(module, transformers.PreTrainedModel):
            unwrap = "; for a PEFT model pass its base model, and adapters as actor={'lora': {'rank': 16}}"
            raise UsageError(
                f"model is {describe(module)}; pass a name, a folder, or a Hugging Face model (PreTrainedModel)"
                f"{unwrap if hasattr(module, 'peft_config') else ''}"
            )
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UsageError(
                "a model object works only in a single process; save it with its tokenizer, and pass the folder to "
                "every rank"
            )
        if tokenizer is None:
            tokenizer = _tokenizer_of(module)
        if not hasattr(tokenizer, "save_pretrained"):
            raise UsageError(f"tokenizer is {describe(tokenizer)}; pass a Hugging Face tokenizer")
        self.module, self.tokenizer = module, tokenizer

    def write(self, output: str) -> None:
        """Write OUTPUT/base-model, unless this very model is there already.

        Raises:
            UsageError: another one is there.
        """
        folder, fingerprint = Path(output) / FOLDER, self._fingerprint()
        if folder.exists():
            marker = folder / FINGERPRINT
            if marker.is_file() and marker.read_text(encoding="utf-8") == fingerprint:
                return
            raise UsageError(f"{folder} contains a different model from the one given; name another output")
        install_console()
        progress.info(f"writing the given model to {folder}")
        with fresh_folder(folder) as target:
            self.module.save_pretrained(target)
            self.tokenizer.save_pretrained(target)
            (target / FINGERPRINT).write_text(fingerprint, encoding="utf-8")

    def _fingerprint(self) -> str:
        """Hash the weights, the config and the tokenizer."""
        import torch
        import xxhash

        config = {key: value for key, value in self.module.config.to_dict().items() if key not in SET_BY_SAVING}
        digest = xxhash.xxh3_128(json.dumps(config, sort_keys=True, default=str).encode())
        for name, tensor in sorted(self.module.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        digest.update(f"{sorted(self.tokenizer.get_vocab().items())} {self.tokenizer.chat_template}".encode())
        return digest.hexdigest()


def _tokenizer_of(module: Any) -> Any:
    """The tokenizer of the name that a module was loaded from."""
    from transformers import AutoTokenizer

    name = module.name_or_path
    try:
        if name:
            return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError):  # nothing of that name, or no tokenizer there
        pass
    raise UsageError("model is a module without a tokenizer; pass tokenizer= too")
