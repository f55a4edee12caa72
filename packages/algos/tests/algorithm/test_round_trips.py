"""From demonstrations to a policy trained against its own reward model, by the command line alone; every folder on the way
is opened by plain transformers and PEFT in a process that has never seen rlhf-core, and gives the same numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlhf_core.cli import main
from rlhf_core.contract.options import ModelOptions
from rlhf_core.models.loading.load import load_model, load_scorer

pytest.importorskip("peft")

PAIRS = [{"prompt": w, "chosen": w.upper(), "rejected": w[::-1]} for w in ("alpha", "be", "gamma ray", "d")]
IDS = [5, 60, 7, 8, 90]
LORA = "--actor.lora.rank 4 --actor.optim.lr 1e-2"
SMALL = "--batch-size 4 --steps 3"

PLAIN = """
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
found = {}
for name, (folder, base, score) in json.loads(sys.argv[1]).items():
    auto = AutoModelForSequenceClassification if score else AutoModelForCausalLM
    model = auto.from_pretrained(base or folder, **({"num_labels": 1} if score else {}))
    if base:
        model = PeftModel.from_pretrained(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template and tokenizer.pad_token_id is not None, name
    with torch.no_grad():
        found[name] = model.eval()(torch.tensor([json.loads(sys.argv[2])])).logits.tolist()
assert "rlhf_core" not in sys.modules
print(json.dumps(found))
"""


def run(words: str) -> None:
    assert main(words.split()) == 0, words


def test_sft_reward_model_ppo_and_merging_by_the_command_line(tmp_path: Path) -> None:
    pairs, prompts, shown = (tmp_path / f"{name}.jsonl" for name in ("pairs", "prompts", "shown"))
    pairs.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    prompts.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in PAIRS))
    shown.write_text("".join(json.dumps({"prompt": r["prompt"], "completion": r["chosen"]}) + "\n" for r in PAIRS))
    at = {name: str(tmp_path / name) for name in ("sft", "policy", "reward", "judge", "ppo", "final")}

    run(f"sft --model tiny --data.path {shown} {SMALL} {LORA} --output {at['sft']}")
    run(f"merge-lora {at['sft']}/model --output {at['policy']}")
    role = LORA.replace("actor", "reward")
    run(f"reward --model {at['policy']} --data.path {pairs} {SMALL} {role} --output {at['reward']}")
    run(f"merge-lora {at['reward']}/model --output {at['judge']}")
    critic = f"--critic.model {at['judge']} --critic.lora.rank 4 --minibatches 1"
    reward = f"--reward model --reward.model {at['reward']}/model"
    sampling = "--sampling.n 2 --sampling.max-new-tokens 8"
    data = f"--data json --data.path {prompts}"
    run(f"ppo --model {at['policy']} {data} {reward} {critic} {SMALL} {sampling} {LORA} --output {at['ppo']}")
    run(f"merge-lora {at['ppo']}/model --output {at['final']}")

    folders = {
        "sft adapter": (f"{at['sft']}/model", f"{at['sft']}/model/base", False),
        "policy": (at["policy"], "", False),
        "reward adapter": (f"{at['reward']}/model", at["policy"], True),
        "judge": (at["judge"], "", True),
        "ppo adapter": (f"{at['ppo']}/model", at["policy"], False),
        "final": (at["final"], "", False),
    }
    words = [sys.executable, "-c", PLAIN, json.dumps(folders), json.dumps(IDS)]
    found = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    for name, (folder, _, score) in folders.items():
        ours = load_scorer(folder, ModelOptions())[0] if score else load_model(folder, ModelOptions())
        with torch.no_grad():
            expected = ours(torch.tensor([IDS])).logits
        torch.testing.assert_close(torch.tensor(found[name]), expected, rtol=0, atol=1e-5)
    for adapter, merged in (("sft adapter", "policy"), ("reward adapter", "judge"), ("ppo adapter", "final")):
        torch.testing.assert_close(torch.tensor(found[adapter]), torch.tensor(found[merged]), rtol=0, atol=1e-5)
    assert (torch.tensor(found["policy"]) - torch.tensor(found["final"])).abs().max() > 1e-4, "training changed it"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("merge-lora tiny --output {new}", "this is a full model, not an adapter"),
        ("merge-lora {adapter}", "needs --output FOLDER"),
        ("merge-lora {adapter} --output {adapter}", "it already exists; name a new folder"),
        ("merge-lora {nothing} --output {new}", "no folder"),
        ("merge-lora {pickled} --output {new}", "pickled weights can run code and are not loaded"),
        ("merge-lora {baseless} --output {new}", "has no base_model_name_or_path"),
        ("merge-lora {misfit} --output {new}", "does not fit its base"),
    ],
)
def test_what_cannot_be_merged_is_told_in_one_line(
    words: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import LoraConfig, get_peft_model

    def adapter(name: str, base: str, size: str = "tiny:hidden=16,layers=1") -> None:
        model = load_model(size, ModelOptions())
        get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")).save_pretrained(
            tmp_path / name
        )
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))

    adapter("adapter", "tiny:hidden=16,layers=1")
    adapter("pickled", "tiny")
    (tmp_path / "pickled" / "adapter_model.safetensors").rename(tmp_path / "pickled" / "adapter_model.bin")
    adapter("baseless", "")
    adapter("misfit", "tiny:hidden=32,layers=1")
    places = {name: tmp_path / name for name in ("new", "adapter", "nothing", "pickled", "baseless", "misfit")}
    assert main(words.format(**places).split()) == 2
    said = capsys.readouterr().err.strip()
    assert message in said
    assert "\n" not in said
    assert not (tmp_path / "new").exists()
