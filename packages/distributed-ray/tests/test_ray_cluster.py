"""Clusters of several logical nodes, and clusters that are not there or do not let one in. Ray's own processes are started
here, and a run is a process of its own, as a user's is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import dedent

import pytest

pytest.importorskip("ray", reason="needs ray: pip install 'rlhf-distributed-ray[ray]'")
pytest.importorskip("rlhf_algos", reason="runs algorithms of rlhf-algos")

RUN = "grpo --model tiny --data prompts --reward length --sampling.n 2 --sampling.max-new-tokens 6 --steps 2 --batch-size 4"
FAKE = "--rollout fake --strategy fake"  # who sits where needs no model
RAY = f"{RUN} {FAKE} --launcher ray --launcher.cpus 0.1".split()
TOKEN = "a-token-of-at-least-some-length"

SERVE = """
    import sys
    from ray.cluster_utils import Cluster

    def patiently(start):  # Ray gives a node 30 s to start, which is little beside much other work
        for _ in range(5):
            try:
                return start()
            except Exception as error:
                if "timed out during startup" not in str(error):
                    raise

    cluster = patiently(lambda: Cluster(initialize_head=True, head_node_args={"num_cpus": 2}))
    for _ in range(int(sys.argv[1]) - 1):
        patiently(lambda: cluster.add_node(num_cpus=2))
    print("ADDRESS", cluster.address, flush=True)
    sys.stdin.read()  # until whoever started this is done
    cluster.shutdown()
"""

DRIVE = """
    import json, sys
    from rlhf_core import Registry, Run, hookimpl
    from rlhf_core.config.builder import parse

    nodes = {}

    class Look:
        @hookimpl
        def rlhf_run_start(self, run):
            import ray
            def node(self):
                return ray.get_runtime_context().get_node_id()
            for name, group in {**run.roles, "engine": run.placed.rollout}.items():
                nodes[name] = ray.get([actor.__ray_call__.remote(node) for actor in group.crew.actors])

    registry = Registry()
    registry.register(Look(), name="look")
    Run(parse(sys.argv[1:], registry), registry).train()
    print("NODES", json.dumps(nodes))
"""


@contextmanager
def cluster(nodes: int, **environment: str) -> Iterator[str]:
    """The address of a cluster of logical nodes, which other processes started."""
    command = [sys.executable, "-c", dedent(SERVE), str(nodes)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env={**os.environ, **environment}) as server:
        assert server.stdin is not None and server.stdout is not None
        yield next(line.split()[1] for line in server.stdout if line.startswith("ADDRESS "))
        server.stdin.close()


def start(words: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """`rlhf-run` with these words."""
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-m", "rlhf_core", *words], capture_output=True, text=True, env=env)


def test_a_cluster_that_does_not_answer_is_named_in_one_line_and_soon(tmp_path: Path) -> None:
    """Ray itself would try for minutes."""
    began = time.perf_counter()
    done = start([*RAY, "--output", str(tmp_path / "run"), "--launcher.address", "127.0.0.1:1"])
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("rlhf-run: --launcher.address 127.0.0.1:1: no Ray cluster answers (")
    assert time.perf_counter() - began < 120, "a few seconds, on a machine without other work"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("placement", "groups"),
    [
        # all together: rank k of every role, and engine k, on node k
        (
            ["--launcher.workers", "2", "--launcher.strategy", "STRICT_SPREAD"],
            {"actor": 2, "reference": 2, "engine": 2},
        ),
        # separate: the actor over all three nodes, two workers of the reference on one
        (
            "--launcher.place separate --launcher.role-workers actor=4:SPREAD reference=1x2".split(),
            {"actor": 3, "reference": 1, "engine": 1},
        ),
        # two nodes of two workers each, surely on different ones
        (
            "--launcher.place separate --launcher.role-workers actor=2x2:STRICT_SPREAD".split(),
            {"actor": 2, "reference": 1, "engine": 1},
        ),
        # four groups over three nodes, which would all have room on one
        (
            "--launcher.cpus 0.1 --launcher.place actor@4x2:SPREAD,reference@1".split(),
            {"actor": 3, "reference": 1, "engine": 3},
        ),
    ],
)
def test_roles_sit_where_they_were_placed_on_an_existing_cluster(
    placement: list[str], groups: dict[str, int], tmp_path: Path
) -> None:
    """Three logical nodes, joined by `--launcher.address`."""
    with cluster(3) as address:
        words = [*RAY, *placement, "--launcher.address", address, "--output", str(tmp_path / "run")]
        done = subprocess.run([sys.executable, "-c", dedent(DRIVE), *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("NODES "))
    nodes = json.loads(line.removeprefix("NODES "))
    assert {name: len(set(where)) for name, where in nodes.items()} == groups
    if "--launcher.workers" in placement:
        assert nodes["actor"] == nodes["reference"] and nodes["engine"] == nodes["actor"]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
def test_a_cluster_with_a_token_lets_in_who_has_it_and_others_are_told_in_one_line(tmp_path: Path) -> None:
    with cluster(2, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN) as address:
        words = [*RAY, "--launcher.address", address]
        right = start([*words, "--output", str(tmp_path / "right")], RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)
        wrong = start([*words, "--output", str(tmp_path / "wrong")], RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="b" * 30)
    assert right.returncode == 0, right.stderr[-2000:]
    assert wrong.returncode == 2
    assert wrong.stderr.strip() == (
        f"rlhf-run: --launcher.address {address}: the cluster rejects this token; set RAY_AUTH_MODE=token and "
        "RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to the values of the cluster"
    )
