"""The Hugging Face hub: its availability, and the meaning of its names. Models themselves are read by transformers.

A repository with `adapter_config.json` is an adapter, as transformers too takes it; it is downloaded and from there on the
folder that it would be on a disk. Nothing is asked of the hub for a name that is a folder, a file or made on the spot.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from rlhf_core.models.loading.names import Source, find

__all__ = ["find_companion_file", "is_adapter", "offline_if_unreachable", "resolve_name"]

SECONDS = 3.0
"""for one try, of two"""

OF_ADAPTERS = ["*.json", "*.jinja", "*.txt", "*.model", "*.safetensors"]
"""Files of an adapter to download: its weights, its tokenizer and their configurations."""


@cache
def offline_if_unreachable() -> None:
    """Ask the hub for its first page; without an answer, be offline from here on: only what is cached is found then.

    Its library would try for half a minute before it reports that.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]  # documented there, not listed

    if constants.is_offline_mode():
        return
    for _ in range(2):
        try:
            get_session().head(constants.ENDPOINT, timeout=SECONDS)
            return
        except Exception:  # noqa: S112  # of whatever HTTP library the hub's uses; any answer at all is no exception
            continue
    constants.HF_HUB_OFFLINE = True
    os.environ["HF_HUB_OFFLINE"] = "1"  # for libraries that are imported later, and for workers


def resolve_name(name: str) -> Source:
    """Resolve `name` like `find`, and download an adapter of the hub: its source is then a folder.

    Raises:
        UsageError, MissingPackage: as `find`.
    """
    source = find(name)
    if source.kind != "hub" or _download(name, "adapter_config.json") is None:
        return source
    from huggingface_hub import snapshot_download

    return Source("adapter", snapshot_download(name, allow_patterns=OF_ADAPTERS))


def is_adapter(name: str) -> bool:
    """Return True if the model `name` is an adapter, in a folder or on the hub. Nothing of it but its config is downloaded.

    Raises:
        UsageError, MissingPackage: as `find`.
    """
    kind = find(name).kind
    return kind == "adapter" or (kind == "hub" and _download(name, "adapter_config.json") is not None)


def find_companion_file(name: str, file: str) -> Path | None:
    """Return the file next to the weights of the model `name`, in its folder or on the hub; None if there is none."""
    source = resolve_name(name)
    if source.kind == "hub":
        return _download(name, file)
    path = Path(source.location) / file
    return path if path.is_file() else None


@cache
def _download(name: str, file: str) -> Path | None:
    """The file of the hub's repository, if it has it. Other errors in a name are reported when its model is loaded."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    offline_if_unreachable()
    try:
        return Path(hf_hub_download(name, file))
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled):
        return None
