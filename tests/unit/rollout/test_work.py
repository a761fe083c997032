"""The table of leases: spans, what the buffer lacks, what is dropped."""

from __future__ import annotations

import numpy as np
import pytest
from fake_buffer import make_lease

from dapo_hpc.records import PartialResponse, PolicyVersion, VersionSpan
from dapo_hpc.rollout.engine import Sampled
from dapo_hpc.rollout.work import LeaseTable, Work, merged, spans_between

A, B, C = (PolicyVersion(step=step, lineage=0) for step in range(3))


def span(start: int, version: PolicyVersion) -> VersionSpan:
    return VersionSpan(start=start, version=version)


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([], []),
        ([span(0, A), span(4, A), span(6, B)], [span(0, A), span(6, B)]),
        ([span(0, A), span(0, B)], [span(0, B)]),
        ([span(0, A), span(3, B), span(3, A)], [span(0, A)]),
    ],
    ids=["none", "repeat", "empty first", "empty between"],
)
def test_merged_keeps_one_span_for_each_change(
    spans: list[VersionSpan], expected: list[VersionSpan]
) -> None:
    assert list(merged(spans)) == expected


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (0, 9, [span(0, A), span(3, B), span(7, C)]),
        (3, 7, [span(3, B)]),
        (4, 8, [span(4, B), span(7, C)]),
        (8, 9, [span(8, C)]),
    ],
)
def test_a_cut_of_spans_covers_exactly_the_tokens_cut(
    start: int, end: int, expected: list[VersionSpan]
) -> None:
    assert list(spans_between([span(0, A), span(3, B), span(7, C)], start, end)) == expected


class FakeEngine:
    """Hands out tokens 100, 101, ... for every request; `length` is how many it has."""

    def __init__(self, length: int = 0) -> None:
        self.length = length

    def partial(self, request_ids: list[str], skip: dict[str, int]) -> list[Sampled]:
        return [self.sampled(name, skip[name]) for name in request_ids]

    def sampled(self, name: str, skip: int = 0) -> Sampled:
        token_ids = np.arange(100 + skip, 100 + self.length, dtype=np.int32)
        return Sampled(
            request_id=name,
            token_ids=token_ids,
            logprobs=-token_ids.astype(np.float32),
            finish_reason=None,
        )


def begin(missing: tuple[PartialResponse, ...] | None = None) -> tuple[LeaseTable, list[Work]]:
    """A table with lease 5, started on version A."""
    table = LeaseTable()
    table.take(make_lease(5, size=2, missing=missing))
    works = table.waiting()
    for work in works:
        table.start(work, A)
    return table, works


def test_progress_holds_what_is_not_acknowledged_yet() -> None:
    table, _ = begin()
    engine = FakeEngine(length=3)
    [first] = table.progress(engine.partial)
    assert [part.token_ids.tolist() for part in first.new_tokens] == [[100, 101, 102]] * 2
    assert first.offsets == [0, 0]
    engine.length = 5
    [unacknowledged] = table.progress(engine.partial)
    assert unacknowledged.new_tokens[0].token_ids.tolist() == [100, 101, 102, 103, 104]
    table.acknowledge([first])
    [second] = table.progress(engine.partial)
    assert second.new_tokens[0].token_ids.tolist() == [103, 104]
    assert second.new_tokens[0].spans == (span(3, A),)
    assert second.offsets == [3, 3]
    table.acknowledge([second])
    table.acknowledge([first])
    [nothing] = table.progress(engine.partial)
    assert (nothing.lease_id, nothing.new_tokens) == (5, [])


def test_progress_behind_a_prefix_counts_from_the_first_token_of_the_response() -> None:
    prefix = PartialResponse(
        index=1,
        token_ids=np.array([7, 8], np.int32),
        rollout_logprobs=np.array([-1, -2], np.float32),
        spans=(span(0, B),),
    )
    table, [work] = begin((prefix,))
    engine = FakeEngine(length=2)
    [progress] = table.progress(engine.partial)
    assert (progress.offsets, progress.new_tokens[0].index) == ([2], 1)
    assert progress.new_tokens[0].token_ids.tolist() == [100, 101]
    assert progress.new_tokens[0].spans == (span(2, A),)
    work.ended = engine.sampled(work.request_id)
    assert work.token_ids().tolist() == [7, 8, 100, 101]
    assert work.response_spans() == (span(0, B), span(2, A))


def test_a_response_that_ended_but_is_not_stored_is_still_handed_over() -> None:
    table, [first, second] = begin()
    engine = FakeEngine(length=4)
    first.ended = engine.sampled(first.request_id)
    [progress] = table.progress(lambda _, __: [])
    assert [part.index for part in progress.new_tokens] == [0]
    assert progress.new_tokens[0].token_ids.tolist() == [100, 101, 102, 103]
    assert (table.num_unsampled(), table.num_unstored()) == (1, 1)
    table.finish(5, [0])
    assert table.find(first.request_id) is None
    assert table.find(second.request_id) is second


def test_a_switch_of_version_starts_a_span_where_each_response_is() -> None:
    table, [first, second] = begin()
    second.ended = FakeEngine(length=2).sampled(second.request_id)
    table.switch(B, lambda _: 6)
    assert first.spans == (span(0, A), span(6, B))
    assert second.spans == (span(0, A),)


def test_a_switch_before_the_first_token_leaves_one_span() -> None:
    table, [first, _] = begin()
    table.switch(B, lambda _: 0)
    assert first.spans == (span(0, B),)


def test_the_last_scored_response_of_a_lease_is_known() -> None:
    table, [first, second] = begin()
    assert not table.score(first)
    assert table.score(second)


def test_dropped_leases_are_forgotten_and_their_requests_named() -> None:
    table, _ = begin()
    assert table.drop([4, 5]) == ["5/0", "5/1"]
    assert len(table) == 0
    assert table.find("5/0") is None
    table.finish(5, [0])


def test_a_pinned_version_counts_only_while_it_is_sampled() -> None:
    table = LeaseTable()
    table.take(make_lease(1, size=1, kind="eval", version=A))
    assert table.is_pinned(A)
    assert not table.is_pinned(B)
    assert not table.is_pinned(None)
    [work] = table.waiting()
    work.ended = FakeEngine(length=1).sampled(work.request_id)
    assert not table.is_pinned(A)
