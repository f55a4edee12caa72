"""`benchmarks/gpu.py` rehearses every check, tells a failure and goes on, and keeps what it has when it is cut."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[4] / "benchmarks"

OWN = """
import os, time

def good(context):
    context.row(figure=1.5, word="a|b")
    context.note("it went well")

def bad(context):
    context.row(figure=2.0)
    raise RuntimeError("planted on purpose")

def wrong(context):
    context.expect("one is two", 1 == 2, "1 and 2")

def gone(context):
    os._exit(3)

def endless(context):
    context.row(figure=3.0)
    time.sleep(1000)
"""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu")


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    """Start the script; checks of `own` can be named."""
    (folder / "own.py").write_text(OWN)
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--rehearse", "--output", str(folder), *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def left_in(folder: Path) -> tuple[dict[str, Any], str]:
    """Return the checks of the JSON file, and the page."""
    return json.loads((folder / "gpu.json").read_text())["checks"], (folder / "gpu.md").read_text()


def test_every_check_has_a_result_in_a_rehearsal(tmp_path: Path) -> None:
    pytest.importorskip("rlhf_algos")
    child = start(tmp_path, "--minutes", "20")
    said, _ = child.communicate(timeout=1500)
    checks, page = left_in(tmp_path)
    assert child.returncode == 0, said + page
    assert {name: found["status"] for name, found in checks.items()} == dict.fromkeys(checks, "done")
    assert all(found["rows"] or found["notes"] for found in checks.values())
    assert "not judged in a rehearsal" in page
    for found in checks.values():
        assert f"## {found['title']}" in page


def test_a_failure_is_told_and_the_other_checks_go_on(tmp_path: Path) -> None:
    child = start(tmp_path, "--only", "own:bad", "own:wrong", "own:gone", "own:good")
    said, _ = child.communicate(timeout=300)
    checks, page = left_in(tmp_path)
    assert child.returncode == 1, said
    assert [checks[f"own:{name}"]["status"] for name in ("good", "bad", "wrong", "gone")] == [
        "done",
        "failed",
        "failed: one is two",
        "failed: the process ended with code 3",
    ]
    assert checks["own:bad"]["rows"] == [{"figure": 2.0}]
    assert "RuntimeError: planted on purpose" in page
    assert "| 1.5 | a\\|b |" in page
    assert page.count("it went well") == 1


def test_a_run_that_is_cut_keeps_what_it_has(tmp_path: Path) -> None:
    child = start(tmp_path, "--only", "own:good", "own:endless")
    end = time.monotonic() + 200
    while time.monotonic() < end:
        if (tmp_path / "gpu.json").exists() and left_in(tmp_path)[0]["own:endless"]["rows"]:
            break
        time.sleep(0.2)
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=60)
    checks, page = left_in(tmp_path)
    assert checks["own:good"]["status"] == "done"
    assert checks["own:endless"]["status"] == "running when this page was written"
    assert checks["own:endless"]["rows"] == [{"figure": 3.0}]
    assert "it went well" in page


def test_what_does_not_fit_into_the_minutes_is_told(tmp_path: Path) -> None:
    child = start(tmp_path, "--minutes", "0.1", "--only", "own:good")
    child.communicate(timeout=100)
    assert left_in(tmp_path)[0]["own:good"]["status"] == "not run: no time"


def test_a_check_that_is_not_there_is_named(script: ModuleType) -> None:
    with pytest.raises(SystemExit, match="no check is called 'decodin'; there are limits, training"):
        script.main(["--only", "decodin"])


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf"])
def test_minutes_that_are_no_time_are_refused(
    script: ModuleType, minutes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        script.main(["--minutes", minutes, "--only", "limits"])
    assert f"--minutes must be above 0, not {minutes}" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_is_named_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--only", "limits", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    assert (
        done.stderr
        == f"gpu.py: torch {torch.__version__} sees no GPU here; pass --rehearse to try the checks on the CPU\n"
    )


def test_missing_wheels_come_with_the_line_that_fetches_them(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tomli_w" else find_spec(name))
    assert script.main(["--list-wheels"]) == 0
    said = capsys.readouterr().out
    assert "tomli-w: core: writes config.toml" in said
    assert "pip download --no-deps --only-binary=:all: --python-version 3.12" in said
    assert said.strip().endswith("-d .whl tomli-w")


def test_time_with_a_kernel_counts_overlapping_spans_once(script: ModuleType) -> None:
    measure = importlib.import_module("gpu_checks.measure")
    assert measure.covered([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4
    assert measure.covered([]) == 0


def test_flops_are_those_of_the_matrix_products(script: ModuleType) -> None:
    """Counted by torch itself in a forward and backward pass with full attention matrices, of which half is causal."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaForCausalLM

    models = importlib.import_module("gpu_checks.models")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=64, num_hidden_layers=2, tie_word_embeddings=True, **sizes)
    config._attn_implementation = "eager"
    model, S = LlamaForCausalLM(config), 16
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(1, S, dtype=torch.long)).logits.sum().backward()
    norms = 5 * 32 * 6 * S  # weights of norms are parameters, and no matrix product
    half = 6 * 2 * 32 * S * (S - 1)  # eager attention computes what is masked too
    assert models.model_flops(model, [S]) == pytest.approx(counter.get_total_flops() - half + norms, rel=0.01)
