"""Flags of TRL and OpenRLHF are answered with ours, and every answer names options that exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf_core.config.builder import make_config
from rlhf_core.config.foreign_flags import FLAGS, find_answer, read_answer, table
from rlhf_core.config.parsing import read
from rlhf_core.errors import UsageError
from rlhf_core.plugins.registry import Registry

pytest.importorskip("rlhf_algos")
PAGE = Path(__file__).parents[4] / "docs" / "flags.md"
ALGORITHMS = ("sft", "dpo", "cdpo", "distill", "reward", "kto", "grpo", "ppo", "gspo")


@pytest.fixture(scope="module")
def registry() -> Registry:
    return Registry()


def schemas(registry: Registry, *more: str) -> Iterator[tuple[str, set[str]]]:
    """The trained role and everything that can be chosen or set, of each algorithm that has these providers."""
    for algorithm in ALGORITHMS:
        try:
            schema, _ = read([algorithm, *more], registry)
        except UsageError:
            continue
        role = next(path.partition(".")[0] for path in schema.options if path.endswith(".optim.use"))
        yield role, {*schema.options, *list(schema.names)[1:]}


def installed(registry: Registry, kind: str, name: str) -> bool:
    return not name or name in registry.table(kind) or ":" in name


def test_every_answer_names_options_that_a_run_has(registry: Registry) -> None:
    for theirs, ours in FLAGS.items():
        for answer in ours:
            pairs, _ = read_answer(answer)
            chosen = [(path, value) for path, value in pairs if "." not in path and value and value != "METRIC"]
            if not all(
                installed(registry, kind, name) for kind, name in chosen if kind in ("rollout", "strategy", "launcher")
            ):
                continue  # the package of that provider is not here
            words = [word for kind, name in chosen for word in (f"--{kind}", name)]
            paths = [path for path, _ in pairs]
            runs = list(schemas(registry, *words))
            assert any({path.replace("{role}", role) for path in paths} <= known for role, known in runs), (
                theirs,
                answer,
            )


def test_no_flag_of_the_table_is_one_of_ours(registry: Registry) -> None:
    for _, known in schemas(registry):
        assert not {flag for flag in FLAGS if flag in known} - {"loss"}


ANSWERED = {
    "sft": "learning_rate num_train_epochs per_device_train_batch_size gradient_accumulation_steps report_to bf16 max_length "
    "lora_r use_peft model_name_or_path logging_steps eval_strategy max_steps output_dir dataset_name pretrain zero_stage "
    "save_steps save_total_limit load_best_model_at_end warmup_ratio lr_scheduler_type packing micro_train_batch_size",
    "grpo": "learning_rate use_vllm num_generations n_samples_per_prompt init_kl_coef beta epsilon temperature "
    "max_completion_length actor_learning_rate num_iterations reward_funcs scale_rewards max_prompt_length",
    "ppo": "critic_learning_rate gamma lambd value_clip num_ppo_epochs kl_target freezing_actor_steps critic_pretrain",
    "dpo": "beta ref_model rpo_alpha precompute_ref_log_probs chosen_key",
    "reward": "learning_rate lora_alpha center_rewards_coefficient",
}


@pytest.mark.parametrize("algorithm", ANSWERED)
def test_who_types_such_a_flag_reads_what_to_write(algorithm: str, registry: Registry) -> None:
    for theirs in ANSWERED[algorithm].split():
        with pytest.raises(UsageError) as caught:
            read([algorithm, f"--{theirs.replace('_', '-')}", "1"], registry)
        said = str(caught.value)
        assert re.match(rf"unknown flag --{theirs.replace('_', '-')}; write --[a-z]", said) and "\n" not in said, said


def test_answers_read_well(registry: Registry) -> None:
    for words, said in (
        ("sft --learning-rate 1", "unknown flag --learning-rate; write --actor.optim.lr FLOAT (peak"),
        ("reward --learning_rate 1", "unknown flag --learning-rate; write --reward.optim.lr FLOAT (peak"),
        ("grpo --use-vllm", "unknown flag --use-vllm; write --rollout vllm"),
        ("grpo --beta 1", "unknown flag --beta; write --algorithm.kl.coef FLOAT"),
        ("dpo --beta 1", "unknown flag --beta; write --loss.beta FLOAT"),
        ("sft --zero_stage 3", "unknown flag --zero-stage; write --strategy deepspeed --strategy.stage"),
        ("sft --logging-steps 1", "unknown flag --logging-steps; write --observer; every step is logged"),
    ):
        with pytest.raises(UsageError) as caught:
            read(words.split(), registry)
        assert str(caught.value).startswith(said)
    with pytest.raises(
        UsageError, match=r"^unknown option 'learning_rate'; write actor\.optim\.lr FLOAT \(peak learning rate\)$"
    ):
        make_config("sft", registry, model="tiny", data="prompts", learning_rate=1e-5)
    with pytest.raises(UsageError, match=r"^unknown option 'use_vllm'; write rollout = vllm$"):
        make_config("grpo", registry, model="tiny", use_vllm=True)
    assert find_answer("num_generations", "actor", {"epochs"}) == "", "offline algorithms sample nothing"


def test_the_page_has_the_table() -> None:
    assert table() in PAGE.read_text(encoding="utf-8"), "python -m rlhf_core.config.foreign_flags prints it"
    assert len(FLAGS) > 100
