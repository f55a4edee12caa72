"""Templates of clusters and the gauges of a run, as far as one machine can check them."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_core.errors import UsageError
from rlhf_distributed_ray.dashboard import RayDashboard
from rlhf_distributed_ray.launcher import RayLauncher
from rlhf_distributed_ray.places import parse_shape

TEMPLATES = Path(__file__).parents[1] / "templates"


def launcher_flags(words: list[str]) -> set[str]:
    return {word.removeprefix("--launcher.").replace("-", "_") for word in words if word.startswith("--launcher.")}


def test_the_slurm_template_is_bash_and_its_flags_exist() -> None:
    file = TEMPLATES / "slurm.sh"
    assert subprocess.run(["bash", "-n", str(file)], capture_output=True).returncode == 0
    flags = launcher_flags(file.read_text("utf-8").split())
    assert flags and flags <= set(RayLauncher.__dataclass_fields__)


def test_the_steps_of_the_slurm_template_get_the_cores_of_the_job(tmp_path: Path) -> None:
    """srun does not inherit the job's cores per task since SLURM 22.05, so Ray's nodes would have one core each."""
    for name, body in {
        "scontrol": "for i in {1..20000}; do echo node$i; done",  # more than a pipe holds
        "srun": 'echo "${SRUN_CPUS_PER_TASK:-1} $*" >> "$SEEN"; echo 10.0.0.1',
        "sleep": "",
        "openssl": "echo 00",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    seen = tmp_path / "seen"
    job = {"SLURM_JOB_NODELIST": "node[1-20000]", "SLURM_JOB_NUM_NODES": "20000", "SLURM_CPUS_PER_TASK": "64"}
    environment = {**job, "SEEN": str(seen), "PATH": f"{tmp_path}:/usr/bin:/bin"}
    subprocess.run(["bash", str(TEMPLATES / "slurm.sh")], env=environment, check=True, capture_output=True, timeout=60)
    steps = seen.read_text("utf-8").splitlines()
    assert any("rlhf-run grpo" in step for step in steps)
    assert all(step.startswith("64 ") for step in steps)


def test_the_kuberay_template_is_a_job_whose_workers_fit_its_largest_size() -> None:
    yaml = pytest.importorskip("yaml", reason="comes with ray")
    job = yaml.safe_load((TEMPLATES / "kuberay.yaml").read_text("utf-8"))
    assert job["kind"] == "RayJob"
    words = shlex.split(job["spec"]["entrypoint"])
    assert launcher_flags(words) <= set(RayLauncher.__dataclass_fields__)
    shape = parse_shape(words[words.index("--launcher.workers") + 1], "workers")
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    assert shape.devices == int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert shape.nodes == group["maxReplicas"]


def test_each_metric_is_a_gauge_under_a_name_that_prometheus_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray", reason="needs ray: pip install 'rlhf-distributed-ray[ray]'")
    gauges = pytest.importorskip("ray.util.metrics")
    values: dict[str, Any] = {}

    class Gauge:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            assert name not in values, "one gauge for a name"
            self.name = name
            values[name] = None

        def set(self, value: float, tags: dict[str, str]) -> None:
            values[self.name] = (value, tags)

    monkeypatch.setattr(gauges, "Gauge", Gauge)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    view: Any = SimpleNamespace(output=Path("runs/a"), config=SimpleNamespace(steps=2))
    watching = RayDashboard()(view)
    watching.rlhf_step_end(view, 1, {"step": 1, "reward/mean": 0.5})
    watching.rlhf_step_end(view, 2, {"step": 2, "reward/mean": 0.75})
    assert values == {"rlhf_reward_mean": (0.75, {"run": "runs/a"}), "rlhf_step": (2.0, {"run": "runs/a"})}
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(UsageError, match="^observer ray_dashboard needs a Ray cluster; add launcher = "):
        RayDashboard()(view)
