"""Three calls for three trainings: a reward model, PPO and DPO, from lists of dictionaries and strings.

The options have the names of an early OpenRLHF example. Each call is one `make_config` and one `Run`. It takes any further
option of a run, so that nothing is missing that `rlhf-run` has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_core.errors import UsageError
from rlhf_core.run.result import RunResult

__all__ = ["RLHFConfig", "RLHFPipeline"]


@dataclass(frozen=True)
class RLHFConfig:
    """Options of a pipeline.

    Raises:
        UsageError: the model is missing, or a number is out of its range.
    """

    pretrain: str = ""
    """model that every training starts from: hub name, folder, or `tiny`"""
    reward_model: str = ""
    """reward model of PPO: hub name or folder; empty takes the one that `train_reward` trained"""
    kl_coef: float = 0.1
    """weight of the KL penalty of PPO"""
    clip_range: float = 0.2
    """distance from 1 at which PPO's importance ratio is clipped"""
    ppo_epochs: int = 4
    """passes over a batch of completions"""
    batch_size: int = 128
    """prompts per step of PPO, or pairs per step of the other two; at most as many as there are"""
    mini_batch_size: int = 32
    """completions per optimizer step of PPO"""
    lr: float = 1e-6
    """peak learning rate of the trained model"""
    max_new_tokens: int = 512
    """maximum number of tokens per completion"""
    temperature: float = 0.7
    """temperature of sampling"""
    top_p: float = 0.9
    """probability of the smallest set of tokens to sample from; 1 keeps all"""
    num_episodes: int = 1000
    """steps of PPO, one batch of prompts each"""
    save_steps: int = 50
    """steps between checkpoints; 0 saves only at the end"""
    eval_steps: int = 25
    """steps between evaluations; 0 evaluates only at the start and the end"""
    output_dir: str = "rlhf_output"
    """folder with one subfolder per training"""
    heldout: float = 0.1
    """share of the rows that is evaluated and not trained on, 0 to below 1; 0 reports the last batch's numbers"""
    seed: int = 0
    """seed of the random draws; the same seed gives the same numbers"""

    def __post_init__(self) -> None:
        if not self.pretrain:
            raise UsageError("RLHFConfig needs pretrain=NAME: a hub name, a folder, or 'tiny' to try")
        for name in ("ppo_epochs", "batch_size", "mini_batch_size", "max_new_tokens", "num_episodes"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.heldout < 1:
            raise UsageError(f"heldout must be from 0 to below 1, not {self.heldout}")


class RLHFPipeline:
    """A reward model, PPO and DPO with one set of options.

    Args:
        config: the options.
    """

    def __init__(self, config: RLHFConfig) -> None:
        self.config = config
        self.results: dict[str, RunResult] = {}
        """results of each training: `reward`, `ppo` and `dpo`"""

    def train_reward(self, preference_data: Sequence[Mapping[str, Any]], **options: Any) -> dict[str, Any]:
        """Train a reward model on preference pairs.

        Args:
            preference_data: rows with `prompt`, `chosen` and `rejected`, each a text or a chat.
            options: further options of the run, as `make_config` takes them.

        Returns:
            `accuracy` and `loss` on held-out pairs, the number of `pairs`, and the `model`'s folder.
        """
        role = {"reward": {"optim": {"lr": self.config.lr}}}
        metrics = self._learn("reward", preference_data, {**role, **options})
        return {**metrics, "pairs": len(preference_data), "model": str(self.results["reward"].model)}

    def run_dpo(
        self, preference_data: Sequence[Mapping[str, Any]], beta: float = 0.1, **options: Any
    ) -> dict[str, Any]:
        """Train the model on preference pairs by DPO.

        Args:
            preference_data: rows with `prompt`, `chosen` and `rejected`, each a text or a chat.
            beta: strength of the pull to the model that training starts from, above 0.
            options: further options of the run, as `make_config` takes them.

        Returns:
            `beta`, the number of `pairs`, the `method`, `accuracy` and `loss` on held-out pairs, and the `model`'s folder.
        """
        role = {"actor": {"optim": {"lr": self.config.lr}}, "loss": {"beta": beta}}
        metrics = self._learn("dpo", preference_data, {**role, **options})
        counts = {"beta": beta, "pairs": len(preference_data), "method": "dpo"}
        return {**counts, **metrics, "model": str(self.results["dpo"].model)}

    def run_ppo(self, prompts: Sequence[str | Mapping[str, Any]], reward: Any = None, **options: Any) -> dict[str, Any]:
        """Train the model on its own completions by PPO.

        Args:
            prompts: texts, or rows with `prompt` and columns for the reward.
            reward: a reward as `make_config` takes it, such as a function; None is the reward model of the configuration, or
                the one that `train_reward` trained.
            options: further options of the run, as `make_config` takes them.

        Returns:
            `reward_mean` of completions to held-out prompts, `kl_div` of a completion to the initial model in nats in the last
            step, the number of `episodes`, and the `model`'s folder.

        Raises:
            UsageError: there is no reward.
        """
        config = self.config
        rows = [{"prompt": each} if isinstance(each, str) else dict(each) for each in prompts]
        held = self._heldout(len(rows))
        batch_size = max(1, min(config.batch_size, len(rows) - held))
        usual = {
            "reward": self._reward() if reward is None else reward,
            "steps": config.num_episodes,
            "batch_size": batch_size,
            "minibatches": max(1, batch_size // config.mini_batch_size),
            "update_epochs": config.ppo_epochs,
            "algorithm": {"use": "ppo", "kl": {"coef": config.kl_coef}},
            "loss": {"use": "clip", "clip_low": config.clip_range, "clip_high": config.clip_range},
            "actor": {"optim": {"lr": config.lr}},
            "sampling": {
                "n": 1,
                "max_new_tokens": config.max_new_tokens,
                "temperature": config.temperature,
                "top_p": config.top_p,
            },
            **({"evaluator": "heldout"} if held else {}),
        }
        result = self._train("ppo", rows, {**usual, **options})
        last, measured = result.metrics, _last_evaluation(result)
        return {
            "reward_mean": measured.get("eval/heldout/reward", last["reward/mean"]),
            "kl_div": last.get("kl/completion", 0.0),
            "episodes": int(last["step"]),
            "model": str(result.model),
        }

    def _learn(self, algorithm: str, rows: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> dict[str, float]:
        """Train on pairs, once through, and return accuracy and loss."""
        if missing := next((name for row in rows for name in ("prompt", "chosen", "rejected") if name not in row), ""):
            raise UsageError(
                f"each row of preference_data needs prompt, chosen and rejected, but one row has no {missing}"
            )
        trained = len(rows) - self._heldout(len(rows))
        usual = {"epochs": 1, "batch_size": max(1, min(self.config.batch_size, trained))}
        result = self._train(algorithm, [dict(row) for row in rows], {**usual, **options})
        measured = _last_evaluation(result)
        role = next(name.removeprefix("loss/") for name in result.metrics if name.startswith("loss/"))
        return {
            "accuracy": measured.get("eval/heldout/accuracy", result.metrics[f"{role}/accuracy"]),
            "loss": measured.get("eval/heldout/loss", result.metrics[f"loss/{role}"]),
        }

    def _train(self, algorithm: str, rows: list[dict[str, Any]], options: Mapping[str, Any]) -> RunResult:
        """Train in a separate folder."""
        from rlhf_core.config.builder import make_config
        from rlhf_core.run.run import Run

        config = self.config
        held = self._heldout(len(rows))
        usual = {
            "model": config.pretrain,
            "data": {"rows": rows, **({"heldout": held} if held else {})},
            "save_every": config.save_steps,
            "eval_every": config.eval_steps if held else 0,
            "seed": config.seed,
            "output": str(Path(config.output_dir) / algorithm),
        }
        given = {**usual, **options}
        self.results[algorithm] = Run(make_config(given.pop("algorithm", algorithm), **given)).train()
        return self.results[algorithm]

    def _heldout(self, rows: int) -> int:
        """Return the number of rows that are held out: the share of all, but never all of them."""
        return min(rows - 1, max(1, round(rows * self.config.heldout))) if self.config.heldout and rows > 1 else 0

    def _reward(self) -> dict[str, str]:
        """Return the reward model that PPO uses.

        Raises:
            UsageError: there is none.
        """
        trained = Path(self.config.output_dir) / "reward" / "model"
        name = self.config.reward_model or (str(trained) if trained.is_dir() else "")
        if not name:
            raise UsageError(
                "run_ppo has no reward: call train_reward first, set RLHFConfig.reward_model, or pass reward=FUNCTION"
            )
        return {"use": "model", "model": name}


def _last_evaluation(result: RunResult) -> Mapping[str, float]:
    """Return the numbers of a run's last evaluation; empty where nothing is held out."""
    return result.evaluations[-1][1] if result.evaluations else {}
