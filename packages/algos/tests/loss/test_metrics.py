"""Every number that a run logs has exactly one documented name, with its unit and its meaning."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf_algos import plugin
from rlhf_core import Run, make_config
from rlhf_core.plugins.metric_catalogue import METRICS, matches_documented
from rlhf_core.plugins.registry import default_registry

ROOT = Path(__file__).resolve().parents[4]
ROWS = [
    {
        "prompt": f"say {word}",
        "completion": word.upper(),
        "chosen": word.upper(),
        "rejected": word,
        "label": word != "b",
        "steps": word.upper() + ";",
        "judged": ["+" if len(word) > 1 else "-"],
        "datasource": "one/half" if len(word) > 1 else "two",
    }
    for word in ("alpha", "b", "gamma", "delta", "epsilon", "zeta")
]
FIELDS = {
    **dict.fromkeys(("sft", "csft", "distill"), ("prompt", "completion", "label")),
    "kto": ("prompt", "completion", "label"),
    "prm": ("prompt", "steps", "judged"),
    **dict.fromkeys(
        ("dpo", "aot", "bco_pair", "cdpo", "ipo", "orpo", "simpo", "reward", "active_reward"),
        ("prompt", "chosen", "rejected"),
    ),
}
ONLINE: dict[str, Any] = {"reward": "length", "sampling": {"n": 2, "max_new_tokens": 4, "top_p": 0.9}}
MORE: dict[str, dict[str, Any]] = {
    "gdpo": {"reward": {"use": "sum", "parts": ["length", "regex pattern=a"]}},
    "prm": {"loss": {"use": "prm", "placeholder": ord(";")}},
    "on_policy_distill": {"teacher": {"model": "tiny:hidden=16,layers=1"}},
    "ppo": {"loss": {"use": "clip", "correction": {"level": "token"}}},
    "grpo": {
        "evaluator": ["heldout", "policy_stats", "pass_at_k"],
        "algorithm": {"use": "grpo", "kl": {"where": "loss"}, "shaping": {"clip": 5.0}},
    },
}
PARTS = {"gdpo": ("length", "regex")}
"""What the metrics of a sum of rewards are called after."""
KEYS = {"prm": {"completion_key": "steps", "label_key": "judged"}}
"""Columns whose names the reader does not know."""


def logged(algorithm: str, folder: Path) -> tuple[set[str], dict[str, Any]]:
    """The names that a run of two steps logs, and what the placeholders of their names stand for in it."""
    online = "rollout" in getattr(default_registry().resolve("algorithm", algorithm), "defaults", {})
    rows = [{key: row[key] for key in (*FIELDS.get(algorithm, ("prompt",)), "datasource")} for row in ROWS]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options: dict[str, Any] = {"algorithm": algorithm, **(ONLINE if online else {}), **MORE.get(algorithm, {})}
    made = make_config(
        options.pop("algorithm"),
        data={
            "use": "json",
            "path": str(path),
            "heldout": 0.4,
            "encoding": {"template": "raw"},
            **KEYS.get(algorithm, {}),
        },
        steps=2,
        output=str(folder / "run"),
        **{"batch_size": 4, "save_every": 1, "model": "tiny:hidden=16,layers=1", **options},
    )
    run = Run(made)
    run.train()
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    words = {
        "role": run.plan.trained_roles,
        "source": run.plan.sources,
        "part": PARTS.get(algorithm, ()),
        "k": ("1", "4"),
    }
    words["datasource"] = ("one/half", "two")
    return {name for line in lines for name in json.loads(line)}, words


QUICK = ("sft", "dpo", "reward", "prm", "bco_pair", "ppo", "grpo", "gdpo", "sapo", "repulse")
ALGORITHMS = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in plugin.rlhf_algorithm()]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_name_that_a_run_logs_is_documented_exactly_once(algorithm: str, tmp_path: Path) -> None:
    names = [name for _, name, _ in default_registry().metrics()]
    seen, words = logged(algorithm, tmp_path)
    for name in sorted(seen):
        found = [each for each in names if matches_documented(each, name, words)]
        assert len(found) == 1, f"{name} is documented as {found}"


def test_time_speed_memory_padding_staleness_and_entropy_are_among_them(tmp_path: Path) -> None:
    names, _ = logged("grpo", tmp_path)
    phases = {f"time/{phase}" for phase in ("data", "rollout", "reward", "needs", "credit", "train", "sync", "step")}
    wanted = {
        "speed/tokens",
        "memory/process",
        "padding",
        "rollout/staleness",
        "rollout/kept_mass",
        "completion/entropy",
    }
    assert phases | wanted | {"time/checkpoint"} <= names


def test_each_has_a_unit_and_a_meaning_and_no_name_is_documented_twice() -> None:
    told = default_registry().metrics()
    assert len({name for _, name, _ in told}) == len(told) > 90
    assert not [name for _, name, said in told if not all(said.partition(": "))]


def test_the_page_is_current() -> None:
    checked = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "metrics_page.py"), "--check"], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize(
    ("documented", "name", "fits"),
    [
        ("loss/<role>", "loss/actor", True),
        ("loss/<role>", "loss/actor/more", False),
        ("[<source>/]reward/mean", "reward/mean", True),
        ("[<source>/]reward/mean", "proposal/reward/mean", True),
        ("reward/mean/<datasource>", "reward/mean/openai/gsm8k", True),
        ("eval/pass@<k>", "eval/pass@4", True),
        ("eval/pass@<k>", "eval/pass@4_se", False),
        ("<role>/kl", "critic/kl", False),
    ],
)
def test_placeholders_stand_for_words(documented: str, name: str, fits: bool) -> None:
    assert matches_documented(documented, name, {"role": ("actor",), "source": ("proposal",), "k": ("4",)}) is fits


def test_core_documents_what_core_logs_without_the_other_packages() -> None:
    assert {"loss/<role>", "time/step"} <= METRICS.keys()
