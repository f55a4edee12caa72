"""Environment variables that reach the workers, and secrets that bypass Ray's logs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf_core.errors import UsageError
from rlhf_core.rollout.fake import FakeRollout
from rlhf_core.testing import tiny_run
from rlhf_distributed_ray import launcher
from rlhf_distributed_ray.launcher import RayLauncher
from rlhf_distributed_ray.placement import Layout
from rlhf_distributed_ray.surroundings import Surroundings, read_runtime_environment, travelling_variables

SHELL = {
    "HF_HOME": "/cache",
    "HF_TOKEN": "hf_0123456789",
    "NCCL_DEBUG": "INFO",
    "GLOO_SOCKET_IFNAME": "eth0",
    "VLLM_API_KEY": "key-0123456789",
    "TORCH_LOGS": "all",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "PYTHONPATH": "src",
    "PATH": "/bin",
    "WANDB_API_KEY": "wandb-0123456789",
    "MINE": "1",
}


def test_variables_of_libraries_travel_and_those_that_are_named() -> None:
    seen, secret = travelling_variables(SHELL, ["MINE", "WANDB_API_KEY"])
    assert secret == {name: SHELL[name] for name in ("HF_TOKEN", "VLLM_API_KEY", "WANDB_API_KEY")}
    assert seen.keys() | secret.keys() == SHELL.keys() - {"PATH"}


def test_no_secret_is_where_ray_shows_it_or_in_a_repr() -> None:
    surroundings = Surroundings(3, *travelling_variables(SHELL, ["WANDB_API_KEY"]))
    shown = f"{surroundings.runtime_environment(CUDA_VISIBLE_DEVICES='')} {surroundings}"
    assert "expandable_segments:True" in shown
    assert not [value for value in shown.split() if "0123456789" in value]


def test_the_file_of_the_user_has_the_last_word(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs ray: pip install 'rlhf-distributed-ray[ray]'")
    file = tmp_path / "runtime.yaml"
    file.write_text("env_vars: {NCCL_DEBUG: WARN, OTHER: 'yes'}\nexcludes: [data]\n")
    found = Surroundings(3, {"NCCL_DEBUG": "INFO"}, runtime=read_runtime_environment(str(file))).runtime_environment()
    assert found["excludes"] == ["data"]
    usual = {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "3"}
    assert found["env_vars"] == {**usual, "NCCL_DEBUG": "WARN", "OTHER": "yes"}
    assert read_runtime_environment("") == {}


def test_the_file_has_the_last_word_in_a_cluster_that_the_run_joined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray lets a worker's variables override the job's, to which the file was given."""
    pytest.importorskip("ray", reason="needs ray: pip install 'rlhf-distributed-ray[ray]'")
    file = tmp_path / "runtime.yaml"
    file.write_text("env_vars: {NCCL_DEBUG: WARN, OMP_NUM_THREADS: '8'}\nexcludes: [data]\n")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setattr(RayLauncher, "_connect", lambda *_: True)
    monkeypatch.setattr(RayLauncher, "_lay_out", lambda *_: Layout((), (), {}))
    found: list[Surroundings] = []

    class Cluster:
        def __init__(self, *given: Any) -> None:
            found.append(given[2])

        def place(self) -> None:
            """Nothing."""

    monkeypatch.setattr(launcher, "Cluster", Cluster)
    RayLauncher(runtime_env=str(file))(tiny_run("unused", rollout=FakeRollout()).plan)
    environment = found[0].runtime_environment()
    assert environment.keys() == {"env_vars"}, "the job has the rest"
    assert (environment["env_vars"]["NCCL_DEBUG"], environment["env_vars"]["OMP_NUM_THREADS"]) == ("WARN", "8")


@pytest.mark.parametrize("content", ["- a list", "env_vars: [1]", "{", "", "env_vars: {A: 1}"])
def test_what_is_no_runtime_environment_is_refused_in_one_line(content: str, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs ray: pip install 'rlhf-distributed-ray[ray]'")
    file = tmp_path / "runtime.yaml"
    file.write_text(content)
    with pytest.raises(UsageError, match=r"^runtime_env .*runtime.yaml is not a Ray runtime environment \(") as caught:
        read_runtime_environment(str(file))
    assert "\n" not in str(caught.value)


def test_a_variable_that_is_not_set_is_named_without_what_was_given_for_it() -> None:
    with pytest.raises(UsageError, match=r"^env 'TOKEN': no such environment variable; set the variable in the shell"):
        travelling_variables(SHELL, ["TOKEN=hf_0123456789"])
