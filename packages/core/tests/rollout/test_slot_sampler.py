"""The GPU's sampler on the CPU, without its kernel and graphs, against the sampler without slots; and with both on a GPU."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from test_rollout_sampler import RAGGED, llama, sliding
from transformers import MambaConfig, MambaForCausalLM

from rlhf_core.contract.options import Sampling
from rlhf_core.errors import RunStopped
from rlhf_core.models.heads.warp import draw, draw_from
from rlhf_core.rollout import slot_sampler as file
from rlhf_core.rollout.narrow_weights import narrow_weights
from rlhf_core.rollout.sampler import SampledCompletion, sample
from rlhf_core.rollout.segments import plan_segments
from rlhf_core.rollout.slot_sampler import SlotSampler, try_out
from rlhf_core.rollout.slots import Slots, attend_masked
from rlhf_core.rollout.step import BUCKETS, Board, Next, Stepper, bucket_of, draw_next
from rlhf_core.rollout.wave import CHECK

LAST = 39
"""Id of the last token of the models here."""


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


def both(
    model: Any, sampling: Sampling, prompts: list[list[int]] = RAGGED, cells: int = 0, **options: Any
) -> tuple[list[SampledCompletion], list[SampledCompletion]]:
    """Completions from slots, and those of the sampler without."""
    seeds = [[sampling.seed_for(uid, k) for k in range(sampling.n)] for uid in range(len(prompts))]
    options = {"eos_ids": (), **options}
    slots = SlotSampler(model, torch.float32, cells=cells, flash=False, graphs=False)
    return slots(prompts, sampling, seeds, **options), sample(model, prompts, sampling, seeds, pad_id=0, **options)


def assert_same(found: list[SampledCompletion], expected: list[SampledCompletion]) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.tokens.tolist() == theirs.tokens.tolist()
        assert ours.finish == theirs.finish
        torch.testing.assert_close(ours.logprobs, theirs.logprobs, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.log_mass, theirs.log_mass, rtol=1e-4, atol=1e-4)
        assert (ours.kept_sets is None) == (theirs.kept_sets is None)
        if ours.kept_sets is not None and theirs.kept_sets is not None:
            assert torch.equal(ours.kept_sets.counts_T, theirs.kept_sets.counts_T)
            assert torch.equal(ours.kept_sets.ids_K, theirs.kept_sets.ids_K)


RULES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "warm": {"temperature": 1.7},
    "top-k": {"top_k": 5},
    "top-p": {"top_p": 0.7},
    "min-p, no replay": {"min_p": 0.2, "replay": "off"},
}


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("lacking", [(), (7, LAST)])
def test_slots_give_the_tokens_and_numbers_of_the_other_sampler(
    model: Any, rules: str, lacking: tuple[int, ...]
) -> None:
    """Rows that end at different steps, limits of their own, more steps than between two looks."""
    sampling = Sampling(n=3, max_new_tokens=21, **RULES[rules])
    options = {"eos_ids": (3, 11), "limits": [21, 5, 9, 1, 20], "lacking": lacking}
    found, expected = both(model, sampling, **options)
    assert_same(found, expected)
    assert len({len(each.tokens) for each in found}) > 3, "the rows do not differ"
    assert lacking == () or not {int(t) for each in found for t in each.tokens} & {*lacking}


def test_windows_narrower_than_rows(model: Any) -> None:
    assert_same(*both(sliding(), Sampling(n=2, max_new_tokens=20)))


@pytest.mark.parametrize("cells", [0, 1, 60, 100])
def test_waves_change_nothing(model: Any, cells: int) -> None:
    """A cell budget that one completion exceeds, and ones that cut the completions of a prompt."""
    assert_same(*both(model, Sampling(n=4, max_new_tokens=12), cells=cells, eos_ids=(3,)))


def test_prompts_read_in_parts_change_nothing(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "READ", 12)
    assert_same(*both(model, Sampling(n=2, max_new_tokens=6)))


def test_rows_that_end_leave_the_batch(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row of forty goes on alone after the others' limit: the batch is 48 rows, then one."""
    widths = []
    real = Stepper.__call__

    def counting(self: Any, many: int, widest: int) -> Any:
        widths.append(many)
        return real(self, many, widest)

    monkeypatch.setattr(Stepper, "__call__", counting)
    prompts = [[4, 5, index % 7] for index in range(40)]
    found, expected = both(model, Sampling(n=1, max_new_tokens=40), prompts, limits=[2] * 39 + [40])
    assert_same(found, expected)
    assert [width for width, _ in itertools.groupby(widths)] == [48, 1]
    assert widths.count(48) <= CHECK


def test_stop_strings_end_a_row_in_the_middle_between_two_looks(model: Any) -> None:
    def decode(rows: list[list[int]]) -> list[str]:
        return ["".join(chr(97 + token % 7) for token in row) for row in rows]

    found, expected = both(model, Sampling(n=4, max_new_tokens=24, stop=("ab", "cc", "f")), decode=decode, eos_ids=(3,))
    assert_same(found, expected)
    assert {each.finish for each in found} == {"stop"} or len({len(each.tokens) for each in found}) > 2


def test_a_seed_gives_the_same_tokens_in_any_company(model: Any) -> None:
    sampling = Sampling(n=1, max_new_tokens=9)
    together, _ = both(model, sampling)
    seeds = [[sampling.seed_for(uid, 0)] for uid in range(len(RAGGED))]
    for uid, prompt in enumerate(RAGGED):
        alone = SlotSampler(model, torch.float32, flash=False, graphs=False)(
            [prompt], sampling, [seeds[uid]], eos_ids=()
        )
        assert alone[0].tokens.tolist() == together[uid].tokens.tolist()


def test_the_model_is_left_as_it_was(model: Any) -> None:
    before = model.config._attn_implementation
    model.train()
    sampler = SlotSampler(model, torch.float32, flash=False, graphs=False)
    sampler([[1, 2]], Sampling(n=1, max_new_tokens=2), [[0]], eos_ids=())
    assert model.training
    assert model.config._attn_implementation == before
    assert not sampler.slots.layers, "the buffers are still held"
    model.eval()


def test_a_policy_that_is_no_longer_finite_stops_the_run() -> None:
    broken = llama()
    broken.lm_head.weight.data[3] = torch.nan
    with pytest.raises(RunStopped, match="log-probabilities are not finite"):
        both(broken, Sampling(n=1, max_new_tokens=4))


def test_nothing_is_sampled_for_no_prompts(model: Any) -> None:
    assert SlotSampler(model, torch.float32, flash=False, graphs=False)([], Sampling(n=2), [], eos_ids=()) == []


# ----------------------------------------------------------------------------------------------------------------------
# parts
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cells", "rows"), [(10, 8), (40, 8), (100, 3), (10_000, 512), (10_000, 5)])
def test_waves_hold_every_completion_once_within_cells_and_rows(cells: int, rows: int) -> None:
    lengths, limits, n = [3, 9, 1, 20, 4], [8, 8, 2, 8, 30], 6
    waves = plan_segments(lengths, limits, n, cells, rows)
    pairs = [(p.prompt, k) for wave in waves for p in wave for k in range(p.first, p.stop)]
    assert sorted(pairs) == [(prompt, k) for prompt in range(5) for k in range(n)]
    for wave in waves:
        sizes = [lengths[p.prompt] + limits[p.prompt] for p in wave for _ in range(p.first, p.stop)]
        assert len(sizes) <= rows
        assert sum(sizes) <= cells or len(sizes) == 1


def test_a_batch_takes_the_next_bucket() -> None:
    assert [bucket_of(rows) for rows in (1, 3, 17, 256, 257, 512)] == [1, 4, 32, 256, 384, 512]
    assert all(bucket_of(rows) <= 2 * rows for rows in range(1, BUCKETS[-1] + 1))


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_masked_attention_is_a_softmax_over_each_row_s_own_segment(window: int | None, kv_heads: int) -> None:
    """In float64, against loops; segments have gaps between them and end at the buffers' end."""
    draw = torch.Generator().manual_seed(0)
    starts, lengths = [0, 7, 12], [5, 1, 8]
    slots = Slots(20, torch.float64, flash=False, widest=16)
    slots.starts_R, slots.lengths_R = torch.tensor([*starts, 20]).int(), torch.tensor(lengths).int()
    queries = torch.randn(3, 4, 8, dtype=torch.float64, generator=draw)
    keys, values = torch.randn(2, 20, kv_heads, 8, dtype=torch.float64, generator=draw)
    found = attend_masked(slots, queries, keys, values, 0.3, window)
    for row, head in itertools.product(range(3), range(4)):
        first = starts[row] + max(0, lengths[row] - (window or 99))
        seen = slice(first, starts[row] + lengths[row])
        shared = head // (4 // kv_heads)
        weights = torch.softmax(0.3 * keys[seen, shared] @ queries[row, head], 0)
        torch.testing.assert_close(found[row, head], weights @ values[seen, shared])


@pytest.mark.parametrize("vocabulary", [40, 128, 640, 1000, 2048])
def test_drawing_from_probabilities_is_drawing_from_their_logarithms(vocabulary: int) -> None:
    draws = torch.Generator().manual_seed(0)
    logprobs = torch.randn(500, vocabulary, generator=draws).mul(3).log_softmax(-1)
    uniforms = torch.rand(500, generator=draws, dtype=torch.float64)
    expected = (logprobs.double().exp().cumsum(-1) <= uniforms[:, None] * logprobs.double().exp().sum(-1, True)).sum(-1)
    assert torch.equal(draw_from(5 * logprobs.exp(), uniforms), expected)
    assert torch.equal(draw(logprobs, uniforms), expected)


def test_tokens_that_are_not_drawn_keep_their_probability() -> None:
    """The log-probability of a token is over all ids, also of those that the tokenizer lacks."""
    logits = torch.randn(4000, 6, generator=torch.Generator().manual_seed(0))[:1].expand(4000, -1)
    uniforms = torch.linspace(0.0001, 0.9999, 4000, dtype=torch.float64)
    drawn = draw_next(logits, uniforms, Sampling(temperature=0.5), torch.tensor([2, 5]))
    exact = (logits[0].double() / 0.5).log_softmax(0)
    assert not {2, 5} & set(drawn.tokens_R.tolist())
    torch.testing.assert_close(drawn.logprobs_R.double(), exact[drawn.tokens_R], rtol=0, atol=1e-6)
    shares = torch.bincount(drawn.tokens_R, minlength=6) / 4000
    known = exact.exp().index_fill(0, torch.tensor([2, 5]), 0)
    torch.testing.assert_close(shares.double(), known / known.sum(), rtol=0, atol=1e-3)


def test_linear_layers_compute_from_the_casts_of_autocast(model: Any) -> None:
    """Same numbers as autocast's, bit for bit, and nothing is left of the copies."""
    ids, weights, copies = torch.tensor([[1, 2, 3]]), {id(each) for each in model.parameters()}, {}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(input_ids=ids).logits
        with narrow_weights(model, torch.bfloat16, copies):
            assert model.lm_head.weight.dtype is torch.bfloat16
            assert model.model.embed_tokens.weight.dtype is torch.float32
            found = model(input_ids=ids).logits
    assert torch.equal(found, expected)
    assert {id(each) for each in model.parameters()} == weights


def test_copies_of_weights_keep_their_places_and_take_new_numbers() -> None:
    """A graph reads them where they were when it was recorded."""
    changing, copies = llama(), {}
    with narrow_weights(changing, torch.bfloat16, copies):
        place = changing.lm_head.weight.data_ptr()
    changing.lm_head.weight.data.mul_(2)
    with narrow_weights(changing, torch.bfloat16, copies):
        assert changing.lm_head.weight.data_ptr() == place
        copied = changing.lm_head.weight.clone()
    assert torch.equal(copied, changing.lm_head.weight.to(torch.bfloat16))


def test_what_is_small_is_kept_until_weights_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers and steppers of a first call serve a second one that needs no more; what is kept goes when asked to."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**30))
    monkeypatch.setattr(SlotSampler, "_stepper", keep_eager(SlotSampler._stepper))
    policy, sampling = llama(), Sampling(n=2, max_new_tokens=9)
    sampler = SlotSampler(policy, torch.float32, cells=200, flash=False, graphs=True)
    seeds = [[sampling.seed_for(uid, k) for k in range(2)] for uid in range(len(RAGGED))]
    first = sampler(RAGGED, sampling, seeds, eos_ids=(3,))
    board, buffers = sampler.board, next(iter(sampler.slots.layers.values()))[0].data_ptr()
    widest = sampler._widest
    shorter = sampler(RAGGED[:2], Sampling(n=2, max_new_tokens=4), seeds[:2], eos_ids=(3,))
    assert sampler.board is board
    assert sampler._widest == widest == 32, "a shorter call would record graphs again"
    assert next(iter(sampler.slots.layers.values()))[0].data_ptr() == buffers
    for ours, theirs in zip(shorter, first, strict=False):
        assert ours.tokens.tolist() == theirs.tokens.tolist()[:4]
    with torch.no_grad():
        for each in policy.parameters():
            each.mul_(1.1)
    again = sampler(RAGGED, sampling, seeds, eos_ids=(3,))
    assert sampler.board is board
    fresh = SlotSampler(policy, torch.float32, cells=200, flash=False, graphs=False)(
        RAGGED, sampling, seeds, eos_ids=(3,)
    )
    assert_same(again, fresh)
    policy.lm_head.weight.data = policy.lm_head.weight.data.clone()
    sampler(RAGGED, sampling, seeds, eos_ids=(3,))
    assert sampler.board is not board
    sampler.release()
    assert not sampler.slots.layers
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    sampler(RAGGED, sampling, seeds, eos_ids=(3,))
    assert not sampler.slots.layers, "what is large is not kept"


def keep_eager(real: Any) -> Any:
    """Let steppers run without graphs, which the CPU has not."""

    def stepper(self: Any, *given: Any) -> Any:
        made = real(self, *given)
        made.graphs = False
        return made

    return stepper


def test_idle_rows_write_where_nobody_reads() -> None:
    slots = Slots(9, torch.float32)
    board = Board(3, 2, slots, torch.tensor([7]), torch.device("cpu"))
    board.begin(torch.tensor([0, 4, 6]), torch.tensor([2, 1, 2]), torch.tensor([2, 1, 2]), torch.zeros(3, 2))
    board.note(Next(torch.tensor([7, 5, 6, 9]), torch.tensor([-1.0, -2.0, -3.0, -9.0])))
    assert board.live_R.tolist() == [False, False, True, False]
    board.note(Next(torch.tensor([8, 8, 4, 9]), torch.tensor([-9.0, -9.0, -4.0, -9.0])))
    assert board.ends_B[:3].tolist() == [1, 1, 2]
    assert board.stopped_B[:3].tolist() == [True, False, False]
    assert board.tokens_C.view(-1, 2)[:3].tolist() == [[7, 0], [5, 0], [6, 4]]
    assert board.logprobs_C.view(-1, 2)[:3].tolist() == [[-1, 0], [-2, 0], [-3, -4]]


# ----------------------------------------------------------------------------------------------------------------------
# which models
# ----------------------------------------------------------------------------------------------------------------------


def test_a_model_is_tried_out(model: Any) -> None:
    """Bytes per token: two layers, keys and values, two heads of eight numbers of four bytes."""
    assert try_out(model, torch.float32, flash=False) == ("", 2 * 2 * 2 * 8 * 4)
    assert try_out(sliding(), torch.float32, flash=False)[0] == ""


def test_a_model_whose_steps_differ_is_found_out(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(slots: Slots, queries: Any, keys: Any, values: Any, scale: float, window: int | None) -> Any:
        return attend_masked(slots, queries, keys, values, scale, 1)

    monkeypatch.setattr("rlhf_core.rollout.slots.attend_masked", forgetful)
    assert "gives a different result in such a step" in try_out(model, torch.float32, flash=False)[0]


def test_a_recurrent_model_is_found_out() -> None:
    torch.manual_seed(0)
    mamba = MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=40)).eval()
    assert "MambaForCausalLM" in try_out(mamba, torch.float32, flash=False)[0]


def test_a_cpu_and_attention_that_does_not_pack_keep_the_other_sampler(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fresh = llama()
    assert file.slot_obstacle(fresh, torch.bfloat16) == "it is not on a GPU"
    assert not caplog.text
    monkeypatch.setattr(type(fresh), "device", torch.device("cuda", 0))
    for _ in range(2):
        assert file.slot_obstacle(fresh, torch.bfloat16) == "attention sdpa does not pack rows"
    assert caplog.text.count("sampling without CUDA graphs: attention sdpa") == 1


def test_a_roles_own_head_is_narrowed_too() -> None:
    """The head of a role shares the embedding's float32 weight and has no entry for a bias."""
    from rlhf_core.contract.options import TrainedOptions
    from rlhf_core.contract.plan import RoleSpec
    from rlhf_core.models.build import build_module

    options = TrainedOptions(model="tiny", dtype="bfloat16")
    spec = RoleSpec("actor", options, frozenset({"logprobs_NT"}), terms=(("data", None),))  # type: ignore[arg-type]
    model = build_module(spec).causal_lm
    assert try_out(model, torch.bfloat16, flash=False)[0] == ""
    assert model.get_output_embeddings().weight.dtype == torch.float32
