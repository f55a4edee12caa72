"""Runs from Python: functions as rewards, rows at hand, a module as the model, functions as callbacks, and the result."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from rlhf_core import Run, RunConfig, RunResult, UsageError, make_config
from rlhf_core.cli import main
from rlhf_core.config.builder import from_names, to_names, to_toml
from rlhf_core.models.loading.byte_tokenizer import byte_tokenizer
from rlhf_core.models.loading.tiny import parse
from rlhf_core.reward.length import Length
from rlhf_core.testing.tiny_algorithm import TINY_SAMPLING

MODEL = "tiny:hidden=16,layers=1"
ONLINE = "rlhf_core.testing.tiny_algorithm:TinyAlgorithm"
ROWS = [{"prompt": f"{n} + {n} =", "solution": str(2 * n)} for n in range(4)]


def config_of(folder: Path, **options: Any) -> RunConfig:
    usual: dict[str, Any] = {"model": MODEL, "data": ROWS, "batch_size": 2, "steps": 1, "sampling": TINY_SAMPLING}
    usual["output"] = str(folder / "run")
    return make_config(ONLINE, **{**usual, **options})


def brief(completions: list[str], **columns: list[Any]) -> list[float]:
    return [-float(len(text)) for text in completions]


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


# ----------------------------------------------------------------------------------------------------------------------
# rewards
# ----------------------------------------------------------------------------------------------------------------------


def test_a_function_is_called_as_in_trl_with_completions_prompts_and_columns(tmp_path: Path) -> None:
    calls: list[dict[str, Any]] = []

    def reward(prompts: list[str], completions: list[str], solution: list[str], **others: Any) -> list[float]:
        calls.append({"prompts": prompts, "solution": solution})
        assert {"queries", "labels", "meta"} <= set(others)
        return [float(number) for number, _ in enumerate(completions)]

    result = Run(config_of(tmp_path, reward=reward)).train()
    (call,) = calls
    assert result.metrics["reward/mean"] == 1.5, "of 0, 1, 2, 3"
    assert all(eval(prompt.split("<|im_end|>")[0].split("user\n")[1].strip(" =")) == int(solution)
               for prompt, solution in zip(call["prompts"], call["solution"], strict=True))  # fmt: skip


def test_several_rewards_are_added_with_their_weights_and_logged_apart(tmp_path: Path) -> None:
    def one(completions: list[str]) -> list[float]:
        return [1.0] * len(completions)

    reward = {"use": "sum", "parts": [one, Length(target=8), "length target=8", brief], "weights": [2, 1, -1, 0]}
    metrics = Run(config_of(tmp_path, reward=reward)).train().metrics
    assert metrics["reward/mean"] == metrics["reward/one"] * 2 == 2.0, "the two lengths cancel, brief weighs nothing"
    assert metrics["reward/Length"] == metrics["reward/length"] and "reward/brief" in metrics
    assert config_of(tmp_path, reward=[one, brief]).names["reward"] == "sum"


def test_a_function_of_a_module_goes_by_its_path_into_files_and_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "python_user_rewards.py").write_text(
        "def zero(completions, **_):\n    return [0.0] * len(completions)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    from python_user_rewards import zero  # type: ignore[import-not-found]

    config = config_of(tmp_path, reward=zero, data="prompts")
    assert config.providers["reward"].path == "python_user_rewards:zero"
    assert from_names(to_names(config)) == config


def test_a_function_that_asks_for_an_unknown_column_or_reads_chats_is_told_so(tmp_path: Path) -> None:
    def asks(completions: list[str], answer: list[str]) -> list[float]:
        return [0.0 for _ in answer]

    def reads_chats(completions: list[Any]) -> list[float]:
        return [len(each[0]["content"]) for each in completions]

    with pytest.raises(
        UsageError, match=r"^asks: the function asks for 'answer', but the columns are solution, queries"
    ):
        Run(config_of(tmp_path, reward=asks)).train()
    with pytest.raises(UsageError, match=r"^reads_chats: .* use completion instead of completion\[0\]\['content'\]"):
        Run(config_of(tmp_path, reward=reads_chats, output=str(tmp_path / "other"))).train()


# ----------------------------------------------------------------------------------------------------------------------
# data
# ----------------------------------------------------------------------------------------------------------------------


def table(kind: str) -> Any:
    rows = datasets.Dataset.from_list(ROWS)
    split = {"train": ROWS[:3], "test": ROWS[3:]}
    return {
        "list": ROWS,
        "Dataset": rows,
        "IterableDataset": rows.to_iterable_dataset(),
        "DatasetDict": datasets.DatasetDict({name: datasets.Dataset.from_list(each) for name, each in split.items()}),
        "dict": split,
        "table of options": {"rows": ROWS, "heldout": 1, "prompt_key": "prompt"},
    }[kind]


@pytest.mark.parametrize("kind", ["list", "Dataset", "IterableDataset", "DatasetDict", "dict", "table of options"])
def test_rows_at_hand_are_data_with_all_their_columns(tmp_path: Path, kind: str) -> None:
    data = config_of(tmp_path, data=table(kind), reward=brief).providers["data"]
    train = list(data("train"))
    assert [row.prompt for row in train][:3] == [row["prompt"] for row in ROWS][:3] or kind == "table of options"
    assert all(row.meta["solution"] == str(2 * int(str(row.prompt)[0])) for row in train)
    if kind in ("list", "Dataset", "IterableDataset"):
        assert len(train) == 4
        with pytest.raises(UsageError, match="no rows are held out: pass heldout = 0.1 or heldout_rows"):
            data("heldout")
    else:
        heldout = list(data("heldout"))
        assert (len(train), len(heldout)) == (3, 1)
        assert {row.prompt for row in [*train, *heldout]} == {row["prompt"] for row in ROWS}


def test_a_list_of_rows_trains_as_the_same_file_does(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    file = {"use": "json", "path": str(tmp_path / "rows.jsonl")}
    of_list = Run(config_of(tmp_path, reward="length")).train()
    of_file = Run(config_of(tmp_path, reward="length", data=file, output=str(tmp_path / "file"))).train()
    same = [name for name in of_list.metrics if not name.startswith(("time/", "speed/", "memory/"))]
    assert len(same) > 10 and all(of_list.metrics[name] == of_file.metrics[name] for name in same)


# ----------------------------------------------------------------------------------------------------------------------
# a module as the model
# ----------------------------------------------------------------------------------------------------------------------


def module() -> Any:
    torch.manual_seed(7)
    size = parse(MODEL)
    return size.model(LlamaForCausalLM, "sdpa", torch.float32), byte_tokenizer(size.vocab, size.context)


def test_a_module_and_its_tokenizer_are_trained_and_the_module_stays_as_it_is(tmp_path: Path) -> None:
    model, tokenizer = module()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options: dict[str, Any] = {"model": model, "tokenizer": tokenizer, "reward": brief}
    result = Run(config_of(tmp_path, **options)).train()
    base = LlamaForCausalLM.from_pretrained(tmp_path / "run" / "base-model").state_dict()
    trained, its_tokenizer = result.load_model()
    assert all(torch.equal(before[name], each) for name, each in model.state_dict().items())
    assert all(torch.equal(before[name], each) for name, each in base.items())
    assert any(not torch.equal(before[name], each) for name, each in trained.state_dict().items())
    assert its_tokenizer.chat_template == tokenizer.chat_template
    again = Run(config_of(tmp_path, **options, steps=2, resume=True)).train()
    assert [row["step"] for row in again.history] == [1, 2]
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    with pytest.raises(
        UsageError, match="base-model contains a different model from the one given; name another output"
    ):
        config_of(tmp_path, **options, resume=True)


def test_a_module_without_tokenizer_has_that_of_its_name_or_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = module()
    with pytest.raises(UsageError, match="^model is a module without a tokenizer; pass tokenizer= too$"):
        config_of(tmp_path, model=model)
    model.save_pretrained(tmp_path / "named")
    tokenizer.save_pretrained(tmp_path / "named")
    named = AutoModelForCausalLM.from_pretrained(tmp_path / "named")
    config = config_of(tmp_path, model=named, reward=brief)
    assert (Path(config.model) / "tokenizer.json").is_file()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="only in a single process; save it"):
        config_of(tmp_path, model=named)


# ----------------------------------------------------------------------------------------------------------------------
# callbacks and the result
# ----------------------------------------------------------------------------------------------------------------------


def test_functions_are_called_at_hooks_with_what_they_name(tmp_path: Path) -> None:
    seen: list[Any] = []
    callbacks: dict[str, Any] = {
        "run_start": lambda run: seen.append(run.output.name),
        "rollouts_ready": lambda rollouts, **others: seen.append((len(rollouts), sorted(others))),
        "step_end": [lambda step: seen.append(step), lambda metrics: seen.append("loss/actor" in metrics)],
        "rlhf_run_end": lambda error: seen.append(error),
    }
    Run(config_of(tmp_path, reward="length", callbacks=callbacks)).train()
    assert seen == ["run", (4, ["rewards", "run", "source"]), 1, True, None]


def test_a_callback_stops_a_run_by_true_and_by_nothing_else(tmp_path: Path) -> None:
    config = config_of(tmp_path, reward="length", steps=3, callbacks=[lambda step: step * 10, lambda step: step == 2])
    assert len(Run(config).train().history) == 2, "10 is an answer of the first, and stops nothing"


def test_the_result_has_metrics_evaluations_and_paths(tmp_path: Path) -> None:
    data = {"rows": ROWS, "heldout": 2}
    result = Run(config_of(tmp_path, data=data, reward="length", steps=2, evaluator="heldout", save_every=1)).train()
    assert isinstance(result, RunResult)
    assert result.history == lines_of(tmp_path / "run" / "metrics.jsonl")
    assert result.metrics["reward/mean"] == result.history[-1]["reward/mean"]
    assert [step for step, _ in result.evaluations] == [0, 2]
    assert set(result.evaluations[0][1]) > {"eval/heldout/reward"}
    assert [each.name for each in result.checkpoints] == ["step-1", "step-2"]
    assert AutoTokenizer.from_pretrained(result.model).eos_token and result.exports == {}


# ----------------------------------------------------------------------------------------------------------------------
# what a file cannot say
# ----------------------------------------------------------------------------------------------------------------------


def test_a_file_names_what_it_cannot_repeat_and_python_resumes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def reward(completions: list[str]) -> list[float]:
        return [0.0] * len(completions)

    def log_step(step: int) -> None: ...

    options: dict[str, Any] = {"reward": reward, "callbacks": log_step}
    Run(config_of(tmp_path, **options)).train()
    file = tmp_path / "run" / "config.toml"
    text = file.read_text()
    assert text.startswith("# callbacks given from Python, which no file repeats: log_step\n")
    assert 'rows = "<from Python: 4 rows, fingerprint' in text and ".reward>" in text
    capsys.readouterr()
    assert main(["--config", str(file), "--output", str(tmp_path / "again")]) == 2
    said = capsys.readouterr().err
    assert "data.rows was given from Python (4 rows" in said and "with make_config(…, data=…)" in said
    assert len(Run(config_of(tmp_path, **options, steps=2, resume=True)).train().history) == 2
    with pytest.raises(UsageError, match=r"began with other options: .*rows.* 4 rows, .* -> .* 3 rows, "):
        Run(config_of(tmp_path, **options, data=ROWS[:3], steps=3, resume=True)).train()
    with pytest.raises(UsageError, match="which cannot be stored in a file or sent to a worker"):
        to_names(config_of(tmp_path, **options))
    assert to_toml(config_of(tmp_path, **options)) == to_toml(config_of(tmp_path, **options)), "no address in memory"


class Thing:
    """Says a lot about itself."""

    def __repr__(self) -> str:
        return "line\n" * 20


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"model": Thing()}, "model is a Thing; pass a name, a folder, or a Hugging Face model (PreTrainedModel)"),
    (
        {"tokenizer": Thing()},
        "tokenizer works only with a model that is a module; a model given by name brings its own",
    ),
    ({"data": iter(ROWS)}, "data is a list_iterator; pass a name, a list of dictionaries, a datasets.Dataset, or"),
    ({"data": Thing()}, "data is a Thing; pass a name, a list of dictionaries, a datasets.Dataset, or a Data provider"),
    ({"data": datasets.Dataset.from_list(ROWS).to_pandas()}, "data is a DataFrame; pass datasets.Dataset.from_pandas"),
    ({"data": {"rows": "x"}}, "data.rows is a str; pass a list of dictionaries or a Dataset"),
    ({"reward": Thing()}, "reward is a Thing; pass a name, a function such as f(completions, **columns), a list"),
    ({"reward": Length}, "reward is the class Length; pass an instance, reward=Length(…)"),
    ({"reward": [brief, 3]}, "reward[1] is 3; pass a function, a name with options, or a Reward"),
    ({"reward": torch.nn.Linear(1, 1)}, "reward is a Linear; save the model and its tokenizer in a folder, and pass"),
    ({"callbacks": 3}, "callbacks: 3 is not a function; pass f(run, step, metrics), or {hook: f}"),
    ({"callbacks": {"step_ends": print}}, "callbacks: no hook is called 'step_ends' (did you mean 'step_end'?)"),
    ({"callbacks": lambda state: 0}, "callbacks: <lambda> asks for 'state', but step_end passes only run, step, m"),
    ({"steps": Thing()}, "steps must be INT, not a Thing"),
    ({"actor": Thing()}, "actor must be a table of options, not a Thing"),
    ({"actor": {"model": Thing()}}, "actor.model must be STR, not a Thing"),
    ({"strategy": Thing()}, "strategy Thing is not a frozen dataclass"),
]


@pytest.mark.parametrize(("options", "said"), WRONG, ids=[said[:30] for _, said in WRONG])
def test_a_wrong_value_is_one_line_that_says_what_to_pass(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        config_of(tmp_path, **options)
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists(), "nothing was written"


def test_rows_that_are_no_dictionaries_are_refused_with_their_number(tmp_path: Path) -> None:
    good: Callable[..., Any] = config_of(tmp_path, data=[{"prompt": "a"}, {"prompt": True}]).providers["data"]
    with pytest.raises(UsageError, match="^rows:2: "):
        good("train")
    for rows, said in (([], "rows: there are no rows"), (["a"], "rows:1: a row should be a dictionary of columns")):
        with pytest.raises(UsageError, match=f"^{said}"):
            config_of(tmp_path, data=rows).providers["data"]("train")


def test_columns_mean_what_they_mean_in_files_and_rewards_get_them_too(tmp_path: Path) -> None:
    rows = [
        {"question": "2 + 2 =", "answer": " 4", "why": "sum"},
        {"question": "1 + 1 =", "answer": " 2", "why": "sum"},
    ]
    data: Callable[..., Any] = config_of(tmp_path, data=rows).providers["data"]
    first = data("train")[0]
    assert (first.prompt, first.completions) == ("2 + 2 =", (" 4",))
    assert first.meta["answer"] == " 4" and first.meta["why"] == "sum"
