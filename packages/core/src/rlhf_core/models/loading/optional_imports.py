"""Importing PEFT and bitsandbytes: one line where they are not installed, none where they are."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from typing import Any

from rlhf_core.contract.options import ModelOptions, TrainedOptions
from rlhf_core.errors import MissingPackage
from rlhf_core.models.loading.hub import is_adapter

__all__ = ["check_peft", "import_peft", "quiet_bitsandbytes", "uses_peft"]

NOT_NEEDED = "Failed to load CPU gemm_4bit_forward"
"""Message of bitsandbytes at import that a faster kernel is not installed; it has no backward pass and is never used here."""


def import_peft(wanted_by: str) -> Any:
    """PEFT, which imports bitsandbytes too.

    Raises:
        MissingPackage: it is not installed.
    """
    check_peft(wanted_by)
    quiet_bitsandbytes()
    return importlib.import_module("peft")


def check_peft(wanted_by: str) -> None:
    """Check that PEFT is installed, without importing it.

    Raises:
        MissingPackage: it is not.
    """
    if importlib.util.find_spec("peft") is None:
        raise MissingPackage(f"{wanted_by} needs the package 'peft': pip install 'rlhf-core[lora]'")


def uses_peft(options: ModelOptions) -> bool:
    """Return True if a role with these options trains adapters, or if its model is one."""
    return (isinstance(options, TrainedOptions) and options.lora.rank > 0) or is_adapter(options.model)


def quiet_bitsandbytes() -> None:
    """Drop the one message that is no news, before bitsandbytes is imported; all others pass."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(NOT_NEEDED)
