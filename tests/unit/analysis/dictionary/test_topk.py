"""The running top-k against a full sort, ties included; keys; hash priorities."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lenslrp.analysis.dictionary.topk import (
    EMPTY,
    RunningTopK,
    Spans,
    extremes,
    pack,
    priorities,
    require_finite,
    unpack,
)
from lenslrp.errors import InputError

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def brute_force(
    x: torch.Tensor, docs: list[int], spans: list[tuple[int, int]], k: int, sign: int
) -> list[list[tuple[float, int, int]]]:
    """Sort everything: one hit a document, ties by (-value, document, position). In plain loops."""
    found = []
    for unit in range(x.shape[2]):
        hits = []
        for row, doc in enumerate(docs):
            a, b = spans[row]
            best = min((-sign * float(x[row, p, unit]), p) for p in range(a, b))
            hits.append((best[0], doc, best[1]))
        found.append([(-v, d, p) for v, d, p in sorted(hits)[:k]])
    return found


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("levels", [2, 5, 1000])
@pytest.mark.parametrize("order", ["as it is", "backwards", "shuffled", "in three shards"])
def test_equals_a_full_sort_in_any_order_with_ties(sign: int, levels: int, order: str) -> None:
    x = torch.randint(-levels, levels + 1, (30, 6, 4)).float() / levels
    docs = torch.randperm(1000)[:30]
    spans = [(1, int(n)) for n in torch.randint(2, 7, (30,))]
    batches = torch.arange(30).split(4)
    if order == "backwards":
        batches = batches[::-1]
    if order == "shuffled":
        batches = torch.randperm(30).split(7)
    shards = [batches[i::3] for i in range(3)] if order == "in three shards" else [batches]
    tallies = []
    for shard in shards:
        top = RunningTopK.empty(4, 7)
        for rows in shard:
            where = Spans(1, [spans[r][1] for r in rows.tolist()])
            both = extremes(x[rows], where, [-1, 1])
            best, positions = both[sign > 0]
            top = top.merge([RunningTopK.of(sign * best, positions, docs[rows])], ordered=False)
        tallies.append(top)
    merged = tallies[0].merge(tallies[1:])
    values, found = unpack(merged.keys)
    assert [
        list(zip(v, d, p, strict=True))
        for v, d, p in zip(values.tolist(), found.tolist(), merged.positions.tolist(), strict=True)
    ] == brute_force(x, docs.tolist(), spans, 7, sign)


def test_what_is_outside_its_span_is_never_found() -> None:
    """Neither what comes before, nor what comes after, however large or not a number it is."""
    x = torch.randn(3, 9, 4)
    spans = Spans(2, [4, 9, 6])
    expected = [x[row, 2:end].aminmax(dim=0) for row, end in enumerate(spans.ends)]
    for row, end in enumerate(spans.ends):
        x[row, :2] = torch.tensor([torch.inf, torch.nan])[:, None]
        x[row, end:] = torch.nan if row else -torch.inf
    (lowest, first), (highest, _) = extremes(x, spans, [-1, 1])
    assert torch.equal(lowest, torch.stack([e.min for e in expected]))
    assert torch.equal(highest, torch.stack([e.max for e in expected]))
    assert torch.equal(x.gather(1, first[:, None].long())[:, 0], lowest)


def test_fewer_documents_than_k_leave_empty_entries() -> None:
    ((best, positions),) = extremes(torch.randn(2, 3, 1), Spans(0, [3, 3]), [1])
    top = RunningTopK.empty(1, 4).merge([RunningTopK.of(best, positions, torch.arange(2))])
    values, docs = unpack(top.keys)
    assert docs[0].sort().values.tolist() == [-1, -1, 0, 1]
    assert int(values.isnan().sum()) == int((top.keys == EMPTY).sum()) == 2


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(FLOATS, st.integers(0, 2**32 - 1)), min_size=1, max_size=20))
def test_keys_hold_values_and_documents_and_their_order(pairs: list[tuple[float, int]]) -> None:
    values = torch.tensor([[v for v, _ in pairs]])
    docs = torch.tensor([d for _, d in pairs])
    keys = pack(values, docs)
    back, same = unpack(keys)
    assert torch.equal(back, values + 0.0)
    assert torch.equal(same[0], docs)
    by_key = sorted(range(len(pairs)), key=lambda i: -int(keys[0, i]))
    by_value = sorted(range(len(pairs)), key=lambda i: (-float(values[0, i]), pairs[i][1]))
    assert [pairs[i] for i in by_key] == [pairs[i] for i in by_value]


def test_nan_has_no_place_in_an_order() -> None:
    values = torch.tensor([[0.0, 1.0], [0.0, float("nan")]])
    with pytest.raises(InputError, match=r"mlp.hook_post is NaN or infinite in document 9"):
        require_finite(values, "mlp.hook_post", torch.tensor([4, 9]))


def test_priorities_are_the_same_for_everyone_and_look_random() -> None:
    docs = torch.arange(10_000)
    found = priorities(docs, 0)
    assert torch.equal(found[5:7], priorities(docs[5:7], 0))
    assert not torch.equal(found, priorities(docs, 1))
    assert len(found.unique()) == len(docs)
    assert bool((found >= 0).all())
    assert abs(float((found % 2).double().mean()) - 0.5) < 0.02
    assert abs(float((found.double() / 2**63).mean()) - 0.5) < 0.02


def test_what_is_skipped_is_never_found() -> None:
    torch.manual_seed(3)
    x = torch.randint(-3, 4, (40, 7, 5)).float()
    ends = torch.randint(2, 8, (40,)).tolist()
    skipped = torch.rand(40, 7) < 0.4
    skipped[0] = True  # nothing would be left: searched as if nothing were skipped
    spans = Spans(1, ends, skipped=skipped)
    for sign in (1, -1):
        for part in spans.parts(1):
            (best, positions) = extremes(x[part.rows], part, [sign])[0]
            for row in range(len(part.ends)):
                at = row + part.start
                span = range(1, ends[at])
                kept = [p for p in span if not skipped[at, p]] or list(span)
                assert part.searched(row) == kept
                for unit in range(5):
                    value, first = min((-sign * float(x[at, p, unit]), p) for p in kept)
                    assert (float(best[row, unit]), int(positions[row, unit])) == (
                        -sign * value,
                        first,
                    )
