"""Held-out loss of every offline algorithm: against plain transformers, and against a training step on the same rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_core import Run, UsageError, make_config
from rlhf_core.cli import main
from rlhf_core.config.builder import parse, to_toml
from rlhf_core.plugins.registry import Registry

TRAIN = [
    {"prompt": f"{n} and", "chosen": f"{n + 1} " * (n % 3 + 1), "rejected": f"{n} " * (n % 4 + 1)} for n in range(6)
]
HELDOUT = [{"prompt": f"{n}?", "chosen": f"{n * n}, I think", "rejected": f"no {n}"} for n in range(5)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Pairs to train on, and held-out pairs."""
    folder = tmp_path_factory.mktemp("data")
    for name, rows in (("train", TRAIN), ("heldout", HELDOUT)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "train.jsonl"), str(folder / "heldout.jsonl")


def run_of(algorithm: str, files: tuple[str, str], output: Path, lr: float, **options: Any) -> Run:
    """A run of two steps, whose evaluator is chosen by itself."""
    data: dict[str, Any] = {"use": "json", "path": files[0], "heldout_path": files[1]}
    if algorithm in ("sft", "distill"):
        data["completion_key"] = "chosen"
    role = "reward" if algorithm == "reward" else "actor"
    trained = {role: {"optim": {"lr": lr, "schedule": "constant", "warmup": 0.0}}}
    if algorithm == "distill":
        trained["teacher"] = {"model": "tiny:hidden=16"}
    small = {"model": "tiny", "steps": 2, "batch_size": 6, "output": str(output)}
    return Run(make_config(algorithm, **{"data": data, **small, **trained, **options}))


def models(algorithm: str, files: tuple[str, str], folder: Path, kind: Any) -> tuple[Run, list[Any]]:
    """A trained run, and its model before and after, as plain transformers reads them."""
    before = run_of(algorithm, files, folder / "before", 0.0, steps=0)
    before.train()
    run = run_of(algorithm, files, folder / "run", 3e-3)
    run.train()
    return run, [kind.from_pretrained(each.output / "model").eval() for each in (before, run)]


def token_logprobs(model: Any, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """log p of each token of the completion (T,), float64, of one row without padding."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0].double()
    picked = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return picked[torch.arange(len(completion)), torch.tensor(completion)]


def sides(run: Run) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, completion ids) of every held-out completion, as the documented template writes them."""
    rows = [run.encoder.row(example) for example in run.data.engines["data"]("heldout")]
    return [(list(row.ids), list(side.ids)) for row in rows for side in row.completions]


def heldout_sides(run: Run) -> list[tuple[list[int], list[int]]]:
    with run.engines:
        run.engines.open(run.config.providers["data"], "data")
        return sides(run)


def test_loss_and_perplexity_of_sft_are_those_of_transformers(files: tuple[str, str], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    run, both = models("sft", files, tmp_path, AutoModelForCausalLM)
    assert [step for step, _ in run.evaluations] == [0, 2]
    for model, (_, metrics) in zip(both, run.evaluations, strict=True):
        logprobs = torch.cat([token_logprobs(model, *side) for side in heldout_sides(run)])
        assert metrics["eval/heldout/loss"] == pytest.approx(-float(logprobs.mean()), rel=1e-5)
        assert metrics["eval/heldout/perplexity"] == pytest.approx(float((-logprobs.mean()).exp()), rel=1e-5)
        assert metrics["eval/heldout/nll"] == pytest.approx(metrics["eval/heldout/loss"], rel=1e-6)
    assert run.evaluations[1][1]["eval/heldout/loss"] != run.evaluations[0][1]["eval/heldout/loss"]


def test_loss_accuracy_and_margin_of_dpo_are_those_of_transformers(files: tuple[str, str], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    run, (reference, policy) = models("dpo", files, tmp_path, AutoModelForCausalLM)
    beta = run.config.providers["loss"].beta
    ratios = torch.stack(
        [(token_logprobs(policy, *side) - token_logprobs(reference, *side)).sum() for side in heldout_sides(run)]
    )
    margins = beta * (ratios[0::2] - ratios[1::2])
    metrics = run.evaluations[-1][1]
    assert metrics["eval/heldout/loss"] == pytest.approx(
        -float(torch.nn.functional.logsigmoid(margins).mean()), rel=1e-5
    )
    assert metrics["eval/heldout/accuracy"] == float((margins > 0).double().mean())
    assert metrics["eval/heldout/margin"] == pytest.approx(float(margins.mean()), abs=1e-5)
    assert "eval/heldout/perplexity" not in metrics, "a pair's rejected side is not to be likely"
    assert run.evaluations[0][1]["eval/heldout/loss"] == pytest.approx(0.693147, abs=1e-5)


def test_loss_and_accuracy_of_a_reward_model_are_those_of_transformers(files: tuple[str, str], tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    run, (_, model) = models("reward", files, tmp_path, AutoModelForSequenceClassification)
    with torch.no_grad():
        scores = [model(torch.tensor([p + c])).logits[0, 0].double() for p, c in heldout_sides(run)]
    margins = torch.stack(scores[0::2]) - torch.stack(scores[1::2])
    metrics = run.evaluations[-1][1]
    assert metrics["eval/heldout/loss"] == pytest.approx(
        -float(torch.nn.functional.logsigmoid(margins).mean()), rel=1e-5
    )
    assert metrics["eval/heldout/accuracy"] == float((margins > 0).double().mean())


@pytest.mark.parametrize(
    "algorithm", ["sft", "dpo", "aot", "bco_pair", "cdpo", "ipo", "orpo", "simpo", "kto", "reward", "distill"]
)
def test_it_is_the_loss_of_a_training_step_on_the_same_rows(
    algorithm: str, files: tuple[str, str], tmp_path: Path
) -> None:
    """Trained at learning rate 0 on the held-out rows themselves, all in one batch."""
    own = (
        {"advantage": {"use": "kto", "z": "other"}} if algorithm == "kto" else {}
    )  # z of the paper depends on the order
    run = run_of(algorithm, (files[1], files[1]), tmp_path / "run", 0.0, steps=1, batch_size=5, **own)
    trained = run.train().metrics
    role = run.plan.policy
    for _, metrics in run.evaluations:
        assert metrics["eval/heldout/loss"] == pytest.approx(trained[f"loss/{role}"], rel=2e-5, abs=1e-6)
        for name in ("accuracy", "margin", "nll", "desirable_reward"):
            if f"{role}/{name}" in trained:
                assert metrics[f"eval/heldout/{name}"] == pytest.approx(trained[f"{role}/{name}"], rel=1e-4, abs=1e-5)


def test_an_evaluation_changes_nothing_of_the_training(files: tuple[str, str], tmp_path: Path) -> None:
    """KTO, which reads log-probabilities of the role in training before it trains."""
    found = []
    for name, options in (("with", {"eval_every": 1}), ("without", {"evaluator": "none"})):
        run_of("kto", files, tmp_path / name, 1e-2, **options).train()
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        found.append(
            [{n: v for n, v in line.items() if n.startswith(("loss", "actor", "grad", "kto"))} for line in lines]
        )
    assert found[0] == found[1]


def test_held_out_rows_are_measured_unless_declined_or_something_else_is(
    files: tuple[str, str], tmp_path: Path
) -> None:
    flags = ["sft", "--model", "tiny", "--data", "json", "--data.path", files[0], "--data.completion-key", "chosen"]

    def names(*words: str) -> list[str]:
        return parse([*flags, *words], Registry()).names_of("evaluator")

    assert names("--data.heldout", "2") == names("--data.heldout-path", files[1]) == ["heldout_loss"]
    assert names() == names("--data.heldout", "2", "--evaluator", "none") == []
    assert names("--data.heldout", "2", "--evaluator", "preference") == ["preference"]
    online = parse(["grpo", "--model", "tiny", "--reward", "length", *flags[3:7], "--data.heldout", "2"], Registry())
    assert online.names_of("evaluator") == []
    file = tmp_path / "run.toml"
    for words, expected in ((["--data.heldout", "2"], ["heldout_loss"]), (["--evaluator", "none"], [])):
        file.write_text(to_toml(parse([*flags, *words], Registry())))
        assert parse(["--config", str(file)], Registry()).names_of("evaluator") == expected


def test_the_number_of_rows_is_limited_and_long_rows_are_left_out(files: tuple[str, str], tmp_path: Path) -> None:
    losses = []
    for name, data in (("short", {"encoding": {"max_tokens": 40}}), ("all", {})):
        evaluator = {"use": "heldout_loss", "rows": 3 if name == "all" else 0}
        path = tmp_path / f"{name}.jsonl"
        extra = [{"prompt": "long", "chosen": "x" * 90}] if name == "short" else HELDOUT[3:]
        path.write_text("".join(json.dumps(row) + "\n" for row in [*HELDOUT[:3], *extra]))
        reader = {"use": "json", "path": files[0], "heldout_path": str(path), "completion_key": "chosen", **data}
        run = run_of("sft", files, tmp_path / name, 0.0, steps=0, data=reader, evaluator=evaluator)
        run.train()
        losses.append(run.evaluations[0][1]["eval/heldout/loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_mistakes_are_one_line(files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", "tiny", "--data", "json", "--data.path", files[0], "--data.heldout", "2"]
    flags += ["--steps", "1", "--batch-size", "2", "--output", str(tmp_path / "run")]
    assert main(["sft", *flags, "--data.completion-key", "chosen", "--evaluator", "heldout"]) == 2
    assert "use the evaluator heldout_loss" in capsys.readouterr().err
    assert main(["reward", *flags, "--evaluator", "preference"]) == 2
    line = capsys.readouterr().err
    assert "--evaluator.by scores" in line and line.count("\n") == 1
    assert main(["orpo", *flags, "--evaluator", "preference"]) == 2
    assert "--evaluator.by likelihood" in capsys.readouterr().err
    with pytest.raises(UsageError, match="this algorithm does not train on data"):
        evaluator = [
            "--evaluator",
            "heldout_loss",
            "--output",
            str(tmp_path / "online"),
            "--sampling.max-new-tokens",
            "4",
        ]
        Run(parse(["grpo", "--reward", "length", *flags, *evaluator], Registry())).train()
