"""A card's loading code runs in the folder that it lies in, and a merged model keeps what its adapter's card says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from model_rows import spec
from transformers import AutoModelForCausalLM, LlamaConfig

from rlhf_core.cli.merge_lora import MergeLora
from rlhf_core.contract.options import Lora, ModelOptions
from rlhf_core.models.build import build_module
from rlhf_core.models.export.card import Card, read_card
from rlhf_core.models.export.folder import export
from rlhf_core.models.export.loading_code import loading_code
from rlhf_core.models.loading.byte_tokenizer import EOS, PAD, TOKENS, byte_tokenizer
from rlhf_core.models.loading.load import load_model, load_scorer
from rlhf_core.models.loading.tokenizer import load_tokenizer

pytest.importorskip("peft")

IDS = torch.tensor([[5, 6, 7, 8]])


def code_of(folder: Path) -> str:
    """The Python block of a card."""
    found = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return found[1]


def base_folder(path: Path) -> str:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens: dict[str, Any] = {"vocab_size": TOKENS, "bos_token_id": None, "eos_token_id": EOS, "pad_token_id": PAD}
    AutoModelForCausalLM.from_config(LlamaConfig(**sizes, **tokens)).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("base", ["tiny", "folder"])
@pytest.mark.parametrize("lora", [Lora(), Lora(rank=2)], ids=["all", "lora"])
@pytest.mark.parametrize("outputs", ["logprobs_NT", "scores_N"])
def test_a_cards_loading_code_runs(
    outputs: str, lora: Lora, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base lies in a relative folder, and the code runs elsewhere: in the model's folder."""
    monkeypatch.chdir(tmp_path)
    if base == "folder":
        base_folder(tmp_path / "started")
    name = "tiny:hidden=16,layers=1,heads=1" if base == "tiny" else "started"
    made = spec(outputs, model=name, lora=lora)
    module = build_module(made)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3)
        expected = (
            module.model.base_model(IDS)[0] @ module.scalar_head("score").weight.T if "scores" in outputs else None
        )
    tokenizer = load_tokenizer(name, made.options)
    export(module, tokenizer, tmp_path / "out", base=name, algorithm="dpo")
    monkeypatch.chdir(tmp_path / "out")
    names: dict[str, Any] = {}
    exec(code_of(tmp_path / "out"), names)
    with torch.no_grad():
        found = names["model"](IDS).logits
    if expected is None:
        with torch.no_grad():
            expected = load_model(str(tmp_path / "out"), ModelOptions())(IDS).logits
        torch.testing.assert_close(found, expected)
    else:
        torch.testing.assert_close(found, expected[:, -1])
    assert names["tokenizer"]("ab")["input_ids"] == tokenizer("ab")["input_ids"]
    assert str(tmp_path) not in (tmp_path / "out" / "README.md").read_text(), "nobody's business"


def test_plain_transformers_finds_an_adapters_base_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From any folder, though the base was named by a relative path, or was made on the spot."""
    monkeypatch.chdir(tmp_path)
    base_folder(tmp_path / "started")
    (tmp_path / "elsewhere").mkdir()
    for number, name in enumerate(["started", "tiny:hidden=16,layers=1,heads=1"]):
        made = spec("logprobs_NT", model=name, lora=Lora(rank=2))
        monkeypatch.chdir(tmp_path)
        export(build_module(made), load_tokenizer(name, made.options), f"out{number}", base=name, algorithm="dpo")
        monkeypatch.chdir(tmp_path / "elsewhere")
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / f"out{number}")
        with torch.no_grad():
            found, ours = (each(IDS).logits for each in (plain, load_model(f"../out{number}", ModelOptions())))
        torch.testing.assert_close(found, ours)


def test_an_adapter_on_tiny_is_found_where_its_folder_was_moved(tmp_path: Path) -> None:
    made = spec("scores_N", model="tiny:hidden=16,layers=1,heads=1", lora=Lora(rank=2))
    tokenizer = load_tokenizer(made.options.model, made.options)
    export(build_module(made), tokenizer, tmp_path / "out", base=made.options.model, algorithm="reward")
    (tmp_path / "out").rename(tmp_path / "moved")
    assert load_scorer(str(tmp_path / "moved"), ModelOptions())[1]


def test_bases_of_other_kinds_are_named_as_plain_transformers_takes_them() -> None:
    """Not run: nothing of it is here."""
    hub = "\n".join(loading_code("org/base", ".", "LoRA", adapter=True, classifier=False))
    assert 'base = AutoModelForCausalLM.from_pretrained("org/base")' in hub
    pushed = "\n".join(loading_code("tiny", "me/first", "LoRA", adapter=True, classifier=False))
    assert 'from_pretrained("me/first", subfolder="base")' in pushed
    assert 'PeftModel.from_pretrained(base, "me/first")' in pushed
    shipped = "\n".join(loading_code("smollm2-135m", ".", "LoRA", adapter=True, classifier=False))
    assert "smollm2-135m" not in shipped, "a name of ours"
    assert "from_pretrained(file.parent, gguf_file=file.name)" in shipped
    compile(shipped, "card", "exec")


def test_a_merged_models_card_keeps_algorithm_data_and_steps(tmp_path: Path, capsys: Any) -> None:
    made = spec("logprobs_NT", model="tiny:hidden=16,layers=1,heads=1", lora=Lora(rank=2))
    tokenizer = load_tokenizer(made.options.model, made.options)
    export(build_module(made), tokenizer, tmp_path / "adapter", base=made.options.model, algorithm="dpo")
    card = Card(made.options.model, "dpo", 30, "Read by `json`: pairs.jsonl.", {"eval/loss": 0.25})
    (tmp_path / "adapter" / "README.md").write_text(card.text("LoRA", adapter=True))
    MergeLora(str(tmp_path / "adapter"), str(tmp_path / "merged"))(None)  # type: ignore[arg-type]  # it asks it nothing
    text = (tmp_path / "merged" / "README.md").read_text()
    assert "made with `dpo` in 30 steps by rlhf-core." in text
    assert "trained from `tiny:hidden=16,layers=1,heads=1`" in text
    assert "The adapter is merged into the weights." in text
    assert "Read by `json`: pairs.jsonl." in text
    assert "| loss | 0.25 |" in text
    assert "peft" not in text, "it loads without"


def test_the_card_of_another_program_is_not_read(tmp_path: Path) -> None:
    assert read_card(tmp_path) is None
    (tmp_path / "README.md").write_text("# Model Card for out\n\nThis model was trained with SFT.\n")
    assert read_card(tmp_path) is None


def test_a_card_has_no_sentence_that_reads_unfinished() -> None:
    text = Card("org/base", "sft").text("LlamaForCausalLM")
    assert "to be written" not in text.lower()
    assert text.endswith("## TODO: intended use and limits\n")


def test_a_bases_own_dtype_is_that_of_a_merged_model(tmp_path: Path) -> None:
    name = base_folder(tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(name).to(torch.bfloat16).save_pretrained(name)
    made = spec("logprobs_NT", model=name, lora=Lora(rank=2))
    export(build_module(made), load_tokenizer(name, made.options), tmp_path / "adapter", base=name, algorithm="dpo")
    for wanted, dtype in (("base", "bfloat16"), ("float32", "float32")):
        MergeLora(str(tmp_path / "adapter"), str(tmp_path / f"as-{wanted}"), dtype=wanted)(None)  # type: ignore[arg-type]
        assert json.loads((tmp_path / f"as-{wanted}" / "config.json").read_text())["dtype"] == dtype
        assert str(AutoModelForCausalLM.from_pretrained(tmp_path / f"as-{wanted}").dtype) == f"torch.{dtype}"
