"""Transport between processes: each worker gets exactly its rows, once, and nothing that it does not need."""

from __future__ import annotations

import pickle
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_core.contract.batch import Batch, StepInfo
from rlhf_core.testing.batches import make_batch, values_like
from rlhf_distributed_ray.arrays import buckets, from_array
from rlhf_distributed_ray.transport import COLUMNS, Shipper, sources_of, split_groups, unpack


def shipper() -> tuple[Shipper, list[Any]]:
    """A shipper, and the list that stands for the object store; references are places in it."""
    store: list[Any] = []

    def put(thing: Any) -> int:
        store.append(thing)
        return len(store) - 1

    return Shipper(put), store


def nbytes(batch: Batch, *names: str) -> int:
    """Return the bytes of columns or extras."""
    tensors = [batch[name] if name in batch else getattr(batch, name) for name in names]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_packed_rows_are_the_batchs_rows_without_texts_labels_or_other_extras() -> None:
    batch = make_batch([3, 1, 4, 2], groups=[0, 0, 1, 1]).with_extras(secret_N=torch.arange(4.0))
    batch.extras["a_NT"] = values_like(batch)
    ship, store = shipper()
    columns, (extra,) = store[ship.columns(batch, [2, 0])], ship.extras(batch, ["a_NT"], [2, 0])
    part = unpack(columns, {"a_NT": store[extra][""]}, StepInfo(3, kl_coef=0.5))
    direct = batch.rows([2, 0])
    for name in ("prompt_NL", "tokens_NT", "mask_NT", "lengths_N", "group_N"):
        assert torch.equal(getattr(part, name), getattr(direct, name))
    assert torch.equal(part["a_NT"], direct["a_NT"])
    assert part.texts == ["", ""] and "secret_N" not in part and part.step == StepInfo(3, kl_coef=0.5)


def test_images_go_with_their_rows_and_those_of_one_prompt_cross_once() -> None:
    batch = make_batch([3, 1, 4, 2], groups=[0, 0, 1, 1])
    seen = {"pixel_values": torch.arange(3000.0).view(1, 3, -1)}
    batch.images = [seen, seen, {}, {}]
    ship, store = shipper()
    part = unpack(pickle.loads(pickle.dumps(store[ship.columns(batch, [2, 0, 1, 3])])))
    assert part.images[0] == {}
    assert torch.equal(part.images[1]["pixel_values"], seen["pixel_values"])
    assert ship.bytes == nbytes(batch, *COLUMNS) + 3000 * 4
    assert unpack(store[ship.columns(make_batch([2], groups=[0]), [0])]).images == [], "texts have none at all"


def test_what_several_roles_read_crosses_once_and_what_nobody_reads_never() -> None:
    """As in a step of ppo: reference and critic infer on the sampled batch, actor and critic train on the credited one."""
    sampled = make_batch([30, 10, 40, 20], groups=[0, 0, 1, 1])
    sampled.texts = ["a long story " * 100] * 4
    ship, store = shipper()
    halves = ([0, 1], [2, 3])
    for _ in ("reference", "critic"):
        for rows in halves:
            ship.columns(sampled, rows)
    credited = sampled.with_extras(**{f"{name}_NT": torch.randn(4, 40) for name in ("advantages", "returns", "unread")})
    for names in (["advantages_NT"], ["advantages_NT", "returns_NT"]):
        for rows in halves:
            ship.columns(credited, rows)
            ship.extras(credited, names, rows)
    assert ship.bytes == nbytes(credited, *COLUMNS, "advantages_NT", "returns_NT")
    pickled = sum(len(pickle.dumps(each)) for each in store)
    assert ship.bytes < pickled < ship.bytes + 3000, "names and shapes, but no text"


def test_a_tensor_that_changed_in_place_is_sent_again() -> None:
    batch = make_batch([2, 3]).with_extras(a_N=torch.zeros(2))
    ship, store = shipper()
    before = ship.extras(batch, ["a_N"], [0, 1])
    batch["a_N"][0] = 5.0
    after = ship.extras(batch, ["a_N"], [0, 1])
    assert before != after and store[after[0]][""].tolist() == [5.0, 0.0]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=7), st.integers(1, 4))
def test_the_rows_of_all_workers_are_the_batch_and_what_one_is_sent_is_its_rows(groups: list[int], parts: int) -> None:
    lengths = [1 + (3 * i) % 5 for i in range(len(groups))]
    batch = make_batch(lengths, groups=sorted(groups)).with_extras(row_N=torch.arange(len(groups)))
    ship, store = shipper()
    for rows in split_groups(batch, parts):
        (extra,) = ship.extras(batch, ["row_N"], rows)
        part = unpack(store[ship.columns(batch, rows)], {"row_N": store[extra][""]})
        assert part["row_N"].tolist() == rows and part.lengths_N.tolist() == [lengths[row] for row in rows]
        assert torch.equal(part.tokens_NT, batch.rows(rows).tokens_NT)
    assert ship.bytes == nbytes(batch, *COLUMNS, "row_N")


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=9), parts=st.integers(1, 4))
def test_groups_stay_whole_every_row_goes_once_and_rows_keep_their_order(sizes: list[int], parts: int) -> None:
    groups = [g for g, n in enumerate(sizes) for _ in range(n)]
    batch = make_batch([1 + (i * 7) % 5 for i in range(len(groups))], groups=groups)
    shares = split_groups(batch, parts)
    assert sorted(row for rows in shares for row in rows) == list(range(len(groups)))
    assert all(rows == sorted(rows) for rows in shares)
    owners = {g: {k for k, rows in enumerate(shares) if any(groups[row] == g for row in rows)} for g in set(groups)}
    assert all(len(owner) == 1 for owner in owners.values())


def test_shares_are_balanced_by_tokens_not_by_rows() -> None:
    batch = make_batch([30, 10, 10, 10], prompt_lengths=[1, 1, 1, 1])
    assert split_groups(batch, 2) == [[0], [1, 2, 3]]


def test_weights_travel_in_buckets_and_arrive_bit_for_bit() -> None:
    weights = {
        "a": torch.randn(3, 2),
        "b": torch.randn(5).bfloat16(),
        "c": torch.arange(4),
        "big": torch.zeros(20 * 2**20),
    }
    sent = list(buckets(iter(weights.items())))
    assert [len(bucket) for bucket in sent] == [4]  # 80 MiB: the bucket closes when it is full
    assert [len(b) for b in buckets(iter({"x": torch.zeros(2**24), "y": torch.zeros(1)}.items()))] == [1, 1]
    for name, packed in sent[0]:
        assert torch.equal(from_array(packed), weights[name]) and from_array(packed).dtype == weights[name].dtype


def test_of_metadata_the_datasource_crosses_if_a_row_says_one() -> None:
    batch = make_batch([3, 1, 4], groups=[0, 1, 2])
    ship, store = shipper()
    columns = store[ship.columns(batch, [2, 1, 0])]
    batch.meta = [{"datasource": "web", "secret": 1}, {}, {"datasource": 3}]
    assert unpack(columns, sources=sources_of(batch, [2, 1, 0])).meta == [
        {"datasource": 3},
        {},
        {"datasource": "web"},
    ]
    assert sources_of(batch, [1]) is None and unpack(store[ship.columns(batch, [1])]).meta == [{}]
