"""Trackers take every number of a run once, a resumed run goes on in the same one, and nothing that is secret leaves."""

from __future__ import annotations

import json
import os
import struct
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest

from rlhf_core import Rollouts, Run, Secret, UsageError
from rlhf_core.contract.providers import Evaluator, Reward
from rlhf_core.errors import MissingPackage
from rlhf_core.observer.mlflow import MLflow
from rlhf_core.observer.tensorboard import TensorBoard
from rlhf_core.observer.tracker import tracker_run_id
from rlhf_core.observer.wandb import Wandb
from rlhf_core.testing import check_observer, tiny_run

MODEL = "tiny:hidden=16,layers=1"

TRACKERS = [(TensorBoard(), "tensorboard"), (Wandb(mode="offline"), "wandb"), (MLflow(), "mlflow")]

MLFLOW_WARNS = pytest.mark.filterwarnings("ignore:The ``noload``:DeprecationWarning")
"""MLflow 3.17 under SQLAlchemy 2.1"""


@pytest.fixture(scope="module", autouse=True)
def service() -> Iterator[None]:
    """wandb's own process has all the time it needs to start, reports nothing, and ends here rather than in another test."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("WANDB__SERVICE_WAIT", "600")
        environment.setenv("WANDB_INIT_TIMEOUT", "600")
        environment.setenv("WANDB_ERROR_REPORTING", "false")
        yield
        if "wandb" in sys.modules:
            sys.modules["wandb"].teardown()


@dataclass(frozen=True)
class Ends(Evaluator):
    """Evaluator with known numbers: the progress of the run."""

    def __call__(self, run: Run) -> Mapping[str, float]:
        return {"done": float(run.step)}


@dataclass(frozen=True)
class Guarded(Reward):
    """A reward that has a secret."""

    token: Annotated[str, Secret()] = ""
    """nobody may see it"""

    def __call__(self, rollouts: Rollouts) -> list[float]:
        return [float(len(text)) for text in rollouts.texts]


def rows(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def numbers(output: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the numbers in a run's files, by name: (step, number)."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows(output):
        for name, value in row.items():
            if name != "step" and not name.startswith("eval/"):
                found.setdefault(name, []).append((row["step"], value))
    return found


def train(output: Path, **options: Any) -> Run:
    run = tiny_run(output, model=MODEL, evaluator=Ends(), **options)
    run.train()
    return run


# ----------------------------------------------------------------------------------------------------------------------
# TensorBoard: read back with its own reader
# ----------------------------------------------------------------------------------------------------------------------


def scalars(output: Path) -> dict[str, list[tuple[int, float]]]:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    return {name: [(each.step, each.value) for each in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_tensorboard_reads_every_number_of_the_run_and_the_evaluations(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    train(tmp_path, observer=TensorBoard(samples_every=1), steps=3)
    read = scalars(tmp_path)
    for name, expected in numbers(tmp_path).items():
        assert read[name] == [(step, pytest.approx(value)) for step, value in expected], name
    assert read["eval/done"] == [(0, 0.0), (3, 3.0)]


def test_tensorboard_shows_no_step_twice_after_an_interrupted_run_went_on(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    train(tmp_path, observer=TensorBoard(), steps=3, save_every=2, keep=9)
    later = tmp_path / "checkpoints" / "step-3"  # as if the third step had been logged, and not saved
    later.rename(tmp_path / "gone")
    train(tmp_path, observer=TensorBoard(), steps=4, save_every=2, keep=9, resume=True)
    assert [step for step, _ in scalars(tmp_path)["reward/mean"]] == [1, 2, 3, 4]


# ----------------------------------------------------------------------------------------------------------------------
# Weights & Biases, offline: its file is a log of protocol buffers
# ----------------------------------------------------------------------------------------------------------------------


def records(file: Path) -> Iterator[Any]:
    """The records of a .wandb file: LevelDB's log format (blocks of 32 KiB; checksum, length, type) after 7 bytes."""
    messages = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    content, at, held = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # the end of a block is too short for a header, and empty
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        held += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = messages.Record()
            record.ParseFromString(held)
            yield record
            held = b""


def history(output: Path) -> list[dict[str, Any]]:
    """The rows that wandb logged, sessions one after the other."""
    pytest.importorskip("wandb").teardown()  # waits for its process, which writes on after a run is finished
    found = []
    for file in sorted(output.glob("wandb/offline-run-*/run-*.wandb")):
        for record in records(file):
            if record.WhichOneof("record_type") == "history":
                items = {(each.key or "/".join(each.nested_key)): each.value_json for each in record.history.item}
                found.append({name: json.loads(value) for name, value in items.items()})
    return found


def test_wandb_offline_holds_every_number_the_options_and_tables_of_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")
    monkeypatch.delenv("WANDB_DATA_DIR", raising=False)
    secret = "hunter2-hunter2"
    train(tmp_path, observer=Wandb(project="p", mode="offline", samples_every=1), reward=Guarded(token=secret), steps=2)
    logged = history(tmp_path)
    for name, expected in numbers(tmp_path).items():
        assert [(row["_step"], row[name]) for row in logged if name in row] == expected, name
    assert [(row["_step"], row["eval/done"]) for row in logged if "eval/done" in row] == [(0, 0.0), (2, 2.0)]
    assert list((tmp_path / "wandb/artifacts/staging").iterdir()), "what waits to be sent is in the run's folder"
    assert "WANDB_DATA_DIR" not in os.environ
    tables = sorted((tmp_path / "wandb").glob("offline-run-*/files/media/table/completions_*.json"))
    table = json.loads(tables[0].read_text())
    assert table["columns"] == ["step", "source", "prompt", "completion", "row", "reward", "advantage"]
    first = json.loads((tmp_path / "samples.jsonl").read_text().splitlines()[0])
    assert table["data"][0] == list(first.values())
    for path in tmp_path.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert secret.encode() not in content and b"0123456789abcdef0123456789abcdef01234567" not in content, path


def test_a_resumed_run_goes_on_in_the_same_run_of_wandb(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    tracked = Wandb(mode="offline", samples_every=0)
    hooks = sys.exit, sys.excepthook
    train(tmp_path, observer=tracked, steps=1)
    train(tmp_path, observer=tracked, steps=2, resume=True)
    (ident,) = set(json.loads((tmp_path / "trackers.json").read_text()).values())
    files = sorted(path.name for path in tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert files == [f"run-{ident}.wandb"] * 2
    assert [row["_step"] for row in history(tmp_path) if "reward/mean" in row] == [1, 2]
    assert (sys.exit, sys.excepthook) == hooks, "wandb replaces them for the process"


def test_online_without_a_key_ends_before_anything_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")

    def refuse() -> None:
        raise wandb.errors.UsageError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr(wandb, "login", refuse)
    with pytest.raises(UsageError) as caught:
        train(tmp_path / "run", observer=Wandb(mode="online"))
    assert str(caught.value) == (
        "observer wandb: No API key configured. Use `wandb login` to log in. (or log only on this machine with "
        'Wandb(mode="offline"))'
    )
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tracker", "name"), [(TensorBoard(), "tensorboard"), (Wandb(mode="offline"), "wandb"), (MLflow(), "mlflow")]
)
def test_a_package_that_is_missing_is_one_line_before_anything_is_started(
    tracker: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf_core.observer.tracker.find_spec", lambda module: None)
    with pytest.raises(MissingPackage) as caught:
        train(tmp_path / "run", observer=tracker)
    assert str(caught.value) == f"observer {name} needs {name}: python3 -m pip install 'rlhf-core[{name}]'"
    assert not (tmp_path / "run").exists()


@MLFLOW_WARNS
@pytest.mark.parametrize(
    ("tracker", "name"), [(TensorBoard(), "tensorboard"), (Wandb(mode="offline"), "wandb"), (MLflow(), "mlflow")]
)
def test_trackers_keep_the_contract_of_observers(tracker: Any, name: str) -> None:
    pytest.importorskip(name)
    check_observer(tracker)


# ----------------------------------------------------------------------------------------------------------------------
# MLflow: read back with its own client
# ----------------------------------------------------------------------------------------------------------------------


def tracked_by_mlflow(output: Path) -> Any:
    client = pytest.importorskip("mlflow").MlflowClient(tracking_uri=f"sqlite:///{output / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("p").experiment_id])
    return client, run


@MLFLOW_WARNS
def test_mlflow_holds_every_number_once_and_the_options_after_an_interrupted_run_went_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tracked = MLflow(experiment="p")
    options: dict[str, Any] = {"observer": tracked, "reward": Guarded(token="hunter2-hunter2"), "save_every": 2}
    train(tmp_path, **options, steps=3, keep=9)
    later = tmp_path / "checkpoints" / "step-3"  # as if the third step had been logged, and not saved
    later.rename(tmp_path / "gone")
    train(tmp_path, **options, steps=4, keep=9, resume=True)
    client, run = tracked_by_mlflow(tmp_path)
    for name, expected in numbers(tmp_path).items():
        found = [(each.step, each.value) for each in client.get_metric_history(run.info.run_id, name)]
        if not name.startswith(("time/", "speed/", "memory/")):  # the third step took another time
            assert found == [(step, pytest.approx(value)) for step, value in expected], name
        assert [step for step, _ in found] == [step for step, _ in expected], name
    assert run.data.params["sampling.n"] == str(tiny_run(tmp_path / "x").config.sampling.n)
    assert run.info.status == "FINISHED"
    assert b"hunter2-hunter2" not in (tmp_path / "mlflow.db").read_bytes()


@pytest.mark.parametrize("content", [b"", b"\0" * 9, b"[]", b'{"x": 3}', b'{"x": ""}', b"\xff", b"[" * 99_999, None])
def test_a_damaged_file_of_ids_is_named_and_the_run_is_a_new_one(
    content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny_run(tmp_path, model=MODEL, resume=True)
    first = tracker_run_id(run, "x")
    assert tracker_run_id(run, "x") == first
    if content is not None:
        (tmp_path / "trackers.json").write_bytes(content)
    assert (tracker_run_id(run, "x") == first) == (content is None)
    said = capsys.readouterr().err
    assert ("trackers.json is damaged, so trackers show the resumed run as a new run" in said) == (content is not None)
