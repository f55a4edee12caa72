"""Surroundings of a worker's process: the controller's environment variables, and a runtime environment of Ray.

Variables that a library reads when it is imported are there before the process begins. Ray writes those to its logs and its
dashboard, so variables that are named like secrets travel with the description of the run instead, which Ray does not show.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_core.errors import OptionError
from rlhf_core.util.secrets import IN_ENVIRONMENT

__all__ = ["PREFIXES", "Surroundings", "read_runtime_environment", "travelling_variables"]

PREFIXES = ("HF_", "NCCL_", "GLOO_", "VLLM_", "TORCH_", "PYTORCH_")
"""Prefixes of variables that always go to the workers."""

NAMES = ("PYTHONPATH", "DS_ACCELERATOR")
"""Names of others that do."""

PASSIVE = "PASSIVE"  # spinning threads of two busy processes slow each other fivefold


@dataclass(frozen=True)
class Surroundings:
    """Environment in which the processes of all workers start."""

    threads: int
    """OpenMP threads of each"""
    variables: Mapping[str, str]
    """environment variables that may be seen"""
    secrets: Mapping[str, str] = field(repr=False, default_factory=dict)
    """environment variables that are named like secrets"""
    runtime: Mapping[str, Any] = field(default_factory=dict)
    """a runtime environment of Ray, but for what the whole job was given"""

    def runtime_environment(self, **variables: str) -> dict[str, Any]:
        """Ray's runtime environment of one worker, with further variables; those of the user's file come last."""
        usual = {"OMP_WAIT_POLICY": PASSIVE, "OMP_NUM_THREADS": str(self.threads)}
        given = self.runtime.get("env_vars", {})
        return {**self.runtime, "env_vars": {**usual, **variables, **self.variables, **given}}


def travelling_variables(environment: Mapping[str, str], named: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """The variables of `environment` that workers get, those of `named` too: which may be seen, and which are secret.

    Raises:
        UsageError: one of `named` is not set.
    """
    for name in named:
        if name not in environment:
            advice = "set the variable in the shell, and give only its name"
            raise OptionError("env", f"{name.partition('=')[0]!r}: no such environment variable; {advice}")
    chosen = {
        name: value
        for name, value in environment.items()
        if name.startswith(PREFIXES) or name in NAMES or name in named
    }
    secret = {name: value for name, value in chosen.items() if IN_ENVIRONMENT.search(name)}
    return {name: value for name, value in chosen.items() if name not in secret}, secret


def read_runtime_environment(file: str) -> dict[str, Any]:
    """The runtime environment of Ray that a YAML or JSON file describes; empty where no file is named.

    Raises:
        UsageError: it cannot be read, or Ray does not take what is in it.
    """
    if not file:
        return {}
    import yaml  # type: ignore[import-untyped]  # stubs are a separate package, for one call
    from ray.runtime_env import RuntimeEnv

    try:
        content = yaml.safe_load(Path(file).read_text("utf-8"))
        if not isinstance(content, dict):
            raise TypeError("it is not a table of fields such as env_vars")
        return dict(RuntimeEnv(**content))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise OptionError("runtime_env", f"{file} is not a Ray runtime environment ({reason})") from None
