"""Whole runs whose episodes an agent drives over HTTP: two ranks and a killed run play the episodes of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_core.cli import main
from rlhf_core.testing import run_ranks

AGENT = '''
import json, os, signal, urllib.request
from pathlib import Path

def play(base_url, api_key, example, seed):
    """Asks while a turn begins with an even token, at most four times; writes down the episode."""
    ids, rewards, kill = list(str(example.prompt).encode()), [], Path(os.environ["KILL"])
    while len(rewards) < 4:
        if seed == int(os.environ.get("KILLED_SEED", -1)) and not kill.exists():
            kill.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        body = json.dumps({"prompt": ids, "max_tokens": 3, "return_token_ids": True}).encode()
        headers = {"Authorization": "Bearer " + api_key}
        request = urllib.request.Request(base_url + "/completions", body, headers)
        answer = json.load(urllib.request.urlopen(request, timeout=300))
        turn = answer["choices"][0]["token_ids"]
        rewards.append(float(turn[0] % 2 == 0))
        ids += [*turn, *b" more"]
        if not rewards[-1]:
            break
    name = f"{seed}-{os.getpid()}-{api_key[:9].encode().hex()}"
    Path(os.environ["EPISODES"], name).write_text(json.dumps([seed, ids, rewards]))
    return {"turn_rewards": rewards, "score": rewards[0]}
'''
"""Every episode is a file: what was read and written, and what it earned."""


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    agent = tmp_path / "agent.py"
    agent.write_text(AGENT)
    monkeypatch.setenv("KILL", str(tmp_path / "killed"))
    return [
        "rlhf_core.testing.tiny_algorithm:TinyAlgorithm",
        *("--model", "tiny:hidden=16,layers=1", "--batch-size", "4", "--steps", "3"),
        *("--environment", "harness", "--environment.agent", f"{agent}:play"),
        *("--advantage", "test_checkpoint_ranks:Uncoupled"),
        *("--sampling.n", "2", "--sampling.max-new-tokens", "60", "--actor.optim.lr", "1e-2"),
    ]


def outcome(output: Path, episodes: Path) -> tuple[list[dict[str, Any]], list[Any]]:
    """Return the metrics of the steps, and the episodes in an order that does not depend on who played first."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return rows, sorted(json.loads(each.read_text()) for each in episodes.iterdir())


def seed_of(episode: Path) -> str:
    """Return the seed in the name of an episode, which the completions of a prompt share."""
    return episode.name.split("-")[0]


def start(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[str]:
    """Return the flags of a run that writes below `folder`."""
    folder.mkdir()
    (folder / "episodes").mkdir()
    monkeypatch.setenv("EPISODES", str(folder / "episodes"))
    return ["--output", str(folder / "run")]


def assert_same(straight: Path, other: Path) -> None:
    first, second = (outcome(each / "run", each / "episodes") for each in (straight, other))
    assert second[1] == first[1]
    for one, two in zip(first[0], second[0], strict=True):
        for name in ("loss/actor", "reward/mean", "completion/turns", "completion/feedback", "completion/segments"):
            assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-4), name
    assert len({len(episode[2]) for episode in first[1]}) > 2, "all episodes had as many turns: this test shows nothing"


def test_two_ranks_play_the_episodes_of_one_process(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank serves its own agents, whose numbers of turns differ."""
    assert main([*words, *start(monkeypatch, tmp_path / "one")]) == 0
    done = run_ranks(2, main, [*words, *start(monkeypatch, tmp_path / "two")])
    assert not any(rank.code for rank in done), done[-1].stderr[-3000:]
    assert_same(tmp_path / "one", tmp_path / "two")
    pids = {each.name.split("-")[1] for each in (tmp_path / "two" / "episodes").iterdir()}
    assert len(pids) == 2


def test_a_run_killed_inside_an_episode_resumes_with_the_episodes_of_a_straight_one(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL while agents of the third step play: that step's episodes are played again, and no others."""
    assert main([*words, *start(monkeypatch, tmp_path / "one")]) == 0
    played = sorted((tmp_path / "one" / "episodes").iterdir(), key=lambda each: each.stat().st_mtime_ns)
    third = {seed_of(each) for each in played[-8:]}
    assert third.isdisjoint(map(seed_of, played[:-8]))
    monkeypatch.setenv("KILLED_SEED", seed_of(played[-1]))
    flags = [*start(monkeypatch, tmp_path / "two"), "--save-every", "1"]
    (done,) = run_ranks(1, main, [*words, *flags])
    assert (done.code, (tmp_path / "killed").exists()) == (-9, True), done.stderr[-3000:]
    before = set((tmp_path / "two" / "episodes").iterdir())
    for each in before:
        if seed_of(each) in third:
            each.unlink()  # it is played again
    assert main([*words, *flags, "--resume"]) == 0
    assert {seed_of(each) for each in (tmp_path / "two" / "episodes").iterdir() if each not in before} == third
    assert_same(tmp_path / "one", tmp_path / "two")
