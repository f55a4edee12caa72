"""Calls into transformers: one line for what it raises about a name, and no tables or progress bars."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.errors import RlhfError, UsageError
from rlhf_core.models.loading.hub import offline_if_unreachable
from rlhf_core.models.loading.names import Source

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from rlhf_core.contract.options import ModelOptions

__all__ = ["find_damage", "loadable_path", "no_progress_bars", "read_config", "silence", "translate_errors"]

JSON_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "model.safetensors.index.json",
)
"""Optional files of a model's folder; each holds one object."""


def read_config(name: str, source: Source, options: ModelOptions, **overrides: Any) -> PretrainedConfig:
    """The configuration of the model called `name`, with `overrides`."""
    from transformers import AutoConfig

    with translate_errors(name), silence(source):
        config: PretrainedConfig = AutoConfig.from_pretrained(
            loadable_path(source), trust_remote_code=options.trust_remote_code, **overrides
        )
    return config


def loadable_path(source: Source) -> str:
    """Return the path or name that transformers loads."""
    if source.kind == "gguf":
        from rlhf_core.models.loading.convert import convert_gguf

        return str(convert_gguf(Path(source.location)))
    return source.location


@contextmanager
def silence(source: Source) -> Iterator[None]:
    """No progress bars (but of downloads) and no tables of weights: what they warn of is checked and raised here."""
    from transformers.utils import logging

    if source.kind == "hub":
        offline_if_unreachable()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with nullcontext() if source.kind == "hub" else no_progress_bars():
            yield
    finally:
        logging.set_verbosity(verbosity)


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """No bars of transformers inside: what it reads or writes in a second is not news."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            logging.enable_progress_bar()


@contextmanager
def translate_errors(name: str) -> Iterator[None]:
    """Turn what transformers and the hub raise about a name into one line."""
    from huggingface_hub import errors as hub

    try:
        yield
    except RlhfError:
        raise
    except Exception as error:  # a damaged file ends in any of them: it is the user's, and nothing of ours runs inside
        causes = _chain(error)
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if any(isinstance(each, hub.GatedRepoError) for each in causes):
            reason = "the hub asks for a login: accept its terms on its page and set HF_TOKEN"
        elif any(isinstance(each, hub.RepositoryNotFoundError) for each in causes):
            reason = "the hub has no such model (a private one needs HF_TOKEN), and there is no such folder"
        elif any(isinstance(each, (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled)) for each in causes):
            reason = (
                "there is no such folder (a typo?), and the hub cannot be reached (offline?); pass a folder, a GGUF file "
                "or 'tiny'"
            )
        elif "trust_remote_code" in str(error):
            reason = "it contains its own code; pass --<role>.trust-remote-code if you trust it"
        elif "backend tokenizer" in str(error):
            reason = "it has no tokenizer that transformers can read"
        elif damage := find_damage(Path(name)):
            reason = damage
        elif "mismatch" in str(error).lower():
            reason = "its weights do not have the sizes in its config.json"
        elif isinstance(error, (RuntimeError, MemoryError)):
            raise
        elif isinstance(error, (OSError, ValueError, ImportError)) and not first.endswith(":"):
            reason = first
        else:
            reason = f"{' '.join(str(error).split())[:300]} ({type(error).__name__}); check its JSON files"
        raise UsageError(f"cannot load {name!r}: {reason}") from error


def find_damage(folder: Path) -> str | None:
    """The first file in the folder of a model whose content does not match its name, and why; None if all are.

    The content of weights is not looked at, only whether they are all there.
    """
    from safetensors import SafetensorError, safe_open

    for path in [folder / name for name in JSON_FILES if (folder / name).is_file()]:
        try:
            if not isinstance(json.loads(path.read_text(encoding="utf-8")), dict):
                return f"{path} is damaged: it is not a JSON object"
        except (OSError, ValueError) as error:
            return f"{path} is damaged: {error}"
        except RecursionError:
            return f"{path} is damaged: it is nested too deeply"
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            return f"{path} is damaged: {error}"
    return None


def _chain(error: BaseException) -> list[BaseException]:
    """`error` and what led to it."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    return chain
