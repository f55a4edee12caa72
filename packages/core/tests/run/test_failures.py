"""A run that cannot go on says why in one line, keeps what shows the cause, and leaves its last checkpoint whole."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from rlhf_core.checkpoint import valid_checkpoints
from rlhf_core.contract.batch import Batch
from rlhf_core.contract.hooks import hookimpl
from rlhf_core.contract.providers import Loss
from rlhf_core.contract.results import LossTerms, Reduction
from rlhf_core.errors import RunStopped
from rlhf_core.plugins.registry import Registry
from rlhf_core.run.run import Run
from rlhf_core.testing import tiny_rollouts, tiny_run
from rlhf_core.testing.tiny_algorithm import TinyLoss
from rlhf_core.training.nonfinite import Watch

MODEL = "tiny:hidden=16,layers=1"


@dataclass(frozen=True)
class Broken(Loss):
    """A policy gradient that breaks at the second step, in the completion 1: in its loss, or only in its gradient."""

    gradient: bool = False
    """the loss stays finite"""

    outputs: ClassVar[frozenset[str]] = frozenset({"logprobs_NT"})
    needs: ClassVar[frozenset[str]] = frozenset({"advantages_NT"})

    def __call__(self, outputs: Mapping[str, torch.Tensor], batch: Batch) -> LossTerms:
        values_NT = TinyLoss()(outputs, batch).values
        if batch.step.progress > 0:
            zeros_NT = (outputs["logprobs_NT"] - outputs["logprobs_NT"].detach()).abs()
            broken_NT = zeros_NT.sqrt() if self.gradient else torch.log(zeros_NT)  # sqrt'(0) and log(0) are infinite
            values_NT = torch.where((torch.arange(len(batch)) == 1)[:, None], broken_NT, values_NT)
        return LossTerms(values_NT, Reduction("token"))


def broken_run(output: Path, **options: Any) -> str:
    with pytest.raises(RunStopped) as caught:
        tiny_run(output, model=MODEL, steps=3, save_every=1, **options).train()
    assert caught.value.exit_code == 1
    return str(caught.value)


@pytest.mark.parametrize(
    ("gradient", "said"), [(False, "the loss of role 'actor' is "), (True, "the gradient of role 'actor'")]
)
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run_and_its_samples_are_kept(
    gradient: bool, said: str, tmp_path: Path
) -> None:
    message = broken_run(tmp_path, loss=Broken(gradient=gradient))
    assert message.startswith(f"step 2: {said}")
    assert "the newest checkpoint is step-1" in message and "\n" not in message
    rows = [json.loads(line) for line in (tmp_path / "failed" / "step-2.jsonl").read_text().splitlines()]
    assert rows and all({"prompt", "completion", "tokens", "advantages_NT"} < set(row) for row in rows)
    if not gradient:
        assert "in the term Broken on actor" in message
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
    assert [folder.name for folder in valid_checkpoints(tmp_path)] == ["step-1"]


def test_exactly_the_rows_with_values_that_are_not_finite_are_kept_and_padding_does_not_count() -> None:
    batch = tiny_rollouts()
    values_NT = torch.zeros(batch.mask_NT.shape)
    values_NT[~batch.mask_NT] = float("nan")
    values_NT[3, 0] = float("inf")
    watch = Watch("actor")
    watch.micro_batch(float("nan"), {"loss": values_NT}, batch)
    assert [row["completion"] for row in watch._samples] == [batch.texts[3]]
    pairs = Watch("actor")
    pairs.micro_batch(float("nan"), {"loss": torch.tensor([0.0, float("nan"), 0.0, 0.0])}, batch)
    assert [row["completion"] for row in pairs._samples] == batch.texts[2:4], "a pair is both of its rows"


# ----------------------------------------------------------------------------------------------------------------------
# disk and memory
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs more rights")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("save_async", [False, True], ids=["waiting", "beside"])
def test_a_full_disk_stops_with_a_line_and_the_checkpoint_before_it_is_whole(
    save_async: bool, small_disk: Path
) -> None:
    output = small_disk / "run"
    filler = small_disk / "filler"

    class Fill:
        @hookimpl
        def rlhf_step_end(self, run: Run, step: int) -> None:
            if step == 2:
                free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
                filler.write_bytes(bytes(max(0, free - 20_000)))

    registry = Registry()
    registry.register(Fill(), "fill")
    with pytest.raises(RunStopped) as caught:
        tiny_run(output, registry=registry, model=MODEL, steps=3, save_every=1, save_async=save_async).train()
    assert str(caught.value).replace("step 3", "step 2") == (  # beside the training it may be noticed in the next step
        f"no space is left for {output} (checkpoint, step 2), and the newest checkpoint is step-1; free some space, then "
        "continue with resume=True (keep=1 needs the least)"
    )
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-1"]
    filler.unlink()
    tiny_run(output, model=MODEL, steps=3, save_every=1, keep=1, resume=True).train()
    assert [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has …"),
            " (it asked for 2.50 GiB more)",
        ),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 800 bytes."),
            " (it asked for 800 bytes more)",
        ),
        (MemoryError(), ""),
    ],
)
def test_out_of_memory_says_in_which_phase_and_what_to_lower(
    error: Exception, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("rlhf_core.training.local_role.LocalRole.train", fail)
    assert broken_run(tmp_path) == (
        f"out of memory in phase 'train' of step 1{wanted}, and there is no checkpoint yet (save_every=…); lower "
        'micro_tokens=… or chunk=…, or add on_oom="halve" (results stay the same in all three)'
    )


def test_any_other_error_is_a_bug_and_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr("rlhf_core.training.local_role.LocalRole.train", fail)
    with pytest.raises(RuntimeError, match="something else"):
        tiny_run(tmp_path, model=MODEL).train()


# ----------------------------------------------------------------------------------------------------------------------
# signals
# ----------------------------------------------------------------------------------------------------------------------


def signalled(signals: list[signal.Signals]) -> Registry:
    """Observers, one of which sends this process signals at the end of the first step."""

    class Sender:
        @hookimpl
        def rlhf_step_end(self, run: Run, step: int) -> None:
            for number in signals if step == 1 else ():
                os.kill(os.getpid(), number)

    registry = Registry()
    registry.register(Sender(), "sender")
    return registry


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 75)])
def test_the_first_signal_lets_the_step_finish_and_saves(number: signal.Signals, code: int, tmp_path: Path) -> None:
    before = signal.getsignal(number)
    with pytest.raises(RunStopped) as caught:
        tiny_run(tmp_path, registry=signalled([number]), model=MODEL, steps=2).train()
    assert caught.value.exit_code == code
    assert str(caught.value) == f'stopped after step 1 of 2; continue with resume=True output="{tmp_path}"'
    assert [folder.name for folder in valid_checkpoints(tmp_path)] == ["step-1"]
    assert signal.getsignal(number) == before
    tiny_run(tmp_path, model=MODEL, steps=2, resume=True).train()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]


def test_the_second_signal_stops_at_once(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        tiny_run(tmp_path, registry=signalled([signal.SIGINT, signal.SIGINT]), model=MODEL).train()
    assert valid_checkpoints(tmp_path) == []


@pytest.mark.parametrize("moment", ["rlhf_run_start", "rlhf_run_end"])
def test_a_preemption_notice_while_no_step_runs_exits_at_once_with_its_code(moment: str, tmp_path: Path) -> None:
    class Sender:
        @hookimpl
        def rlhf_run_start(self) -> None:
            if moment == "rlhf_run_start":
                signal.raise_signal(signal.SIGUSR1)

        @hookimpl
        def rlhf_run_end(self, error: BaseException | None) -> None:
            if moment == "rlhf_run_end":
                signal.raise_signal(signal.SIGUSR1)

    registry, before = Registry(), signal.getsignal(signal.SIGUSR1)
    registry.register(Sender(), "sender")
    with pytest.raises(SystemExit) as caught:
        tiny_run(tmp_path, registry=registry, model=MODEL).train()
    assert caught.value.code == 75
    assert signal.getsignal(signal.SIGUSR1) == before
    assert [folder.name for folder in valid_checkpoints(tmp_path)] == ([] if moment == "rlhf_run_start" else ["step-2"])


def test_a_preempted_command_saves_and_exits_with_the_code_that_asks_to_be_requeued(tmp_path: Path) -> None:
    """The way of a SLURM job: the notice, code 75, the same command again with --resume."""
    plugin = ["-p", "rlhf_core.testing.tiny_algorithm"]  # has no hooks; what matters is that the hint loads it again
    words = ["rlhf_core.testing.tiny_algorithm:TinyAlgorithm", "--model", MODEL, "--output", str(tmp_path / "run")]
    words += ["--batch-size", "2", "--sampling.max-new-tokens", "4", "--save-async"]
    process = subprocess.Popen(
        [sys.executable, "-m", "rlhf_core", *plugin, *words, "--steps", "100000"], stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not metrics.exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 75, said
    assert "SIGUSR1: finishing this step, then saving" in said
    (saved,) = valid_checkpoints(tmp_path / "run")
    done = int(saved.name.removeprefix("step-"))
    file = str(tmp_path / "run" / "config.toml")
    assert (
        f"stopped after step {done} of 100000; continue with rlhf-run {shlex.join(plugin)} --config {file} --resume\n"
        in said
    )
    hint = said.strip().rpartition("continue with ")[2]
    again = shlex.split(hint.replace("rlhf-run", f"{sys.executable} -m rlhf_core", 1))  # as typed, with this Python
    assert subprocess.run([*again, "--steps", str(done + 1)]).returncode == 0
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(range(1, done + 2))
