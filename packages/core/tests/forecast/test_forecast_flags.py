"""Flags of a run, and of `rlhf-run plan` itself, that change a forecast: each against a closed form or the run's own model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf_core import make_config
from rlhf_core.cli.app import main
from rlhf_core.contract.options import ModelOptions
from rlhf_core.errors import UsageError
from rlhf_core.forecast.forecast import Forecast, forecast
from rlhf_core.forecast.options import GPUS, PlanOptions
from rlhf_core.forecast.seconds import rates_of
from rlhf_core.forecast.table import forecast_table
from rlhf_core.models.loading.load import load_model
from rlhf_core.models.loading.tokenizer import load_tokenizer

pytest.importorskip("rlhf_algos")

H, V = 64, 259
MODEL = f"tiny:hidden={H},layers=2,heads=2,kv_heads=1,intermediate=192,vocab={V}"


def planned(*, algorithm: Any = "sft", plan: PlanOptions | None = None, **options: Any) -> Forecast:
    rows = [{"prompt": "a", **({} if "reward" in options else {"completion": "b"})}] * 8
    config = make_config(
        algorithm, **{"model": MODEL, "data": rows, "steps": 2, "batch_size": 8, "output": "unused", **options}
    )
    return forecast(config, plan or PlanOptions(prompt_tokens=16, completion_tokens=16))


@pytest.mark.parametrize("kind", ["tiny", "folder"])
def test_rows_of_added_tokens_are_counted(kind: str, tmp_path: Path) -> None:
    (tmp_path / "tokens.txt").write_text("".join(f"<token {i}>\n" for i in range(300)), encoding="utf-8")
    options, model = ModelOptions(add_tokens=str(tmp_path / "tokens.txt")), MODEL
    if kind == "folder":
        model = str(tmp_path / "model")
        load_model(MODEL, ModelOptions()).save_pretrained(model)
        load_tokenizer(MODEL, ModelOptions()).save_pretrained(model)
    before, found = (planned(model=model, add_tokens=each).roles["actor"] for each in ("", options.add_tokens))
    assert found.size.parameters == sum(each.numel() for each in load_model(model, options).parameters())
    assert (found.size.parameters - before.size.parameters, found.size.vocabulary) == (300 * H, V + 300)
    assert (
        found.memory.weights - before.memory.weights == found.memory.gradients - before.memory.gradients == 4 * 300 * H
    )


def test_a_tokenizer_with_more_tokens_than_its_model_grows_the_plan_as_it_grows_the_run(tmp_path: Path) -> None:
    load_model(MODEL, ModelOptions()).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(MODEL, ModelOptions())
    tokenizer.add_tokens([f"<token {i}>" for i in range(100)])
    tokenizer.save_pretrained(tmp_path)
    assert planned(model=str(tmp_path)).roles["actor"].size.vocabulary == V + 100


def test_what_the_run_refuses_of_added_tokens_the_plan_refuses(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="none.txt: No such file"):
        planned(add_tokens=str(tmp_path / "none.txt"))
    (tmp_path / "tokens.txt").write_text("<token>\n", encoding="utf-8")
    pytest.importorskip("peft")
    with pytest.raises(UsageError, match="adapters cannot learn the 1 new tokens"):
        planned(add_tokens=str(tmp_path / "tokens.txt"), actor={"lora": {"rank": 4}})


def seconds_of(plan: PlanOptions, **options: Any) -> dict[str, float]:
    return {phase.name: phase.seconds or 0.0 for phase in planned(plan=plan, **options).phases}


@pytest.mark.parametrize("gpu", GPUS)
def test_products_in_float32_take_the_rate_of_float32(gpu: str) -> None:
    """A type multiplies float32 matrices at the rate of its data sheet without TF32, 2 to 30 times slower."""
    wide, narrow = (rates_of(PlanOptions(gpu=gpu), dtype) for dtype in ("float32", "bfloat16"))
    assert wide and narrow and wide.bytes == narrow.bytes
    assert 2 * 0.99 < narrow.operations / wide.operations < 31
    assert narrow.operations == pytest.approx(0.4 * GPUS[gpu].tflops * 1e12)


def test_each_role_computes_at_the_rate_of_its_own_dtype() -> None:
    dpo: dict[str, Any] = {
        "algorithm": "dpo",
        "data": [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 8,
        "actor": {"dtype": "bfloat16"},
    }
    plan = PlanOptions(prompt_tokens=16, completion_tokens=16, gpu="h100")
    found = planned(plan=plan, **dpo)
    seconds = {phase.name: phase.seconds or 0.0 for phase in found.phases}
    even = seconds_of(PlanOptions(prompt_tokens=16, completion_tokens=16, tflops=1.0, gb_s=1e9), **dpo)
    assert set(found.rates) == {"bfloat16", "float32"}
    assert even["read reference"] / seconds["read reference"] == pytest.approx(0.4 * 67, rel=1e-3)
    update = (
        (2 + 1 + 4) * 4 * found.roles["actor"].size.trained / (0.8 * 3350e9)
    )  # weights twice, AdamW's moments twice
    assert even["train actor"] / (seconds["train actor"] - update) == pytest.approx(0.4 * 989, rel=0.01)
    table = forecast_table(found)
    assert "rates in float32: 26.8 TFLOP/s" in table and "rates in bfloat16: 396 TFLOP/s" in table


@pytest.mark.parametrize(
    ("options", "origin"),
    [
        ({"gpu": "h100"}, "40% of the matrix rate of h100"),
        ({"gpu": "h100", "tflops": 5.0}, "the first stated, the second of h100"),
        ({"gpu": "h100", "gb_s": 5.0}, "40% of the matrix rate of h100, the second stated"),
        ({"tflops": 5.0, "gb_s": 5.0}, "stated"),
    ],
)
def test_the_origin_of_rates_is_named(options: dict[str, Any], origin: str) -> None:
    found = rates_of(PlanOptions(**options), "bfloat16")
    assert found is not None and found.origin == origin


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--plan.tflops 1",
            "--plan.tflops gives no seconds without the other rate; pass --plan.gb-s or --plan.gpu too",
        ),
        ("--plan.gb-s 1", "--plan.gb-s gives no seconds without the other rate; pass --plan.tflops or --plan.gpu too"),
        ("--plan.measure True --plan.tflops 1", "--plan.tflops is what --plan.measure measures; leave one of them out"),
        ("--plan.efficiency 0", "--plan.efficiency must be above 0, not 0"),
        ("--plan.gpu-gib inf", "--plan.gpu-gib must be a finite number, not inf"),
        ("--plan.tflops inf --plan.gb-s 1", "--plan.tflops must be a finite number, not inf"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*"plan grpo --model tiny --reward length --data prompts".split(), *words.split()]) == 2
    assert f"rlhf-run: {message}" in capsys.readouterr().err


def test_a_type_has_the_memory_that_its_driver_reports_and_not_that_of_its_name() -> None:
    """An H200 of 141 GB has 139.8 GiB in docs/reports/gpu-h200.md; ECC takes a sixteenth of an L4, an A10 and an L40S."""
    assert GPUS["h200"].gib == 139.8
    promised = {"a10": 24, "a100-40": 40, "a100-80": 80, "b200": 180, "h100": 80, "h200": 141, "l4": 24, "l40s": 48}
    assert all(0.9 * promised.get(name, 24) < gpu.gib < promised.get(name, 24) for name, gpu in GPUS.items())


@pytest.mark.parametrize(
    ("gib", "flags", "told"),
    [
        ("0.003", "", "fits"),
        ("0.001", "", "does not fit either"),
        ("0.003", "--launcher.share-memory off", ""),
        ("1", "", ""),
    ],
)
def test_roles_that_can_take_turns_are_named_where_all_do_not_fit(
    gib: str, flags: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """All roles take 3.6 MiB, and the largest alone 2.0; the limits are 3.1 and 1.0 MiB, and much."""
    words = (
        f"plan ppo --model {MODEL} --reward length --data prompts --batch-size 4 --sampling.n 1 --plan.gpu-gib {gib}"
    )
    lengths = "--plan.prompt-tokens 4 --plan.completion-tokens 4 --plan.reserve 0"
    assert main([*words.split(), *lengths.split(), *flags.split()]) == int(gib != "1")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: a run takes turns")]
    assert [line.endswith(f" GiB, {told}") for line in lines] == [True] * bool(told)


def test_rows_that_are_longer_than_the_run_allows_are_named() -> None:
    options: dict[str, Any] = {"algorithm": "grpo", "reward": "length", "max_prompt_tokens": 20}
    options["sampling"] = {"n": 2, "max_new_tokens": 10}
    for prompt, completion, notes in (
        (20, 10, ()),
        (21, 11, ("no prompt of the run has 21 tokens: max_prompt_tokens is 20",
                  "no completion of the run has 11 tokens: sampling.max_new_tokens is 10")),
    ):  # fmt: skip
        assert planned(plan=PlanOptions(prompt_tokens=prompt, completion_tokens=completion), **options).notes == notes


def test_help_names_the_run_that_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: rlhf-run plan ALGORITHM [flags] [flags of the run]\n")
    assert main(["doctor", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: rlhf-run doctor [flags]\n")
