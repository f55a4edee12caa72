"""One evaluation by attacks: attack, answer, judge, write, measure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core import OptionError, UsageError, option, options_under, run_option, to_reward_output
from rlhf_core.evaluator.heldout_samples import policy
from rlhf_core.util.messages import log
from rlhf_eval_gcg.analysis.success import success
from rlhf_eval_gcg.evaluation.answers import CLEAN, as_rollouts, ask
from rlhf_eval_gcg.evaluation.attackers import Attacker, Models, check_goals, check_models, make_units, reading
from rlhf_eval_gcg.evaluation.files import remove_answers, write_answers, write_prompts, write_settings
from rlhf_eval_gcg.evaluation.questions import attacked_question, clean_question, prompt_of
from rlhf_eval_gcg.evaluation.store import AttackStore, Unit, goal_key, model_digest
from rlhf_eval_gcg.judges.refusal import Refusal
from rlhf_eval_gcg.judges.verdict import Verdict

if TYPE_CHECKING:
    from rlhf_core import OpenContext, RewardOutput, Rollouts, RunView
    from rlhf_eval_gcg.attack import AttackResult, Goal, JudgedAnswer
    from rlhf_eval_gcg.evaluation.options import GCGOptions

__all__ = ["GCGEngine"]

Attacks = Sequence[tuple[Unit, Sequence["AttackResult"]]]


class GCGEngine:
    """An evaluator with its judge.

    Args:
        options: the evaluator.
        context: of opening it.

    Raises:
        UsageError: the policy is in another process.
    """

    def __init__(self, options: GCGOptions, context: OpenContext) -> None:
        self.options = options
        config = context.plan.config if context.plan is not None else None
        if config is not None and not config.providers["launcher"].one_process:
            raise UsageError(
                "evaluator gcg needs the policy's gradients, in this process: pass "
                f"{run_option('launcher', 'local')}, or attack OUTPUT/model afterwards with rlhf-run eval"
            )
        if config is not None and config.providers.get("environment") is not None:
            raise UsageError(f"evaluator gcg does not support environments; leave out {run_option('environment')}")
        self._provider = options.make_judge()
        if self._provider is None and (config is None or config.providers.get("reward") is None):
            self._provider = Refusal()
        self._judge: Any = None
        self._checked = False
        if self._provider is not None:
            with options_under("judge"):
                self._judge = context.open(self._provider, "judge")

    def close(self) -> None:
        """Nothing to do: the run closes the judge."""

    def __call__(self, run: RunView) -> dict[str, float]:
        """Attack, let the policy answer, judge the answers and keep them; return the metrics of `eval/gcg/`."""
        options = self.options
        early = options.end_only and bool(run.plan.trained_roles) and run.step < run.config.steps
        if early and self._checked:
            return {}
        name = policy(run, "gcg")
        goals = options.read()
        if not self._checked:
            self._check(run, run.roles[name], goals)
            self._checked = True
        if early:  # at the run's start what would end the attacks at its end was said, and nothing else is done
            return {}
        folder = run.output / "gcg" / f"step-{run.step}"
        attacks, fingerprint = self._attack(run, run.roles[name], goals, folder)
        answers = self._answers(run, name, goals, attacks)
        if run.leader:
            settings = {**self._settings(run, name), "fingerprint": fingerprint}
            write_settings(folder, settings)
            write_answers(folder, [{"step": run.step, **row} for row in answers])
            if options.export:
                write_prompts(Path(options.export), attacks, options)
        return self._metrics(attacks, answers)

    # ------------------------------------------------------------------------------------------------------------------

    def _check(self, run: RunView, role: Any, goals: Sequence[Goal]) -> None:
        """Raise `UsageError` for what an attack would end with, without a forward pass."""
        search = self.options.search_options()
        check_goals(goals, role.tokenizer, search)
        check_models(role, self.options)
        if search.objective == "reward" and self._judge is None and self._run_judge(run).needs:
            raise OptionError(
                "objective", f"reward needs a judge that does not read roles; choose one with {option('judge')}"
            )

    def _attack(self, run: RunView, role: Any, goals: Sequence[Goal], folder: Path) -> tuple[Attacks, str]:
        """Return all attacks, those of an earlier try included, and the fingerprint of what they follow from."""
        search = self.options.search_options()
        with role.gathered(), reading(role.causal_lm, role.module.compute_dtype):
            models = Models.load(role, self.options)
            digest = model_digest([models.policy, *models.more, *([models.draft] if models.draft else [])])
            if search.objective == "reward":  # then suffixes follow from the judge, too
                digest += repr([self._provider or self._run_judge(run), self.options.judge_suffix])
            store = AttackStore(folder, search, digest)
            if run.leader and not store.check_same(bool(run.plan.trained_roles)):
                log.warning(
                    f"{folder} contains attacks on other weights or with other options; these attacks run again"
                )
            rewards = (lambda answers: self._rewards(run, answers)) if search.objective == "reward" else None
            attacker = Attacker(models, search, store, rewards, self.options.judge_suffix)
            attacks = attacker.make(make_units(goals, self.options.seeds, search.transfer), run)
            if run.leader and store.finish(attacks, run.step):
                remove_answers(folder)  # of other attacks: a kill before the new ones must not leave both
        return attacks, store.fingerprint

    def _answers(self, run: RunView, name: str, goals: Sequence[Goal], attacks: Attacks) -> list[dict[str, Any]]:
        """Return a row per answer of all ranks, without a suffix first, then by seed, goal and number."""
        options, tokenizer = self.options, run.roles[name].tokenizer
        clean = [clean_question(k, goal, tokenizer, options.search_options()) for k, goal in enumerate(goals)]
        pairs = {CLEAN: [(each, each) for each in clean]}
        numbers = {goal_key(goal): k for k, goal in enumerate(goals)}
        for unit, results in attacks:
            for result in results:
                k = numbers[goal_key(result.goal)]
                asked = attacked_question(k, unit.seed, result, tokenizer, options.search_options())
                pairs.setdefault(unit.seed, []).append((asked, asked if options.judge_suffix else clean[k]))
        rows: list[dict[str, Any]] = []
        for several in pairs.values():
            mine = several[run.world.rank :: run.world.size]
            found = ask(run, name, mine, several[0], options.n, options.batch, lambda each: self._score(run, each))
            rows += [row for part in run.world.gather(found) for row in part]
        rows.sort(key=lambda row: (row["attacked"], row["seed"] or 0, row["goal"], row["k"]))
        return [{**row, "goal_text": goals[row["goal"]].goal} for row in rows]

    def _score(self, run: RunView, rollouts: Rollouts) -> RewardOutput:
        if self._judge is None:
            return run.reward_of(rollouts)
        with options_under("judge"):
            return to_reward_output(self._judge(rollouts), rollouts, self._provider)

    def _rewards(self, run: RunView, answers: Sequence[JudgedAnswer]) -> list[float]:
        """Return the judge's rewards of answers to one prompt; an answer that it abstains from counts as the mean."""
        prompts = [prompt_of(answer.message, self.options) for answer in answers]
        output = self._score(run, as_rollouts(answers, prompts))
        known = output.total_N[output.answered_N]
        mean = float(known.mean()) if len(known) else 0.0
        values, answered = output.total_N.tolist(), output.answered_N.tolist()
        return [value if told else mean for value, told in zip(values, answered, strict=True)]

    def _run_judge(self, run: RunView) -> Any:
        return run.config.providers["reward"]

    @property
    def threshold(self) -> float | None:
        """The threshold of the metrics; None where none was chosen and the judge has no usual one."""
        if self.options.threshold is None and isinstance(self._provider, Refusal | Verdict):
            return self._provider.bad_below
        return self.options.threshold

    def _settings(self, run: RunView, name: str) -> dict[str, Any]:
        """Return what the rows follow from, as plain values."""
        options, sampling = self.options, asdict(run.config.sampling)
        sampling |= {"n": options.n}
        del sampling["seed"], sampling["replay"]
        judge = options.judge or ("refusal" if self._provider is not None else run.config.names.get("reward", ""))
        goals = options.goals if isinstance(options.goals, str) else "a list"
        return {
            "model": run.plan.roles[name].options.model,
            "step": run.step,
            "seed": run.config.seed,
            "goals": goals,
            "rows": options.rows,
            "seeds": list(options.seeds),
            "attack": asdict(options.search_options()),
            "sampling": sampling,
            "judge": judge,
            "judge_suffix": options.judge_suffix,
            "threshold": self.threshold,
        }

    def _metrics(self, attacks: Attacks, answers: Sequence[dict[str, Any]]) -> dict[str, float]:
        """Return the metrics of `eval/gcg/`."""
        results = [result for _, some in attacks for result in some]
        metrics = {
            "gcg/loss": _mean([result.loss for result in results]),
            "gcg/loss_start": _mean([result.initial_loss for result in results]),
            "gcg/matched": _mean([float(result.matched) for result in results]),
            "gcg/steps": _mean([float(result.steps) for result in results]),
            "gcg/flops": _mean([result.flops[-1] for result in results if result.flops]),
            "gcg/attacks": float(len(results)),
        }
        for prefix, attacked in (("", True), ("clean_", False)):
            rows = [row for row in answers if row["attacked"] == attacked]
            judged = [row["reward"] for row in rows if row["reward"] is not None]
            if judged:
                metrics[f"gcg/{prefix}reward"] = _mean(judged)
            found = success(rows, self.threshold) if self.threshold is not None else None
            if found is None:
                continue
            for name, estimate in (("success", found.mean), ("success_any", found.any)):
                metrics[f"gcg/{prefix}{name}"] = estimate.value
                if attacked:
                    metrics |= {f"gcg/{name}_low": estimate.low, f"gcg/{name}_high": estimate.high}
        return metrics


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
