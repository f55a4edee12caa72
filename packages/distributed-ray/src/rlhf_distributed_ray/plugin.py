"""Registers the launcher `ray` and the observer `ray_dashboard`. Names and strings: nothing is imported until one is chosen."""

from __future__ import annotations

from rlhf_core.contract.hooks import Providers, hookimpl

__all__ = ["rlhf_launcher", "rlhf_observer"]


@hookimpl
def rlhf_launcher() -> Providers:
    return {"ray": "rlhf_distributed_ray.launcher:RayLauncher"}


@hookimpl
def rlhf_observer() -> Providers:
    return {"ray_dashboard": "rlhf_distributed_ray.dashboard:RayDashboard"}
