"""Outputs for rows with images, compared with plain transformers on each row, and their errors."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_rows import spec
from vision_models import TEMPLATE, asked, llava, picture, qwen

from rlhf_core.contract.batch import Batch
from rlhf_core.contract.options import ModelOptions, Sampling
from rlhf_core.data.encoder import Encoder
from rlhf_core.data.json import Json
from rlhf_core.errors import UsageError
from rlhf_core.models.build import build_module
from rlhf_core.models.export.dry_save import check_saving
from rlhf_core.models.export.folder import export
from rlhf_core.models.inputs.arrange import arrange_inputs
from rlhf_core.models.loading.image_reader import load_reader
from rlhf_core.models.loading.tokenizer import load_tokenizer
from rlhf_core.models.module import RoleModule
from rlhf_core.rollout.sampler import sample
from rlhf_core.training.microbatch import micro_rows

pytest.importorskip("PIL")

LOGPROBS = frozenset({"logprobs_NT", "entropy_NT"})
MODELS = pytest.mark.parametrize("made", [llava, qwen], ids=["llava", "qwen2-vl"])


@pytest.fixture
def rows(tmp_path: Path) -> str:
    """Rows with two images, one, none, and one of another size."""
    for name, colour, size in (("a.png", "red", (20, 12)), ("b.png", "blue", (9, 30)), ("c.png", "green", (16, 16))):
        picture(tmp_path / name, colour, size)
    written = [
        asked("Which?", "a.png", "b.png", answer="The first."),
        asked("What is it?", "b.png", answer="A stripe of blue."),
        asked("And without?", answer="No."),
        asked("?", "c.png", answer="Green, I should say."),
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in written))
    return str(path)


def encoder(model: str) -> Encoder:
    options = ModelOptions(model=model)
    tokenizer = load_tokenizer(model, options)
    return Encoder(tokenizer, reader=load_reader(model, options, tokenizer))


def read(model: str, rows: str) -> Batch:
    examples = Json(rows)("train")
    return encoder(model).batch(examples, list(range(len(examples))))


def module(model: str, **options: Any) -> RoleModule:
    return build_module(spec("logprobs_NT", "entropy_NT", model=model, **options), chunk=3)


def truth(model: str, batch: Batch) -> list[torch.Tensor]:
    """Log-probabilities of each row's completion by transformers' own model on that row alone, in float64."""
    from transformers import AutoModelForImageTextToText

    plain: Any = AutoModelForImageTextToText.from_pretrained(model).double().eval()
    found = []
    for i in range(len(batch)):
        L, T = int(batch.prompt_lengths_N[i]), int(batch.lengths_N[i])
        ids = torch.cat([batch.prompt_NL[i, :L], batch.tokens_NT[i, :T]])[None]
        seen = {name: each.double() if each.is_floating_point() else each for name, each in batch.images[i].items()}
        types = {name: each for name, each in seen.items() if name.endswith("token_type_ids")}
        seen |= {name: torch.nn.functional.pad(each, (0, T))[None] for name, each in types.items()}
        with torch.no_grad():
            logits = plain(input_ids=ids, **seen).logits[0, L - 1 : -1]
        found.append(logits.log_softmax(-1).gather(1, ids[0, L:, None])[:, 0])
    return found


@MODELS
@pytest.mark.parametrize("tokens", [1, 60, 10_000], ids=["one by one", "some", "together"])
def test_logprobs_are_those_of_each_row_by_itself(
    tmp_path: Path, rows: str, made: Callable[[Path], str], tokens: int
) -> None:
    model = made(tmp_path / "model")
    batch = read(model, rows)
    role = module(model).double()
    expected = truth(model, batch)
    for index in micro_rows(batch, tokens):
        micro = batch.rows(index)
        with torch.no_grad():
            ours = role(arrange_inputs(micro), LOGPROBS)["logprobs_NT"]
        for own, row in zip(ours, index.tolist(), strict=True):
            torch.testing.assert_close(own[: len(expected[row])], expected[row], rtol=0, atol=1e-9)


@MODELS
def test_pixels_reach_the_gradient_of_what_reads_them(tmp_path: Path, rows: str, made: Callable[[Path], str]) -> None:
    model = made(tmp_path / "model")
    role = module(model)
    role(arrange_inputs(read(model, rows)), LOGPROBS)["logprobs_NT"].sum().backward()
    vision = {name: p.grad for name, p in role.named_parameters() if "patch_embed" in name}
    assert vision
    assert all(grad is not None and grad.abs().sum() > 0 for grad in vision.values())


@MODELS
def test_frozen_vision_leaves_the_text_to_train(tmp_path: Path, made: Callable[[Path], str]) -> None:
    role = module(made(tmp_path / "model"), freeze=("vision",))
    frozen = {name for name, p in role.named_parameters() if not p.requires_grad}
    assert any("patch_embed" in name for name in frozen)
    assert not any("language_model" in name or "lm_head" in name for name in frozen)
    assert all("vision_tower" in name or "projector" in name or "visual" in name for name in frozen)


@MODELS
def test_what_is_sampled_has_the_logprobs_that_training_computes(
    tmp_path: Path, rows: str, made: Callable[[Path], str]
) -> None:
    """Prompts of different widths and image counts in one wave, with completions that end early and leave it. The model is
    random and its image token as likely as any other, so that completions have some."""
    model = made(tmp_path / "model")
    examples = Json(rows)("train")
    prompts = encoder(model).prompts(examples, [0, 1, 2, 3])
    role = module(model)
    assert role.vision is not None
    sampling = Sampling(n=6, max_new_tokens=24)
    seeds = [[100 * p + k for k in range(6)] for p in range(4)]
    completions = sample(
        role.causal_lm,
        prompts.token_ids,
        sampling,
        seeds,
        eos_ids=set(range(250, 259)),
        pad_id=256,
        vision=role.vision,
        images=prompts.images,
    )
    from rlhf_core.rollout.assemble import assemble

    tokens, finish = [each.tokens for each in completions], [each.finish for each in completions]
    per_token = {"sampler_logprobs_NT": [each.logprobs for each in completions]}
    rollouts = assemble(prompts, tokens, finish, load_tokenizer(model, ModelOptions()), per_token=per_token)
    assert role.vision.token in rollouts.tokens_NT, "the case is there"
    assert len(set(rollouts.finish)) == 2
    with torch.no_grad():
        ours = role(arrange_inputs(rollouts), LOGPROBS)["logprobs_NT"]
    torch.testing.assert_close(ours, rollouts["sampler_logprobs_NT"], rtol=0, atol=2e-5)


def test_saved_models_give_plain_transformers_the_same_numbers(tmp_path: Path, rows: str) -> None:
    """In a fresh process, from their folders alone: model, processor, template."""
    ours = []
    for made in (llava, qwen):
        model, out = made(tmp_path / made.__name__), tmp_path / f"{made.__name__}-out"
        role = module(model)
        with torch.no_grad():
            for parameter in role.parameters():
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
            ours.append(role(arrange_inputs(read(model, rows)), LOGPROBS)["logprobs_NT"][1])
        state = dict(role.hf_weights())
        export(role, load_tokenizer(model, ModelOptions()), out, base=model, algorithm="sft", state=state)
    command = [sys.executable, "-c", FRESH, str(tmp_path / "b.png"), *(str(tmp_path / f"{n}-out") for n in NAMES)]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    for own, theirs in zip(ours, json.loads(said.stdout.splitlines()[-1]), strict=True):
        torch.testing.assert_close(own[: len(theirs)], torch.tensor(theirs), rtol=0, atol=1e-5)
    assert (tmp_path / "qwen-out" / "video_preprocessor_config.json").is_file(), (
        "what it says about video is still there"
    )


NAMES = ("llava", "qwen")


FRESH = """
import json, sys, torch
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2VLProcessor
from rlhf_core.models.inputs.processor import _without_video  # AutoProcessor wants torchvision for the video that is not here

def logprobs(folder, picture, kind):
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    content = [{"type": "image", "path": picture}, {"type": "text", "text": "What is it?"}]
    processor = kind.from_pretrained(folder)
    found = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )
    answer = torch.tensor([processor.tokenizer("A stripe of blue.<|im_end|>")["input_ids"]])
    T = answer.shape[1]
    found["input_ids"] = torch.cat([found["input_ids"], answer], 1)
    found["attention_mask"] = torch.ones_like(found["input_ids"])
    if "mm_token_type_ids" in found:
        found["mm_token_type_ids"] = torch.nn.functional.pad(found["mm_token_type_ids"], (0, T))
    with torch.no_grad():
        logits = model(**found).logits[0, -T - 1 : -1]
    return logits.log_softmax(-1).gather(1, answer[0][:, None])[:, 0].tolist()

picture, llava, qwen = sys.argv[1:]
kinds = (AutoProcessor, _without_video(Qwen2VLProcessor))
print(json.dumps([logprobs(folder, picture, kind) for folder, kind in zip((llava, qwen), kinds)]))
"""


@MODELS
def test_a_critic_of_images_is_refused(tmp_path: Path, made: Callable[[Path], str]) -> None:
    model = made(tmp_path / "model")
    with pytest.raises(UsageError, match="cannot have one: choose an algorithm without a critic"):
        build_module(spec("logprobs_NT", "values_NT", model=model))


def test_a_checkpoint_without_its_processor_says_so(tmp_path: Path) -> None:
    model = llava(tmp_path / "model")
    (tmp_path / "model" / "processor_config.json").unlink()
    with pytest.raises(UsageError) as caught:
        encoder(model)
    said = str(caught.value)
    assert said.startswith((f"cannot load the processor of '{model}': ", f"'{model}' has no image processor"))
    assert "\n" not in said


def test_a_role_that_reads_text_alone_says_so(tmp_path: Path, rows: str) -> None:
    """A reference with the same tokens, say, that is no vision-language model."""
    batch = read(llava(tmp_path / "model"), rows)
    with pytest.raises(UsageError, match="reads only text, but rows have images"):
        module("tiny")(arrange_inputs(batch), LOGPROBS)


@MODELS
def test_a_template_from_a_file_takes_the_place_of_the_processors(made: Callable[..., str], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model, other = made(tmp_path / "base"), "{% for m in messages %}[{{ m.role }}]{% endfor %}"
    options = ModelOptions(model=model)
    reader = load_reader(model, options, load_tokenizer(model, options))
    assert reader is not None
    before = reader.template
    reader.save(tmp_path / "base", other)  # in place: a processor is read beside its model
    assert AutoTokenizer.from_pretrained(tmp_path / "base").chat_template == other
    assert load_reader(model, options).template == other  # type: ignore[union-attr]
    assert reader.template == before != other, "the run's own is left alone"
    module = build_module(spec("logprobs_NT", model=model))
    check_saving("actor", module, options, TEMPLATE)  # raises where what is read back differs
