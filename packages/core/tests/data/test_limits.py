"""Limits that all parts keep to: the positions of every role, and the ids that the tokenizer has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import family
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf_core.contract.batch import Example
from rlhf_core.contract.options import Sampling
from rlhf_core.data.encoder import Encoder, Encoding
from rlhf_core.errors import UsageError
from rlhf_core.models.loading.limits import lacking_ids
from rlhf_core.rollout.sampler import sample
from rlhf_core.testing.tiny import tiny_run

POSITIONS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with learned positions, and a head wider than its tokenizer."""
    path, tokenizer = tmp_path_factory.mktemp("gpt2"), family("gpt-2")
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=POSITIONS,
        vocab_size=len(tokenizer) + 200,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.5,
    )
    GPT2LMHeadModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_rows_are_no_longer_than_the_positions_of_the_model(folder: Path, tmp_path: Path) -> None:
    """A row of just as many tokens is kept; its forward pass has a position for each."""
    run = tiny_run(tmp_path, model=str(folder), sampling=Sampling(n=1, max_new_tokens=4))
    encoder = run.data.encoder
    assert encoder.positions == POSITIONS
    word, end = encoder.tokenizer.encode(" Yes")[:1], 1
    text = encoder.tokenizer.decode(word) * (POSITIONS - 2 - end)
    kept = Example("Yes", (text,))
    whole = len(encoder.row(kept).ids) + len(encoder.row(kept).completions[0].ids)
    kept = Example("Yes", (encoder.tokenizer.decode(word) * (POSITIONS - 2 - end - whole + POSITIONS),))
    row = encoder.row(kept)
    assert len(row.ids) + len(row.completions[0].ids) == POSITIONS
    assert encoder.truncate(row) is row
    longer = encoder.row(Example(kept.prompt, (kept.completions[0] + " Yes",)))
    assert encoder.truncate(longer) is None
    prompts = [[*word * n] for n in (POSITIONS - 4, POSITIONS - 3)]
    fits = [encoder.fits_prompt(Example(encoder.tokenizer.decode(ids))) for ids in prompts]
    assert [len(encoder.prompt_row(Example(encoder.tokenizer.decode(ids))).ids) for ids in prompts] == [20, 21]
    assert fits == [True, False]


def test_truncated_rows_end_at_the_last_position() -> None:
    encoder = Encoder(family("gpt-2"), encoding=Encoding(too_long="truncate"))
    encoder.positions = 10
    cut = encoder.truncate(encoder.row(Example("Yes. No. " * 20, ("Yes. " * 20,))))
    assert cut is not None and len(cut.ids) + len(cut.completions[0].ids) == 10
    with pytest.raises(UsageError, match="longer than 9 prompt tokens or 10 tokens in total"):
        Encoder.batch(_dropping(10), [Example("Yes. No. " * 20, ("Yes.",))], [0])


def _dropping(positions: int) -> Encoder:
    encoder = Encoder(family("gpt-2"))
    encoder.positions = positions
    return encoder


def test_completions_that_leave_no_room_for_a_prompt_are_refused(folder: Path, tmp_path: Path) -> None:
    run = tiny_run(tmp_path, model=str(folder), sampling=Sampling(n=1, max_new_tokens=POSITIONS))
    with pytest.raises(
        UsageError, match=f"{POSITIONS} leaves no room for a prompt in the {POSITIONS} positions of the model"
    ):
        run.data.encoder  # noqa: B018  # it is made when it is first used


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 250, "temperature": 1.5}])
def test_ids_that_the_tokenizer_lacks_are_never_sampled(folder: Path, options: dict[str, float]) -> None:
    """A third of the head is padding. Log-probabilities are those of the whole head, as the trainer has them."""
    tokenizer, model = family("gpt-2"), GPT2LMHeadModel.from_pretrained(folder)
    width = model.config.vocab_size
    lacking = lacking_ids(tokenizer, width)
    assert lacking == tuple(range(len(tokenizer), width))
    sampling = Sampling(n=64, max_new_tokens=4, **options)  # type: ignore[arg-type]
    prompt = tokenizer.encode("What is it")
    how = {"eos_ids": (), "pad_id": 0}
    seeds = [[sampling.seed_for(0, k) for k in range(64)]]
    free = sample(model, [prompt], sampling, seeds, **how)  # type: ignore[arg-type]
    assert options.get("temperature") == 0.0 or any(max(each.tokens) >= len(tokenizer) for each in free)
    for each in sample(model, [prompt], sampling, seeds, lacking=lacking, **how):  # type: ignore[arg-type]
        assert max(each.tokens) < len(tokenizer)
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *each.tokens]])).logits[0, len(prompt) - 1 : -1]
        whole = torch.log_softmax(logits.double() / (sampling.temperature or 1.0), -1)
        expected = whole[range(4), each.tokens]
        found = torch.as_tensor(each.logprobs, dtype=torch.float64) + torch.as_tensor(
            each.log_mass, dtype=torch.float64
        )
        assert torch.allclose(found, expected, atol=1e-4)
