"""The real process over real HTTPS: who may speak to it, when it answers, how it ends."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from dapo_hpc.buffer import auth
from dapo_hpc.buffer import messages as msg
from dapo_hpc.buffer.client import BufferClient, BufferUnreachable, LineageFenced
from dapo_hpc.buffer.endpoint import read_endpoint
from dapo_hpc.buffer.owner import take_ownership
from dapo_hpc.records import Lease, PolicyVersion
from dapo_hpc.run_dir import RunDir
from tests.buffer_process import BufferProcess, client_of, make_run
from tests.buffer_world import response, submission

WAKE_S = 1.0
"""A waiting request answers within this after its cause, on a busy machine; it waits for 30 s."""


def request(version: PolicyVersion | None, wait_s: float = 0.0) -> msg.LeaseRequest:
    return msg.LeaseRequest(
        actor="a", version=version, max_responses=100, wait_s=wait_s, stats=msg.ActorStats()
    )


def begin(client: BufferClient, step: int = 0) -> PolicyVersion:
    version = PolicyVersion(step=step, lineage=client.register(step))
    client.publish(version, is_evaluated=False)
    return version


def answer(client: BufferClient, lease: Lease, version: PolicyVersion) -> list[msg.Verdict]:
    responses = [
        response(part.index, version, is_correct=part.index == 0, num_tokens=4)
        for part in lease.missing
    ]
    return client.submit(submission(lease.lease_id, responses)).verdicts[0]


def fill(client: BufferClient, version: PolicyVersion, step: int) -> msg.TakeReply:
    while True:
        for lease in client.lease(request(version)).leases:
            answer(client, lease, version)
        reply = client.take(version.lineage, step, 0.0)
        if reply.groups is not None:
            return reply


def test_a_step_from_lease_to_tokens(buffer: BufferProcess) -> None:
    client = client_of(buffer.run)
    version = begin(client)
    leases = client.lease(request(version)).leases
    assert leases[0].prompt.token_ids.tolist() == list(range(leases[0].prompt.row + 1))
    for lease in leases[:2]:
        assert answer(client, lease, version) == ["stored", "stored"]
    reply = client.take(1, 1, 5.0)
    assert reply.groups is not None
    assert reply.metrics["buffer/invariant_violations"] == 0
    assert reply.metrics["buffer/cpu_s"] > 0
    groups = client.fetch([group.group_id for group in reply.groups])
    assert [group.group_id for group in groups] == [x.group_id for x in leases[:2]]
    sent = response(0, version, is_correct=True, num_tokens=4)
    assert groups[0].responses[0].token_ids.tolist() == sent.token_ids.tolist()
    assert groups[0].responses[0].rollout_logprobs.tolist() == sent.rollout_logprobs.tolist()
    assert groups[0].prompt.uid == leases[0].prompt.uid
    _assert_status_is_written(buffer.run)


def _assert_status_is_written(run: RunDir) -> None:
    assert client_of(run).status()["step"] == 2
    deadline = time.monotonic() + 5
    while json.loads(run.status.read_text())["step"] != 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert json.loads(run.status.read_text())["counters"]["invariant_violations"] == 0


# who may speak to it


def raw(
    run: RunDir, token: str | None, path: str = "status", verify: object = None
) -> httpx.Response:
    url = read_endpoint(run).urls()[0]
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    context = auth.client_context(run) if verify is None else verify
    with httpx.Client(verify=context, trust_env=False) as http:  # type: ignore[arg-type]
        if path == "status":
            return http.get(f"{url}/v1/status", headers=headers)
        return http.post(f"{url}/v1/{path}", headers=headers, content=b"\x80")


@pytest.mark.parametrize("token", [None, "wrong", "0" * 64])
@pytest.mark.parametrize("path", ["status", "register", "fetch", "nothing"])
def test_without_the_token_nothing_is_read_or_changed(
    shared_buffer: BufferProcess, token: str | None, path: str
) -> None:
    assert raw(shared_buffer.run, token, path).status_code == 401


def test_with_the_token_it_answers(shared_buffer: BufferProcess) -> None:
    """Negative control of the refusals."""
    assert raw(shared_buffer.run, auth.token(shared_buffer.run)).status_code == 200


def test_another_certificate_is_refused_by_the_client(
    shared_buffer: BufferProcess, tmp_path: Path
) -> None:
    other = RunDir(tmp_path / "other")
    other.root.mkdir()
    auth.create_auth(other)
    token = auth.token(shared_buffer.run)
    with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
        raw(shared_buffer.run, token, verify=auth.client_context(other))
    other.endpoint.write_text(shared_buffer.run.endpoint.read_text())
    with pytest.raises(BufferUnreachable, match="certificate verify failed"):
        client_of(other, give_up_s=0.3).status()


def test_plain_http_gets_nothing(shared_buffer: BufferProcess) -> None:
    port = read_endpoint(shared_buffer.run).port
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://127.0.0.1:{port}/v1/status", trust_env=False)


@pytest.fixture(scope="module")
def shared_buffer(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """One process for the tests that change nothing."""
    process = BufferProcess(make_run(tmp_path_factory.mktemp("shared")))
    process.start()
    yield process
    process.kill()


def test_secrets_are_private_and_created_once(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    auth.create_auth(run)
    token = auth.token(run)
    auth.create_auth(run)
    assert auth.token(run) == token
    assert run.auth.stat().st_mode & 0o777 == 0o700
    assert {p.stat().st_mode & 0o777 for p in run.auth.iterdir()} == {0o600}
    (run.auth / auth.TOKEN).chmod(0o640)
    with pytest.raises(ValueError, match="other users could speak"):
        auth.create_auth(run)


def test_mistakes_of_the_caller_are_sentences(shared_buffer: BufferProcess) -> None:
    client = client_of(shared_buffer.run)
    with pytest.raises(ValueError, match="never handed out"):
        client.submit(submission(99, []))
    assert (
        "not a RegisterRequest"
        in raw(shared_buffer.run, auth.token(shared_buffer.run), "register").text
    )


# when it answers


def timed(call: object) -> tuple[threading.Thread, list[float]]:
    """Run a call in a thread; the list gets the time at which it returned."""
    ended: list[float] = []

    def target() -> None:
        call()  # type: ignore[operator]
        ended.append(time.monotonic())

    thread = threading.Thread(target=target)
    thread.start()
    time.sleep(0.3)
    return thread, ended


def test_a_waiting_lease_wakes_when_weights_are_published(shared_buffer: BufferProcess) -> None:
    client = client_of(shared_buffer.run)
    lineage = client.register(0)
    thread, ended = timed(lambda: client_of(shared_buffer.run).lease(request(None, wait_s=30)))
    assert ended == []
    began = time.monotonic()
    client.publish(PolicyVersion(step=0, lineage=lineage), is_evaluated=False)
    thread.join()
    assert ended[0] - began < WAKE_S


def test_a_waiting_take_wakes_when_the_batch_closes(buffer: BufferProcess) -> None:
    client = client_of(buffer.run)
    version = begin(client)
    thread, ended = timed(lambda: client_of(buffer.run).take(1, 1, 30.0))
    leases = client.lease(request(version)).leases
    answer(client, leases[0], version)
    assert ended == []
    began = time.monotonic()
    answer(client, leases[1], version)
    thread.join()
    assert ended[0] - began < WAKE_S


def test_a_waiting_request_ends_on_time(shared_buffer: BufferProcess) -> None:
    client = client_of(shared_buffer.run)
    lineage = client.register(0)
    began = time.monotonic()
    assert client.take(lineage, 1, 0.5).groups is None
    assert 0.4 < time.monotonic() - began < 0.5 + WAKE_S


# how it ends, and comes back


def test_stop_answers_those_who_wait_and_exits_with_0(buffer: BufferProcess) -> None:
    client_of(buffer.run).register(0)
    waiting = threading.Thread(
        target=lambda: client_of(buffer.run, give_up_s=0).take(1, 1, 30.0), daemon=True
    )
    waiting.start()
    time.sleep(0.3)
    began = time.monotonic()
    assert buffer.stop() == 0, buffer.log.read_text()
    assert time.monotonic() - began < 3
    waiting.join(5)
    assert not waiting.is_alive()


def test_a_restart_hands_out_the_same_batch(buffer: BufferProcess) -> None:
    client = client_of(buffer.run)
    version = begin(client)
    first = fill(client, version, 1)
    assert first.groups is not None
    buffer.kill()
    buffer.start()
    again = client.take(version.lineage, 1, 1.0)
    assert again.groups == first.groups
    group_ids = [group.group_id for group in first.groups]
    assert [g.group_id for g in client.fetch(group_ids)] == group_ids
    client.publish(PolicyVersion(step=1, lineage=1), is_evaluated=False)
    client.commit(1, 1)
    with pytest.raises(ValueError, match="in no batch that is still kept"):
        client.fetch(group_ids)
    newer = client.register(1)
    with pytest.raises(LineageFenced):
        client.take(version.lineage, 2, 0.0)
    assert buffer.stop() == 0
    buffer.start()
    assert client.status()["lineage"] == newer


def test_a_replaced_owner_exits_and_acknowledges_nothing(buffer: BufferProcess) -> None:
    client = client_of(buffer.run, give_up_s=0.5)
    client.register(0)
    take_ownership(buffer.run.buffer)
    with pytest.raises(BufferUnreachable):
        client.register(0)
    assert buffer.wait() == 1
    assert "has taken over" in buffer.log.read_text().splitlines()[-1]


def test_a_successor_takes_over_from_a_living_process(buffer: BufferProcess) -> None:
    client = client_of(buffer.run)
    version = begin(client)
    first = fill(client, version, 1)
    buffer.signal(signal.SIGSTOP)
    successor = BufferProcess(buffer.run)
    try:
        began = time.monotonic()
        successor.start()
        assert time.monotonic() - began > 2.0, "waits longer than the clients' time-out"
        assert client.take(version.lineage, 1, 0.0).groups == first.groups
        buffer.signal(signal.SIGCONT)
        client.publish(PolicyVersion(step=1, lineage=1), is_evaluated=False)
        assert client.status()["incarnation"] == 2
    finally:
        successor.kill()


def test_an_unreachable_buffer_is_a_sentence(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with pytest.raises(BufferUnreachable, match="does not exist yet"):
        client_of(run, give_up_s=0.3).status()


def test_the_end_of_the_run(tmp_path: Path) -> None:
    prelude = "import dapo_hpc.buffer.service as s; s.LINGER_S = 0.5"
    buffer = BufferProcess(make_run(tmp_path), prelude)
    buffer.start()
    client = client_of(buffer.run)
    version = begin(client)
    assert not client.lease(request(version)).is_done
    client.finish(version.lineage)
    time.sleep(1)
    assert client.lease(request(version)).is_done, "it stays until every actor was told"
    assert buffer.wait(20) == 0, buffer.log.read_text()


def test_the_process_starts_without_torch() -> None:
    program = (
        "import sys, dapo_hpc.roles.buffer, dapo_hpc.buffer.server\n"
        "heavy = {'torch', 'vllm', 'transformers', 'megatron'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_port_in_use_is_a_sentence(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        run = make_run(tmp_path, buffer__port=taken.getsockname()[1])
        process = BufferProcess(run)
        process.start(is_awaited=False)
        assert process.wait() == 1
        assert "(buffer.port) is in use" in process.log.read_text().splitlines()[-1]
