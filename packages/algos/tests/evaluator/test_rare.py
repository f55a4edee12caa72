"""Storage of rare outputs: tables of held-out samples, and bad samples found in training."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_algos.evaluator.bad_samples import BadSamples, samples_as_batch
from rlhf_algos.evaluator.heldout_table import HeldoutTable
from rlhf_algos.reward.keep_bad import KeepBad
from rlhf_core import Run, make_config
from rlhf_core.analysis.tables import read_columns
from rlhf_core.cli.app import main
from rlhf_core.errors import MissingPackage, UsageError
from rlhf_core.testing.tiny import tiny_rollouts

MODEL = "tiny:hidden=16,layers=1"
NAMES = ["pass", "uid", "k", "prompt", "completion", "tokens", "finish", "reward", "kl", "return", "logprob"]


def run_of(output: Path, **options: Any) -> Run:
    small: dict[str, Any] = {"model": MODEL, "steps": 2, "batch_size": 2, "output": str(output)}
    small |= {"sampling": {"n": 2, "max_new_tokens": 3}, "reward": {"use": "length", "target": 3}}
    return Run(make_config("rloo", **(small | options)))


def test_a_table_has_a_row_a_completion_with_named_columns(tmp_path):
    pytest.importorskip("pyarrow")
    run = run_of(tmp_path, evaluator=HeldoutTable(prompts=3, n=2, passes=2, batch=2, kl_coef=0.5))
    run.train()
    table = read_columns(tmp_path / "heldout.parquet", NAMES)
    assert list(zip(table["pass"], table["uid"], table["k"])) == [
        (p, uid, k) for p in range(2) for uid in range(3) for k in range(2)
    ]
    assert run.evaluations[0] == (2, run.evaluations[0][1]), "at the end alone"
    found = run.evaluations[-1][1]
    assert found["eval/heldout_table/samples"] == 12
    assert found["eval/heldout_table/worst"] == min(table["reward"])
    assert found["eval/heldout_table/return"] == pytest.approx(sum(table["return"]) / 12, abs=1e-9)
    for reward, kl, back in zip(table["reward"], table["kl"], table["return"]):
        assert back == pytest.approx(reward - 0.5 * kl, abs=1e-12)
    assert any(kl != 0 for kl in table["kl"]), "two steps moved the policy away from its reference"
    assert table["completion"][:6] != table["completion"][6:], "another pass draws again"


def test_a_table_does_not_depend_on_how_prompts_are_batched(tmp_path):
    pytest.importorskip("pyarrow")
    tables = []
    for batch in (1, 32):
        output = tmp_path / str(batch)
        run_of(output, steps=0, evaluator=HeldoutTable(prompts=4, batch=batch)).train()
        tables.append(read_columns(output / "heldout.parquet", ["uid", "completion", "reward"]))
    assert tables[0] == tables[1]


@pytest.mark.parametrize(("prompts", "ranks", "batch"), [(65, 2, 32), (3, 2, 1), (1, 2, 4), (7, 3, 2), (8, 4, 2)])
def test_ranks_ask_for_every_prompt_once_and_equally_often(prompts, ranks, batch):
    """They infer together: one that asked less often would meet the others in another of their gathers."""
    fitting = [2 * i for i in range(prompts)]
    shares = [list(HeldoutTable(batch=batch)._shares(fitting, rank, ranks)) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(i for share in shares for part in share for i in part) == fitting
    assert all(len(part) <= batch for share in shares for part in share)


def test_prompts_that_do_not_fit_are_left_out_and_some_must_fit(tmp_path):
    pytest.importorskip("pyarrow")
    run = run_of(tmp_path, steps=0, max_prompt_tokens=8, evaluator=HeldoutTable(n=1))
    lengths = {}
    with run.open():
        for uid, row in enumerate(run.heldout()):
            lengths[uid] = len(run.encoder.prompt_row(row).ids)
    limit = min(lengths.values())
    run_of(tmp_path / "some", steps=0, max_prompt_tokens=limit, evaluator=HeldoutTable(n=1)).train()
    found = read_columns(tmp_path / "some" / "heldout.parquet", ["uid"])["uid"]
    assert found == [uid for uid, length in lengths.items() if length <= limit]
    with pytest.raises(UsageError, match="every held-out prompt is too long; raise max_prompt_tokens=…"):
        run_of(tmp_path / "none", steps=0, max_prompt_tokens=limit - 1, evaluator=HeldoutTable(n=1)).train()


def test_a_run_whose_table_needs_rows_that_are_not_held_out_stops_at_its_start(tmp_path):
    pytest.importorskip("pyarrow")
    rows = [{"prompt": f"say {number}"} for number in range(4)]
    run = run_of(tmp_path, data=rows, evaluator=HeldoutTable(n=1))
    with pytest.raises(UsageError, match="no rows are held out"):
        run.train()
    assert run.step == 0


SWEEP = """
output = "out"
discard = ["model", "checkpoints"]
[variants.rloo]
model = "tiny:hidden=16,layers=1"
algorithm = "rloo"
data = "prompts"
reward = { use = "length", target = 3 }
batch_size = 2
steps = 0
sampling = { n = 2, max_new_tokens = 3 }
evaluator = { use = "heldout_table", prompts = 3, n = 2, passes = 2, batch = 1, kl_coef = 0.5 }
"""


@pytest.mark.slow
def test_a_sweep_of_two_ranks_a_run_gathers_the_table_that_one_process_leaves_and_frontier_reads_it(
    tmp_path, monkeypatch
):
    """Three prompts over two ranks, one at a time: the rows are all there, in one order, and those of one process."""
    pytest.importorskip("pyarrow")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    tables = []
    for processes in (1, 2):
        Path("sweep.toml").write_text(f"processes = {processes}\n{SWEEP}".replace('"out"', f'"out{processes}"'))
        assert main(["sweep", "sweep.toml"]) == 0, Path(f"out{processes}/rloo-seed0/log.txt").read_text()
        tables.append(read_columns(tmp_path / f"out{processes}" / "rloo-seed0" / "heldout.parquet", NAMES))
    for name in ("pass", "uid", "k", "completion", "reward", "finish"):
        assert tables[0][name] == tables[1][name], name
    assert len(tables[1]["uid"]) == 12
    assert tables[1]["logprob"] == pytest.approx(tables[0]["logprob"], abs=1e-4)
    assert main(["frontier", "sweep.toml", "--threshold", "-0.5", "--formats"]) == 0
    with Path("frontier.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["bad"]) == sum(reward < -0.5 for reward in tables[1]["reward"]) / 12


def test_a_model_is_not_measured_against_itself(tmp_path, monkeypatch, capsys):
    """`rlhf-run eval` has no training that a reference could be the start of."""
    pytest.importorskip("pyarrow")
    monkeypatch.chdir(tmp_path)
    words = ["eval", MODEL, "--evaluator", "heldout_table", "--evaluator.kl-coef", "0.2", "--evaluator.prompts", "1"]
    words += ["--reward", "length", "--reward.target", "2", "--data", "prompts"]
    assert main(words) == 2
    assert "pass --reference.model, for example with the model that training started from" in capsys.readouterr().err
    assert main([*words, "--reference.model", f"{MODEL},seed=1"]) == 0
    assert any(read_columns(tmp_path / "evaluation" / "heldout.parquet", ["kl"])["kl"])


def test_without_parquet_the_run_says_so_before_it_starts(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(MissingPackage, match=r"rlhf-core\[datasets\]"):
        run_of(tmp_path, evaluator=HeldoutTable()).train()


def test_bad_samples_are_kept_once_by_token_ids_and_survive_a_restart(tmp_path):
    path = str(tmp_path / "kept" / "bad.jsonl")
    reward = KeepBad("length target=2", threshold=-1.0, path=path)
    rollouts = tiny_rollouts(2, 3)
    output = reward(rollouts)
    bad = {i for i, value in enumerate(output.rewards_N.tolist()) if value < -1.0}
    assert 0 < len(bad) < 6
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    assert [row["reward"] for row in rows] == [pytest.approx(float(output.rewards_N[i])) for i in sorted(bad)]
    assert rows[0]["ids"] == rollouts.tokens_NT[min(bad), : rollouts.lengths_N[min(bad)]].tolist()
    reward(rollouts)
    KeepBad("length target=2", threshold=-1.0, path=path)(rollouts)
    assert len(Path(path).read_text().splitlines()) == len(bad)
    Path(path).write_text("{}\n")
    with pytest.raises(UsageError, match="is not a file of bad samples"):
        KeepBad("length target=2", threshold=-1.0, path=path)(rollouts)


def test_the_policy_is_measured_on_the_bad_samples_that_a_run_found(tmp_path):
    """Against plain forward passes over the saved ids."""
    path = str(tmp_path / "bad.jsonl")
    keep = {"use": "keep_bad", "of": "length target=3", "threshold": 0.0, "path": path}
    run = run_of(tmp_path / "run", reward=keep, evaluator=BadSamples(path), steps=1)
    Path(path).write_text('{"prompt_ids": [5, 6], "ids": [7]}\n{"prompt_ids": [5, 6], "ids": [8, 9]}\n')
    with run.open():
        found = BadSamples(path)(run)
        role: Any = run.roles["actor"]
        with torch.inference_mode():
            log_softmax = role.causal_lm(torch.tensor([[5, 6, 8, 9]])).logits[0].log_softmax(-1)
        one, two = float(log_softmax[1, 7]), float(log_softmax[1, 8] + log_softmax[2, 9])
    assert found["bad_samples/logprob"] == pytest.approx((one + two) / 2, abs=1e-5)
    assert found["bad_samples/log_mass"] == pytest.approx(math.log(math.exp(one) + math.exp(two)), abs=1e-5)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), ("", "contains no samples"), ('{"ids": [1]}\n', "bad.jsonl:1: expected")],
)
def test_a_file_without_samples_is_refused_in_one_line(content, message, tmp_path):
    if content is not None:
        (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(UsageError, match=message):
        BadSamples(str(tmp_path / "bad.jsonl"))._rows()


def test_saved_samples_are_read_by_their_ids():
    batch = samples_as_batch([{"prompt_ids": [1], "ids": [2, 3]}, {"prompt_ids": [4, 5], "ids": [6]}])
    assert batch.mask_NT.tolist() == [[True, True], [True, False]]
    assert batch.prompt_lengths_N.tolist() == [1, 2]
