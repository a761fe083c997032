"""The actor's loop with the real engine and real scoring workers, against a FakeBuffer."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_buffer import V0, V1, FakeBuffer, make_lease
from published import publish_model
from reference import reference_logprobs

from dapo_hpc.buffer.client import BufferUnreachable
from dapo_hpc.records import Lease, PartialResponse, PolicyVersion, Response, VersionSpan
from dapo_hpc.rollout.engine import Engine, EngineFailed
from dapo_hpc.rollout.probes import ProbeMismatch
from dapo_hpc.weights.manifest import WeightMismatch

pytest.importorskip("vllm", reason="needs vLLM")

END = 12
TOLERANCE = 1e-4
LONG = {"max_response_tokens": 300}
"""Hardly any response of the endless engine ends before a test interferes."""

Start = Callable[..., Any]
"""The fixture of conftest.py: start(rollout={...}) returns an Actor."""


def assert_sampled_by(response: Response, lease: Lease, model: Path) -> None:
    prompt = lease.prompt.token_ids.tolist()
    truth = reference_logprobs(model, prompt, response.token_ids.tolist())
    assert np.abs(response.rollout_logprobs - truth).max() < TOLERANCE


def test_every_leased_response_is_sampled_scored_and_submitted_once(
    start: Start, buffer: FakeBuffer, tiny_model: Path
) -> None:
    leases = {n: make_lease(n) for n in range(1, 7)}
    buffer.offered = list(leases.values())
    actor = start(rollout={"max_response_tokens": 30})
    buffer.wait_for(lambda: len(buffer.responses()) == 24)
    buffer.say(is_done=True)
    actor.end()
    for (lease_id, _), response in buffer.responses().items():
        assert_sampled_by(response, leases[lease_id], tiny_model)
        assert response.spans == (VersionSpan(start=0, version=V0),)
        is_stopped = int(response.token_ids[-1]) == END
        assert response.finish_reason == ("stop" if is_stopped else "length")
        text_length = int(np.isin(response.token_ids, [END, 13], invert=True).sum())
        assert response.is_correct == (text_length % 2 == 0)
        assert response.reward == (1.0 if response.is_correct else -1.0)
    assert {r.is_correct for r in buffer.responses().values()} == {True, False}
    assert buffer.releases == []
    assert buffer.lease_requests[0].version is None


def test_leases_never_exceed_the_places_of_the_engine(start: Start, buffer: FakeBuffer) -> None:
    buffer.offered = [make_lease(n) for n in range(1, 11)]
    start(rollout={"max_sequences": 16, "max_response_tokens": 20})
    buffer.wait_for(lambda: len(buffer.responses()) == 40)
    assert max(request.max_responses for request in buffer.lease_requests) == 16
    assert buffer.lease_requests[0].max_responses == 16
    assert len(buffer.lease_requests) > 2


def test_a_new_version_is_loaded_before_the_next_leases_are_sampled(
    start: Start, buffer: FakeBuffer, tiny_model: Path, other_model: Path
) -> None:
    first, second = make_lease(1), make_lease(2)
    buffer.offered = [first]
    start(rollout={"max_response_tokens": 30})
    buffer.wait_for(lambda: len(buffer.responses()) == 4)
    buffer.say(newest=V1, offered=[second])
    buffer.wait_for(lambda: len(buffer.responses()) == 8)
    for (lease_id, _), response in buffer.responses().items():
        version, model = {1: (V0, tiny_model), 2: (V1, other_model)}[lease_id]
        assert response.spans == (VersionSpan(start=0, version=version),)
        assert_sampled_by(response, {1: first, 2: second}[lease_id], model)
    assert buffer.held() == V1


def test_only_lease_replies_say_what_is_newest(start: Start, buffer: FakeBuffer) -> None:
    buffer.newest_in_heartbeats = PolicyVersion(step=9, lineage=9)
    start(buffer={"heartbeat_s": 0.05, "lease_s": 10})
    buffer.wait_for(lambda: len(buffer.heartbeats) > 4)
    assert buffer.held() == V0


def test_an_actor_goes_back_to_an_older_version_when_told_to(
    start: Start, buffer: FakeBuffer, tiny_model: Path
) -> None:
    start(rollout={"max_response_tokens": 30}, eval={"every": 0, "top_p": 1.0})
    buffer.say(newest=V1)
    buffer.wait_for(lambda: buffer.held() == V1)
    evaluation = make_lease(1, kind="eval", version=V0)
    buffer.say(newest=V0, offered=[evaluation])
    buffer.wait_for(lambda: len(buffer.responses()) == 4)
    assert_sampled_by(buffer.responses()[1, 0], evaluation, tiny_model)


@pytest.mark.usefixtures("endless")
def test_with_staleness_a_response_goes_on_under_new_weights_and_says_so(
    start: Start, buffer: FakeBuffer, tiny_model: Path, other_model: Path
) -> None:
    lease = make_lease(1, size=2)
    buffer.offered = [lease]
    start(
        rollout={"max_response_tokens": 290},
        buffer={"max_staleness": 1, "heartbeat_s": 0.02, "lease_s": 10},
    )
    buffer.wait_for(lambda: any(p.new_tokens for h in buffer.heartbeats for p in h.leases))
    buffer.say(newest=V1)
    buffer.wait_for(lambda: len(buffer.responses()) == 2)
    for response in buffer.responses().values():
        [before, after] = response.spans
        assert (before.version, after.version) == (V0, V1)
        assert 0 < after.start < 290
        prompt, token_ids = lease.prompt.token_ids.tolist(), response.token_ids.tolist()
        old = np.abs(response.rollout_logprobs - reference_logprobs(tiny_model, prompt, token_ids))
        new = np.abs(response.rollout_logprobs - reference_logprobs(other_model, prompt, token_ids))
        assert old[: after.start].max() < TOLERANCE
        assert new[after.start :].max() < TOLERANCE
        assert old[after.start :].mean() > 0.1


@pytest.mark.usefixtures("endless")
def test_an_aborted_lease_is_dropped_and_frees_its_places(start: Start, buffer: FakeBuffer) -> None:
    buffer.offered = [make_lease(1, size=16)]
    start(rollout={"max_sequences": 16, **LONG}, buffer={"heartbeat_s": 0.1, "lease_s": 10})
    buffer.wait_for(lambda: any(h.leases for h in buffer.heartbeats))
    buffer.say(to_abort=[1], offered=[make_lease(2, size=16)])
    buffer.wait_for(lambda: len(buffer.responses()) == 16)
    assert {lease_id for lease_id, _ in buffer.responses()} == {2}


@pytest.mark.usefixtures("endless")
def test_a_drain_hands_back_every_token_the_buffer_does_not_have(
    start: Start, buffer: FakeBuffer, tiny_model: Path
) -> None:
    leases = {n: make_lease(n) for n in (1, 2)}
    buffer.offered = list(leases.values())
    actor = start(rollout=LONG, buffer={"heartbeat_s": 0.1, "lease_s": 10})
    buffer.wait_for(lambda: sum(any(p.new_tokens for p in h.leases) for h in buffer.heartbeats) > 2)
    actor.loop.drain()
    actor.end()
    [release] = buffer.releases
    assert not release.is_failure
    assert {lease.lease_id for lease in release.leases} == {1, 2}
    known: dict[tuple[int, int], list[PartialResponse]] = {}
    for message in (*buffer.heartbeats, release):
        for lease in message.leases:
            for part, offset in zip(lease.new_tokens, lease.offsets, strict=True):
                parts = known.setdefault((lease.lease_id, part.index), [])
                assert offset == sum(len(p.token_ids) for p in parts)
                assert part.spans == (VersionSpan(start=offset, version=V0),)
                parts.append(part)
    assert len(known) == 8
    for (lease_id, _), parts in known.items():
        token_ids = np.concatenate([p.token_ids for p in parts]).tolist()
        prompt = leases[lease_id].prompt.token_ids.tolist()
        truth = reference_logprobs(tiny_model, prompt, token_ids)
        sampled = np.concatenate([p.rollout_logprobs for p in parts])
        assert np.abs(sampled - truth).max() < TOLERANCE


def prefix(index: int, token_ids: list[int]) -> PartialResponse:
    return PartialResponse(
        index=index,
        token_ids=np.array(token_ids, np.int32),
        rollout_logprobs=np.full(len(token_ids), -0.5, np.float32),
        spans=(VersionSpan(start=0, version=PolicyVersion(step=0, lineage=0)),),
    )


def test_responses_of_an_earlier_actor_are_continued(
    start: Start, buffer: FakeBuffer, tiny_model: Path
) -> None:
    begun = {0: [4, 5, 6], 2: [7, END], 3: [8] * 30}
    missing = tuple(prefix(index, token_ids) for index, token_ids in begun.items())
    lease = make_lease(1, missing=missing)
    buffer.offered = [lease]
    start(rollout={"max_response_tokens": 30})
    buffer.wait_for(lambda: len(buffer.responses()) == 3)
    responses = {index: response for (_, index), response in buffer.responses().items()}
    earlier = VersionSpan(start=0, version=PolicyVersion(step=0, lineage=0))

    continued = responses[0]
    assert continued.token_ids[:3].tolist() == begun[0]
    assert 3 < len(continued.token_ids) <= 30
    assert continued.spans == (earlier, VersionSpan(start=3, version=V0))
    truth = reference_logprobs(
        tiny_model, lease.prompt.token_ids.tolist(), continued.token_ids.tolist()
    )
    assert np.abs(continued.rollout_logprobs - truth)[3:].max() < TOLERANCE
    assert (continued.rollout_logprobs[:3] == -0.5).all()

    ended, full = responses[2], responses[3]
    assert (ended.token_ids.tolist(), ended.finish_reason) == (begun[2], "stop")
    assert (full.token_ids.tolist(), full.finish_reason) == (begun[3], "length")
    assert ended.spans == full.spans == (earlier,)


def test_evaluation_leases_keep_their_version_and_their_sampling(
    start: Start, buffer: FakeBuffer, tiny_model: Path, other_model: Path
) -> None:
    evaluation = make_lease(1, kind="eval", version=V0)
    train = make_lease(2)
    buffer.offered = [evaluation]
    start(
        rollout={"max_response_tokens": 100},
        eval={"every": 1, "temperature": 0.0},
        prompts={"eval": "unused.parquet"},
    )
    buffer.wait_for(lambda: not buffer.offered)
    buffer.say(newest=V1, offered=[train])
    buffer.wait_for(lambda: len(buffer.responses()) == 8)
    found = buffer.responses()
    greedy = {tuple(found[1, index].token_ids.tolist()) for index in range(4)}
    assert len(greedy) == 1
    for index in range(4):
        assert_sampled_by(found[1, index], evaluation, tiny_model)
        assert found[1, index].spans == (VersionSpan(start=0, version=V0),)
        assert_sampled_by(found[2, index], train, other_model)


def test_an_evaluation_lease_of_a_version_that_is_gone_is_handed_back(
    start: Start, buffer: FakeBuffer
) -> None:
    gone = PolicyVersion(step=7, lineage=0)
    buffer.offered = [make_lease(1, kind="eval", version=gone), make_lease(2)]
    start(rollout={"max_response_tokens": 20})
    buffer.wait_for(lambda: len(buffer.responses()) == 4 and bool(buffer.releases))
    [release] = buffer.releases
    assert [lease.lease_id for lease in release.leases] == [1]
    assert not release.is_failure


def test_a_prompt_the_engine_refuses_is_handed_back_as_a_failure(
    start: Start, buffer: FakeBuffer
) -> None:
    too_long = make_lease(1, size=3)
    prompt = replace(too_long.prompt, token_ids=np.ones(300, np.int32))
    buffer.offered = [replace(too_long, prompt=prompt), make_lease(2)]
    actor = start(rollout={"max_response_tokens": 20})
    buffer.wait_for(lambda: len(buffer.responses()) == 4 and bool(buffer.releases))
    buffer.say(is_done=True)
    actor.end()
    [release] = buffer.releases
    assert release.is_failure
    assert [lease.lease_id for lease in release.leases] == [1]
    assert {lease_id for lease_id, _ in buffer.responses()} == {2}


def test_a_failing_engine_hands_its_leases_back_as_failures(
    start: Start, buffer: FakeBuffer, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError("out of memory")

    actor = start()
    buffer.wait_for(lambda: buffer.held() == V0)
    monkeypatch.setattr(engine._core, "get_output", fail)
    buffer.say(offered=[make_lease(1)])
    actor.join()
    assert isinstance(actor.error, EngineFailed)
    assert "out of memory" in str(actor.error)
    [release] = buffer.releases
    assert release.is_failure
    assert [lease.lease_id for lease in release.leases] == [1]
    assert buffer.submits == []


def test_a_probe_beyond_the_tolerance_refuses_to_sample(
    start: Start, buffer: FakeBuffer, weights: Path, tiny_model: Path
) -> None:
    publish_model(weights, V0, tiny_model, shift=0.25)
    buffer.offered = [make_lease(1)]
    actor = start()
    actor.join()
    assert isinstance(actor.error, ProbeMismatch)
    assert "differ by 0.25 nats" in str(actor.error)
    assert "weights.probe_tolerance = 0.1" in str(actor.error)
    assert buffer.submits == []
    assert [(len(r.leases), r.is_failure) for r in buffer.releases] == [(1, False)]


def test_damaged_weights_are_never_loaded(start: Start, weights: Path) -> None:
    file = weights / V0.name / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    actor = start()
    actor.join()
    assert isinstance(actor.error, WeightMismatch)


def test_a_version_retired_meanwhile_is_asked_for_again(start: Start, buffer: FakeBuffer) -> None:
    buffer.newest = PolicyVersion(step=0, lineage=0)
    buffer.newest_after_first_reply = V0
    buffer.offered = [make_lease(1)]
    start(rollout={"max_response_tokens": 20})
    buffer.wait_for(lambda: len(buffer.responses()) == 4)
    assert buffer.responses()[1, 0].spans == (VersionSpan(start=0, version=V0),)


def test_a_version_that_stays_missing_ends_the_actor(start: Start, buffer: FakeBuffer) -> None:
    buffer.newest = PolicyVersion(step=0, lineage=0)
    actor = start()
    actor.join()
    assert isinstance(actor.error, FileNotFoundError)
    assert "v000000-l000 is not there" in str(actor.error)


@pytest.mark.parametrize("error", [ValueError, BufferUnreachable])
def test_an_error_of_a_background_thread_ends_the_actor(
    start: Start, buffer: FakeBuffer, error: type[Exception]
) -> None:
    buffer.fails_next = [error("of a background thread")]
    buffer.offered = [make_lease(1, size=2)]
    actor = start(rollout={"max_response_tokens": 20})
    actor.join()
    assert isinstance(actor.error, error)


def test_without_work_for_long_it_leaves_and_says_so(start: Start, buffer: FakeBuffer) -> None:
    buffer.offered = [make_lease(1)]
    actor = start(idle_exit_s=1.5)
    buffer.wait_for(lambda: bool(buffer.submits))
    began_s = time.monotonic()
    actor.end()
    assert actor.loop.is_idle
    assert time.monotonic() - began_s > 1.0, "it had work a moment ago"


def test_a_drained_actor_was_not_idle(start: Start, buffer: FakeBuffer) -> None:
    del buffer
    actor = start(idle_exit_s=60.0)
    actor.loop.drain()
    actor.end()
    assert not actor.loop.is_idle
