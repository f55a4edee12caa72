"""Programs whose command lines are translated, by their names.

A name is a module, the path of a script (compared by its end), or `trl COMMAND`.
"""

from __future__ import annotations

from collections.abc import Mapping

from rlhf_core.errors import UsageError
from rlhf_core.translation import openrlhf, repulse, rlhflow, trl, verl
from rlhf_core.translation.draft import Program
from rlhf_core.util.suggestions import closest_names, or_list

__all__ = ["PROGRAMS", "find_program"]

ONLINE = "--data hf --rollout hf"
OFFLINE = (trl.OFFLINE, trl.PAIRS)
RAY = "--data hf --rollout hf --launcher ray"

PROGRAMS: Mapping[str, Program] = {
    # OpenRLHF
    "openrlhf.cli.train_sft": Program(
        "sft", openrlhf.OFFLINE, "--data hf", f"{openrlhf.OFFLINE_USUAL}, learning_rate 5e-6, max_len 2048"
    ),
    "openrlhf.cli.train_rm": Program(
        "reward", openrlhf.OFFLINE, "--data hf", f"{openrlhf.OFFLINE_USUAL}, learning_rate 9e-6, max_len 512"
    ),
    "openrlhf.cli.train_dpo": Program(
        "dpo", openrlhf.PAIRS, "--data hf", f"{openrlhf.OFFLINE_USUAL}, learning_rate 1e-5, max_len 512, beta 0.1"
    ),
    "openrlhf.cli.train_kto": Program(
        "kto", openrlhf.OFFLINE, "--data hf", f"{openrlhf.OFFLINE_USUAL}, learning_rate 5e-7, max_len 512, beta 0.01"
    ),
    "openrlhf.cli.train_kd": Program("distill", openrlhf.OFFLINE, "--data hf", openrlhf.OFFLINE_USUAL),
    "openrlhf.cli.train_ppo_ray": Program("ppo", openrlhf.ONLINE, RAY, openrlhf.ONLINE_USUAL),
    "openrlhf.cli.lora_combiner": Program("merge-lora", openrlhf.LORA_COMBINER),
    # RePULSe's fork of it
    "openrlhf.cli.train_ppo": Program("ppo", repulse.TRAINING, ONLINE, repulse.USUAL),
    "openrlhf.cli.evaluate_gcg_sz": Program("eval", repulse.ATTACK),
    # one-pass reward models' fork of it
    "openrlhf.cli.train_rm_head": Program(
        "reward",
        openrlhf.OFFLINE,
        "--data hf",
        f"{openrlhf.OFFLINE_USUAL}, head_only True, lr_scheduler constant, max_len 512",
    ),
    "openrlhf.cli.train_rm_head_hvp": Program(
        "reward",
        openrlhf.OFFLINE,
        "--data hf",
        f"{openrlhf.OFFLINE_USUAL}, head_only True, lr_scheduler constant, max_len 512, damping 0.8, damping_strategy linear, "
        "damping_growth_rate 100, num_cg_steps 3",
    ),
    "online_deployment_ultrafeedback_llama.py": Program("recipe", rlhflow.PIPELINE),
    # RLHFlow
    "sft/sft.py": Program("sft", rlhflow.SFT, "--data hf", rlhflow.SFT_USUAL),
    "generation/get_hf2.py": Program("generate", rlhflow.GENERATION),
    "generation/gen_hf.py": Program("generate", rlhflow.GENERATION),
    "generation/merge_data.py": Program("cat", rlhflow.MERGING),
    "annotate_data/get_rewards.py": Program("score", rlhflow.ANNOTATION),
    "dpo_iteration/run_dpo.py": Program("dpo", rlhflow.DPO, "", rlhflow.DPO_USUAL),
    # TRL
    **{
        f"trl {name}": Program(name, dialect, "--data hf" if dialect in OFFLINE else ONLINE, trl.USUAL[name])
        for name, dialect in trl.TRAINERS.items()
    },
    # verl
    "verl.trainer.main_ppo": Program("ppo", verl.ONLINE, "--data hf", verl.USUAL),
    "verl.trainer.fsdp_sft_trainer": Program("sft", verl.SFT, "--data hf", verl.SFT_USUAL),
    "recipe.dapo.main_dapo": Program("ppo", verl.ONLINE, "--data hf", verl.USUAL),
}

SCRIPTS = {"reward_modeling": "reward", "dpo_online": "online_dpo", "rloo/rloo": "rloo", "ppo/ppo": "ppo"}
"""TRL's scripts that are not called as its commands are."""


def find_program(name: str) -> Program:
    """Return what is known of a program.

    Raises:
        UsageError: nothing is.
    """
    if name in PROGRAMS:
        return PROGRAMS[name]
    for known, program in PROGRAMS.items():
        if known.endswith(".py") and name.endswith(known.removeprefix("./")):
            return program
    stem = name.removesuffix(".py")
    if name.endswith(".py"):
        ending = next((each for script, each in SCRIPTS.items() if stem.endswith(script)), stem.rpartition("/")[2])
        if f"trl {ending}" in PROGRAMS:
            return PROGRAMS[f"trl {ending}"]
    dotted = stem.replace("/", ".")
    if dotted in PROGRAMS:
        return PROGRAMS[dotted]
    close = closest_names(name, list(PROGRAMS))
    hint = f"did you mean {or_list(close)}?" if close else "docs/coming-from.md lists the supported programs"
    raise UsageError(f"{name} is not a supported program; {hint}")
