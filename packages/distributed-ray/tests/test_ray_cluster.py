"""Clusters of several logical nodes, and clusters that are not there. Starts Ray's own processes, so each test is alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

pytest.importorskip("ray", reason="needs ray: pip install 'rlhf-distributed-ray[ray]'")
pytest.importorskip("rlhf_algos", reason="runs algorithms of rlhf-algos")

COMMON = [
    "--model",
    "tiny",
    "--data",
    "prompts",
    "--reward",
    "length",
    "--sampling.n",
    "2",
    "--sampling.max-new-tokens",
    "6",
]
COMMON += ["--steps", "2", "--batch-size", "4"]


def test_a_cluster_that_does_not_answer_is_named_in_one_line(tmp_path: Path) -> None:
    words = [
        "grpo",
        *COMMON,
        "--output",
        str(tmp_path / "run"),
        "--launcher",
        "ray",
        "--launcher.address",
        "127.0.0.1:1",
    ]
    done = subprocess.run([sys.executable, "-m", "rlhf_core", *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .startswith("rlhf-run: --launcher.address 127.0.0.1:1: no Ray cluster answers (")
    )


@pytest.mark.slow
def test_roles_are_spread_over_the_nodes_of_an_existing_cluster(tmp_path: Path) -> None:
    """Three logical nodes; two workers a role, strictly spread: the two ranks of a role sit on different nodes."""
    script = tmp_path / "drive.py"
    script.write_text(
        dedent(f"""
        import json
        import ray
        from ray.cluster_utils import Cluster
        from rlhf_core import Registry, Run, hookimpl
        from rlhf_core.configure import parse

        cluster = Cluster(initialize_head=True, head_node_args={{"num_cpus": 2}})
        for _ in range(2):
            cluster.add_node(num_cpus=2)
        words = ["grpo", *{COMMON!r}, "--output", {str(tmp_path / "run")!r}, "--launcher", "ray", "--launcher.cpus", "0.1",
                 "--launcher.address", cluster.address, "--launcher.workers", "2", "--launcher.strategy", "STRICT_SPREAD"]
        nodes = {{}}

        class Look:
            @hookimpl
            def rlhf_run_start(self, run):
                from ray.util.state import list_actors
                for actor in list_actors(address=cluster.address, limit=100):
                    nodes.setdefault(actor["class_name"], []).append(actor["node_id"])

        registry = Registry()
        registry.register(Look(), name="look")
        Run(parse(words, registry), registry).train()
        print("NODES", json.dumps(nodes))
        cluster.shutdown()
        """)
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("NODES "))
    nodes = json.loads(line.removeprefix("NODES "))
    assert len(nodes["RoleWorker"]) == 4 and len(set(nodes["RoleWorker"])) == 2
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
