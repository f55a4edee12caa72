"""A sweep as jobs of a Ray cluster: the script that `rlhf-run sweep FILE --ray` writes, submitted for real."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="needs ray: pip install 'rlhf-distributed-ray[ray]'")
pytest.importorskip("aiohttp_cors", reason="jobs need Ray's dashboard: pip install 'ray[default]'")
pytest.importorskip("rlhf_algos", reason="runs algorithms of rlhf-algos")

from rlhf_core.analysis.sweep import read_sweep
from rlhf_core.cli.app import main

SWEEP = """
output = "out"
seeds = [0, 1]

[variants.rloo]
model = "tiny:hidden=16,layers=1"
algorithm = "rloo"
data = "prompts"
reward = "length"
steps = 2
batch_size = 2
sampling.n = 2
sampling.max_new_tokens = 4

[ray]
entrypoint-num-cpus = 0.5
"""


@contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """A cluster of this machine that takes jobs; yields the environment in which `ray` and `bash` find it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    binaries = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": binaries, "RAY_ADDRESS": f"http://127.0.0.1:{port}"}
    environment |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "of-this-test-alone-" + port,
    }  # jobs are anybody's commands
    words = ["ray", "start", "--head", "--block", "--num-cpus=2", "--port=0", f"--dashboard-port={port}"]
    words += ["--disable-usage-stats", f"--temp-dir={folder}"]
    with subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            until(lambda: subprocess.run(["ray", "job", "list"], env=environment, capture_output=True).returncode == 0)
            yield environment
        finally:
            server.terminate()  # with --block it ends what it started, and nothing else


def until(condition: Callable[[], bool], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(1)


@pytest.mark.slow
def test_every_run_of_a_sweep_is_a_job_of_the_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sweep.toml").write_text(SWEEP)
    assert main(["sweep", "sweep.toml", "--ray", "jobs.sh"]) == 0
    members = read_sweep("sweep.toml").members
    with (
        tempfile.TemporaryDirectory(dir="/tmp") as short,
        cluster(Path(short)) as environment,
    ):  # sockets' names are long
        done = subprocess.run(["bash", "jobs.sh"], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        until(lambda: all(member.state in ("finished", "failed") for member in members))
        listed = subprocess.run(["ray", "job", "list"], env=environment, capture_output=True, text=True)
    assert listed.stdout.count("type=<JobType.SUBMISSION") == 2, listed.stdout
    assert [member.state for member in members] == ["finished", "finished"]
    assert [[row["step"] for row in member.metrics()] for member in members] == [[1, 2], [1, 2]]
