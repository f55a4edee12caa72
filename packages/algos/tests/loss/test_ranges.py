"""Every option that is a number says where it may lie; values outside are told before a run begins, the ends are not."""

from __future__ import annotations

import inspect
from math import inf, nan
from typing import Any

import pytest

from rlhf_algos import plugin
from rlhf_core.cli import main
from rlhf_core.errors import UsageError
from rlhf_core.plugins.registry import default_registry

OUTSIDE: dict[tuple[str, str], dict[str, tuple[float, ...]]] = {
    ("advantage", "ask"): {"share": (0, 1.1), "damping": (0,)},
    ("advantage", "best_of_n"): {"keep": (0,)},
    ("advantage", "best_quartile"): {"rank": (1,), "min_gap": (-1,)},
    ("advantage", "best_worst"): {"min_gap": (-1,)},
    ("advantage", "delta_ucb"): {"beta": (-1, nan), "min_gap": (-1,)},
    ("advantage", "drts"): {"draws": (0,), "min_gap": (-1,)},
    ("advantage", "gae"): {"gamma": (-0.1, 1.1), "lam": (-0.1, 1.1, nan)},
    ("advantage", "kto"): {"desirable": (0, -1), "undesirable": (0, -1)},
    ("advantage", "optimistic"): {"beta": (-1, nan), "min_gap": (-1,)},
    ("advantage", "pairs"): {"min_gap": (-1,)},
    ("advantage", "reinforce"): {"gamma": (-0.1, 1.1)},
    ("advantage", "reinforce_pp"): {"gamma": (-0.1, 1.1)},
    ("advantage", "teacher"): {"gamma": (-0.1, 1.1)},
    ("algorithm", "ppo"): {"critic_warmup": (-0.1, 1.1), "ptx": (-1,)},
    ("loss", "aot"): {"beta": (0,), "label_smoothing": (0.6,)},
    ("loss", "cdpo"): {"beta": (0,), "label_smoothing": (-0.1, 0.6)},
    ("loss", "cispo"): {"clip_low": (-1,), "clip_high": (-1,)},
    ("loss", "clip"): {"clip_low": (-1,), "clip_high": (-1,), "dual_clip": (-1, 0.5)},
    ("loss", "dapo"): {"clip_high": (-1,)},
    ("loss", "discopop"): {"tau": (0, 1)},
    ("loss", "dppo"): {"delta": (0,)},
    ("loss", "exo_pair"): {"beta": (0,), "label_smoothing": (0, 0.6)},
    ("loss", "sapo"): {"tau_pos": (0,), "tau_neg": (-1,)},
    ("loss", "dpo"): {"beta": (0, -1, inf)},
    ("loss", "gspo"): {"clip_low": (-1,), "clip_high": (-1,)},
    ("loss", "hinge"): {"beta": (0,)},
    ("loss", "ipo"): {"beta": (0,)},
    ("loss", "kto"): {"beta": (0,)},
    ("loss", "orpo"): {"lam": (-1,)},
    ("loss", "robust"): {"beta": (0,), "label_smoothing": (-0.1, 0.5)},
    ("loss", "simpo"): {"beta": (0,)},
    ("loss", "value"): {"clip": (-1,)},
}
CASES = [
    (kind, name, option, value) for (kind, name), bad in OUTSIDE.items() for option in bad for value in bad[option]
]


@pytest.mark.parametrize(("kind", "name", "option", "value"), CASES)
def test_a_value_outside_is_refused_in_one_line(kind: str, name: str, option: str, value: float) -> None:
    provider = default_registry().resolve(kind, name)
    with pytest.raises(UsageError, match=rf"^{option} must be in .*, not {value}$"):
        provider(**{option: value})


def test_whatever_checks_a_range_is_in_the_table_above() -> None:
    """So that a check that a subclass forgets to inherit is missed here."""
    hooks: dict[str, dict[str, Any]] = {
        "advantage": dict(plugin.rlhf_advantage()),
        "loss": dict(plugin.rlhf_loss()),
        "algorithm": dict(plugin.rlhf_algorithm()),
    }
    checking = {
        (kind, name)
        for kind, names in hooks.items()
        for name in names
        if "check_ranges" in inspect.getsource(default_registry().resolve(kind, name))
    }
    assert checking <= OUTSIDE.keys()


def test_the_command_says_which_provider_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ppo", "--model", "tiny", "--advantage.lam", "2"]) == 2
    assert "lam must be in [0, 1], not 2" in capsys.readouterr().err
