"""Registers the launcher `ray`. A name and a string: nothing is imported until it is chosen."""

from __future__ import annotations

from rlhf_core.contract.hooks import Providers, hookimpl

__all__ = ["rlhf_launcher"]


@hookimpl
def rlhf_launcher() -> Providers:
    return {"ray": "rlhf_distributed_ray.launcher:RayLauncher"}
