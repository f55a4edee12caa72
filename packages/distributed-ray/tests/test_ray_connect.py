"""Whatever keeps a driver from its cluster, or takes an actor from it, is one line; what Ray says meanwhile is not shown."""

from __future__ import annotations

import os
from typing import Any

import pytest

ray = pytest.importorskip("ray", reason="needs ray: pip install 'rlhf-distributed-ray[ray]'")

from rlhf_core.errors import UsageError  # noqa: E402  after the check above
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
            "the cluster rejects this token; set RAY_AUTH_MODE=token and RAY_AUTH",
        ),
        (
            ray.exceptions.AuthenticationError("no token"),
            b"",
            "the cluster rejects this token; set RAY_AUTH_MODE=token and",
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
        RayLauncher(address="cluster:6379")._open({})
    message = str(caught.value)
    assert message.startswith(f"address cluster:6379: {told}") and "\n" not in message
    assert capfd.readouterr().err == ""


def test_standard_error_is_itself_again_afterwards(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ray, "init", lambda **_: os.write(2, b"swallowed"))
    RayLauncher()._open({})
    os.write(2, b"seen")
    assert capfd.readouterr().err == "seen"
