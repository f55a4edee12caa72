"""A folder of somebody else's runs no code, and a configuration writes nowhere but into its output folder."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from rlhf_core.analysis.sweep import read_sweep
from rlhf_core.errors import RlhfError, UsageError
from rlhf_core.reward.serve import ServeReward
from rlhf_core.testing import tiny_run
from rlhf_core.util.atomic_files import check_links, inside

MODEL = "tiny:hidden=16,layers=1"


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def poison(tmp_path: Path) -> bytes:
    """A pickle; whether it was read is seen by the folder `owned`."""
    return pickle.dumps(Evil(tmp_path / "owned"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    tiny_run(folder, model=MODEL, save_every=1).train()
    return folder


def attempted(output: Path, **options: Any) -> str:
    """Return the error of a run that must fail; empty if it succeeds."""
    try:
        tiny_run(output, **{"model": MODEL, "steps": 1, **options}).train()
    except RlhfError as error:
        return str(error)
    return ""


# ----------------------------------------------------------------------------------------------------------------------
# pickles
# ----------------------------------------------------------------------------------------------------------------------


def test_the_poison_works(poison: bytes, tmp_path: Path) -> None:
    pickle.loads(poison)
    assert (tmp_path / "owned").is_dir()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "training_args.bin", "optimizer.pt"])
@pytest.mark.parametrize("weights", [True, False], ids=["beside", "instead"])
def test_no_pickle_of_a_model_folder_is_read(
    name: str, weights: bool, poison: bytes, trained: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(trained / "model", tmp_path / "model")
    (folder / name).write_bytes(poison)
    if not weights:
        (folder / "model.safetensors").unlink()
    said = attempted(tmp_path / "run", model=str(folder))
    assert ("pickled weights can run code and are not loaded" in said) is not weights, said
    assert not (tmp_path / "owned").exists()


def test_no_pickle_of_an_adapter_is_read(poison: bytes, trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {
        "base_model_name_or_path": str(trained / "model"),
        "peft_type": "LORA",
        "r": 2,
        "target_modules": ["q_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.bin").write_bytes(poison)
    assert "pickled weights can run code" in attempted(tmp_path / "run", model=str(folder))
    assert not (tmp_path / "owned").exists()


def test_no_pickle_of_a_checkpoint_is_read(poison: bytes, trained: Path, tmp_path: Path) -> None:
    """Each file of the newest checkpoint is replaced in turn, and pickles under usual names are laid beside."""
    files = sorted(
        path.relative_to(trained) for path in (trained / "checkpoints" / "step-2").rglob("*") if path.is_file()
    )
    for number, name in enumerate(files):
        run = shutil.copytree(trained, tmp_path / f"run-{number}")
        (run / name).write_bytes(poison)
        for extra in ("random.pt", "optimizer.pt", "rng.pkl"):
            if not (run / name).with_name(extra).exists():
                (run / name).with_name(extra).write_bytes(poison)
        attempted(run, resume=True, steps=2, save_every=1)
        assert not (tmp_path / "owned").exists(), name


@pytest.mark.parametrize("name", ["rows.pkl", "rows.json", "rows.jsonl", "rows.parquet", "rows.arrow", "rows.csv"])
@pytest.mark.parametrize("reader", ["json", "hf"])
def test_no_pickle_is_read_as_data(reader: str, name: str, poison: bytes, tmp_path: Path) -> None:
    if reader == "hf":
        pytest.importorskip("datasets")
    (tmp_path / name).write_bytes(poison)
    attempted(tmp_path / "run", data={"use": reader, "path": str(tmp_path / name)})
    assert not (tmp_path / "owned").exists()


def test_no_pickle_is_read_from_the_cache_of_rows(poison: bytes, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Hello"}\n{"prompt": "Bye"}\n')
    options = {"data": {"use": "json", "path": str(tmp_path / "rows.jsonl"), "cache": str(tmp_path / "cache")}}
    assert attempted(tmp_path / "first", **options) == ""
    cached = list((tmp_path / "cache").iterdir())
    assert cached
    for path in cached:
        path.write_bytes(poison)
    attempted(tmp_path / "second", **options)
    assert not (tmp_path / "owned").exists()


# ----------------------------------------------------------------------------------------------------------------------
# paths
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "samples.jsonl", "config.toml", "checkpoints", "model", "tensorboard"]
)
def test_a_link_in_the_output_folder_that_leads_out_of_it_is_refused(name: str, tmp_path: Path) -> None:
    output, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    output.mkdir()
    elsewhere.mkdir() if "." not in name else elsewhere.write_text("mine")
    (output / name).symlink_to(elsewhere)
    said = attempted(output)
    assert said == f"{output / name} is a link that points outside {output}; remove it, or name another output=…"
    assert elsewhere.read_text() == "mine" if elsewhere.is_file() else not list(elsewhere.iterdir())


def test_links_within_the_folder_and_a_folder_that_is_a_link_are_fine(tmp_path: Path) -> None:
    (tmp_path / "real" / "part").mkdir(parents=True)
    (tmp_path / "real" / "latest").symlink_to("part")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    check_links(tmp_path / "link")


@pytest.mark.parametrize("name", ["..", "../x", "a/../../x", "/etc", ".", "out/x"])
def test_a_name_that_leads_out_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "out").symlink_to(tmp_path)
    with pytest.raises(UsageError, match="points outside"):
        inside(tmp_path / "run", name)
    assert inside(tmp_path / "run", "a/../b.c") == tmp_path / "run" / "a/../b.c"


@pytest.mark.parametrize("line", ['discard = ["../.."]', 'discard = ["/"]'])
def test_a_sweep_discards_nothing_outside_its_runs(line: str, tmp_path: Path) -> None:
    path = tmp_path / "sweep.toml"
    path.write_text(f'{line}\n[grid]\nalgorithm = ["grpo"]\n')
    with pytest.raises(UsageError, match="points outside"):
        read_sweep(path)


# ----------------------------------------------------------------------------------------------------------------------
# servers
# ----------------------------------------------------------------------------------------------------------------------


def test_the_reward_server_is_on_the_loopback_interface_and_asks_for_a_token_unless_told_otherwise() -> None:
    options = {name: field.default for name, field in ServeReward.__dataclass_fields__.items()}
    assert socket.gethostbyname(options["host"]).startswith("127.")
    assert options["token"] == "", "empty: one is made up; `none` would let everybody ask"
