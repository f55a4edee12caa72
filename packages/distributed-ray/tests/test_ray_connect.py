"""Whatever keeps a driver from its cluster, or takes an actor from it, is one line; what Ray says meanwhile is not shown."""

from __future__ import annotations

import os
from typing import Any

import pytest

ray = pytest.importorskip("ray", reason="needs ray: pip install 'rlhf-distributed-ray[ray]'")

from rlhf_core.errors import RunStopped, UsageError  # noqa: E402  after the check above
from rlhf_distributed_ray import group  # noqa: E402  the same
from rlhf_distributed_ray.launcher import RayLauncher  # noqa: E402

MISMATCH = "Version mismatch: The cluster was started with:\n    Ray: 2.50.0\n    Python: 3.11.7\nThis process …"
REFUSED = b"gcs_client.cc:210: Failed to get cluster ID from GCS server: Unauthenticated: RPC error: InvalidAuthToken\n"


@pytest.mark.parametrize(
    ("error", "said", "told"),
    [
        (
            RuntimeError(MISMATCH),
            b"",
            "no Ray cluster answers (Version mismatch: The cluster was started with: Ray: 2.50.0",
        ),
        (
            ConnectionError("Could not find any running Ray instance."),
            b"",
            "no Ray cluster answers (Could not find any",
        ),
        (
            Exception("The current node timed out during startup. This"),
            b"",
            "no Ray cluster answers (The current node timed",
        ),
        (ConnectionError(), b"", "no Ray cluster answers (ConnectionError)"),
        (
            RuntimeError("Failed to connect"),
            3 * REFUSED,
            "the cluster refuses this token; set RAY_AUTH_MODE=token and RAY_AUTH",
        ),
        (
            ray.exceptions.AuthenticationError("no token"),
            b"",
            "the cluster refuses this token; set RAY_AUTH_MODE=token and",
        ),
    ],
)
def test_every_way_to_fail_is_one_line(
    error: Exception, said: bytes, told: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def init(**_: Any) -> None:
        os.write(2, said)
        raise error

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(UsageError) as caught:
        RayLauncher(address="cluster:6379")._open()
    message = str(caught.value)
    assert message.startswith(f"address cluster:6379: {told}") and "\n" not in message
    assert capfd.readouterr().err == ""


def test_standard_error_is_itself_again_afterwards(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ray, "init", lambda **_: os.write(2, b"swallowed"))
    RayLauncher()._open()
    os.write(2, b"seen")
    assert capfd.readouterr().err == "seen"


MEMORY = (
    "6 worker(s) were killed due to the node running low on memory. Memory on the node was 22 GB.\nConsidered: …\n]"
)


@pytest.mark.parametrize(
    ("death", "cause"),
    [
        (ray.exceptions.OutOfMemoryError(MEMORY), "6 worker(s) were killed due to the node running low on memory."),
        (ray.exceptions.WorkerCrashedError(), "The worker died unexpectedly"),
        (ray.exceptions.ActorDiedError(), "The actor died"),
    ],
)
def test_a_death_is_told_with_its_cause_and_not_what_the_other_ranks_made_of_it(
    death: Exception, cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 fails first, since rank 1 closed the connection."""
    answers = {"rank 0": ray.exceptions.RayTaskError("train", "Connection closed by peer", OSError()), "rank 1": death}

    def get(reference: str) -> None:
        raise answers[reference]

    monkeypatch.setattr(ray, "wait", lambda pending, **_: (pending[:1], pending[1:]))
    monkeypatch.setattr(ray, "get", get)
    with pytest.raises(RunStopped) as caught:
        group.gather_results("role actor", [("here", 7), ("there", 8)], list(answers))
    message = str(caught.value)
    assert message.startswith(f"role actor rank 1 on node there (process 8) died: {cause}") and "\n" not in message
    assert message.endswith("; continue from the last checkpoint with resume = true") and len(message) < 400
