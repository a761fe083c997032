"""Without the token, or past a wrong certificate, nothing is read and nothing changes (I10)."""

from __future__ import annotations

import json
import os
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dapo_hpc.buffer import auth, server
from dapo_hpc.buffer import messages as msg
from dapo_hpc.buffer.client import BufferClient, BufferUnreachable
from dapo_hpc.cli import main
from dapo_hpc.records import PolicyVersion
from dapo_hpc.run_dir import RunDir, deny_others_writing
from tests.buffer_process import client_of, make_run
from tests.buffer_served import ServedBuffer
from tests.buffer_world import response, submission

SECRET_TOKENS = np.frombuffer(b"payload-nobody-may-see!!", np.int32)
"""Token ids of the stored payload: bytes to look for in answers."""
PLAUSIBLE = {
    "/v1/lease": msg.LeaseRequest(
        actor="thief", version=PolicyVersion(step=0, lineage=1), max_responses=9, wait_s=0.0,
        stats=msg.ActorStats(),
    ),
    "/v1/heartbeat": msg.HeartbeatRequest(
        actor="a", version=None, leases=[], stats=msg.ActorStats(generated_tokens=7)
    ),
    "/v1/submit": submission(1, []),
    "/v1/release": msg.ReleaseRequest(
        actor="a", leases=[msg.LeaseProgress(lease_id=3, new_tokens=[], offsets=[])],
        is_failure=True,
    ),
    "/v1/register": msg.RegisterRequest(step=0),
    "/v1/take": msg.TakeRequest(lineage=1, step=1, wait_s=0.0),
    "/v1/fetch": msg.FetchRequest(group_ids=[1, 2]),
    "/v1/publish": msg.PublishRequest(
        version=PolicyVersion(step=1, lineage=1), is_evaluated=True
    ),
    "/v1/commit": msg.CommitRequest(lineage=1, step=1),
    "/v1/evaluations": msg.Empty(),
    "/v1/finish": msg.FinishRequest(lineage=1),
    "/v1/status": msg.Empty(),
}  # fmt: skip
"""For each endpoint a request that, with the token, would read or change something."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedBuffer]:
    """A service with a taken batch, an open lease and payload on disk."""
    served = ServedBuffer(make_run(tmp_path_factory.mktemp("security")))
    served.start()
    client = client_of(served.run)
    version = PolicyVersion(step=0, lineage=client.register(0))
    client.publish(version, is_evaluated=False)
    request = msg.LeaseRequest(
        actor="a", version=version, max_responses=6, wait_s=0.0, stats=msg.ActorStats()
    )
    for lease in client.lease(request).leases[:2]:
        done = [response(i, version, is_correct=i == 0, num_tokens=6) for i in (0, 1)]
        for one in done:
            one.token_ids[:] = SECRET_TOKENS
        client.submit(submission(lease.lease_id, done))
    assert client.take(1, 1, 5.0).groups is not None
    client.close()
    yield served
    assert served.fatal == []
    served.stop()


def endpoints(served: ServedBuffer) -> list[tuple[str, str]]:
    found = served.paths()
    assert {path for _, path in found} == set(PLAUSIBLE), "give each endpoint a plausible request"
    return found


def assert_nothing_shown(answer: bytes) -> None:
    assert SECRET_TOKENS.tobytes() not in answer
    assert b"lineage" not in answer
    assert b"prompt-" not in answer


@pytest.mark.parametrize("token", ["", "wrong", "0" * 64, "almost"])
def test_no_endpoint_answers_without_the_token(served: ServedBuffer, token: str) -> None:
    wrong = served.token[:-1] + ("0" if served.token[-1] != "0" else "1")
    before = served.state()
    for method, path in endpoints(served):
        body = msg.encode(PLAUSIBLE[path])
        status, answer = served.ask(method, path, body, token=wrong if token == "almost" else token)
        assert status == 401, path
        assert answer == b"the request does not carry this run's token."
    assert served.state() == before


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"Authorization: %s\r\n",
        b"Authorization: Basic %s\r\n",
        b"authorization: bearer %s\r\n",
        b"X-Authorization: Bearer %s\r\n",
        b"Cookie: token=%s\r\n",
        b"Authorization: Bearer %s\r\nAuthorization: Bearer no\r\n",
    ],
)
def test_the_token_counts_in_its_one_place_alone(served: ServedBuffer, header: bytes) -> None:
    before = served.state()
    header = header % served.token.encode() if b"%s" in header else header
    for method, path in endpoints(served):
        body = msg.encode(PLAUSIBLE[path])
        request = b"%s %s HTTP/1.1\r\nHost: x\r\n%sContent-Length: %d\r\n\r\n" % (
            method.encode(), path.encode(), header, len(body),
        )  # fmt: skip
        assert served.say(request + body).startswith(b"HTTP/1.1 401")
    assert served.state() == before


def test_with_the_token_each_endpoint_reads_or_changes_something(served: ServedBuffer) -> None:
    """Negative control: the very same requests are not refused for anything but the token."""
    statuses = {}
    seen = b""
    for path in ("/v1/status", "/v1/take", "/v1/fetch", "/v1/lease", "/v1/heartbeat"):
        method = "GET" if path == "/v1/status" else "POST"
        statuses[path], answer = served.ask(method, path, msg.encode(PLAUSIBLE[path]))
        seen += answer
    assert set(statuses.values()) == {200}
    assert SECRET_TOKENS.tobytes() in seen
    assert b"lineage" in seen


def test_other_methods_and_paths_do_nothing(served: ServedBuffer) -> None:
    before = served.state()
    for method in ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "HEAD"):
        for allowed, path in [
            *endpoints(served),
            ("", "/"),
            ("", "/v1/../auth/token"),
            ("", "/v1"),
        ]:
            if method == allowed or (method == "HEAD" and allowed == "GET"):
                continue
            for token in (None, "wrong") if method == "PUT" else (None,):
                status, answer = served.ask(method, path, b"", token=token)
                assert status == (401 if token else 405 if allowed else 404), (method, path)
                assert_nothing_shown(answer)
    assert served.state() == before


def test_plain_http_gets_nothing(served: ServedBuffer) -> None:
    before = served.state()
    for method, path in endpoints(served):
        head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {served.token}\r\n"
        with socket.create_connection(("127.0.0.1", served.port), timeout=10) as plain:
            plain.sendall(head.encode() + b"Content-Length: 0\r\n\r\n")
            answer = b""
            try:
                while piece := plain.recv(4096):
                    answer += piece
            except ConnectionResetError:
                pass
        assert not answer.startswith(b"HTTP")
        assert_nothing_shown(answer)
    assert served.state() == before


def test_a_websocket_is_refused(served: ServedBuffer) -> None:
    for token, status in (("", b"401"), (served.token, b"404")):
        answer = served.say(
            b"GET /v1 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + token.encode() +
            b"\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )  # fmt: skip
        assert answer.startswith(b"HTTP/1.1 " + status)


def test_a_request_that_bypasses_the_gate_reaches_no_handler(served: ServedBuffer) -> None:
    """The second lock: the application behind the gate, asked directly."""
    from starlette.testclient import TestClient

    inner = served.service.app._app
    before = served.state()
    audit = served.opened.core.desk.audit
    assert audit.counts()["I10"] == 0
    client = TestClient(inner)  # not entered: the background task belongs to the real server
    for method, path in endpoints(served):
        answer = client.request(method, path, content=msg.encode(PLAUSIBLE[path]))
        assert answer.status_code == 403
        assert_nothing_shown(answer.content)
    assert served.state() == before
    assert audit.counts()["I10"] == len(endpoints(served)), "each is counted as a violation"


# certificates


class Impostor:
    """Listens with a certificate of another run; notes every byte that arrives behind TLS."""

    def __init__(self, other: RunDir) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(other.auth / auth.CERTIFICATE, other.auth / auth.KEY)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.heard: list[bytes] = []
        self.num_handshakes = 0
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            plain, _ = self._listener.accept()
            try:
                with self._context.wrap_socket(plain, server_side=True) as secret:
                    self.num_handshakes += 1
                    secret.settimeout(2)
                    self.heard.append(secret.recv(65536))
            except OSError:
                continue


def test_a_client_tells_an_impostor_nothing(served: ServedBuffer, tmp_path: Path) -> None:
    other = RunDir(tmp_path / "other")
    other.root.mkdir()
    auth.create_auth(other)
    impostor = Impostor(other)
    victim = RunDir(tmp_path / "victim")
    victim.root.mkdir()
    auth.create_auth(victim)
    endpoint = json.loads(served.run.endpoint.read_text())
    victim.endpoint.write_text(json.dumps({**endpoint, "addresses": [], "port": impostor.port}))
    calls = [
        lambda c: c.register(0),
        lambda c: c.submit(submission(1, [])),
        lambda c: c.status(),
        lambda c: c.fetch([1]),
    ]
    for call in calls:
        with pytest.raises(BufferUnreachable, match="certificate verify failed"):
            call(BufferClient(victim, request_timeout_s=2.0, give_up_s=0.2))
    assert impostor.heard == []
    trusting = RunDir(tmp_path / "trusting")
    trusting.root.mkdir()
    other.auth.rename(trusting.auth)
    trusting.endpoint.write_text(victim.endpoint.read_text())
    with pytest.raises(BufferUnreachable):
        BufferClient(trusting, request_timeout_s=2.0, give_up_s=0.2).status()
    assert impostor.num_handshakes > 0, "negative control: the impostor does listen"
    assert b"Bearer" in b"".join(impostor.heard)


# the files


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777, 0o770])
def test_a_run_directory_that_others_can_write_is_refused(tmp_path: Path, mode: int) -> None:
    run = make_run(tmp_path)
    run.root.chmod(mode)
    with pytest.raises(ValueError, match=f"has mode {mode:o}: other users .* run chmod -R go-w"):
        auth.create_auth(run)
    assert not run.auth.exists()


@pytest.mark.parametrize("mode", [0o700, 0o750, 0o755])
def test_a_run_directory_that_others_can_only_read_is_allowed(tmp_path: Path, mode: int) -> None:
    run = make_run(tmp_path)
    run.root.chmod(mode)
    auth.create_auth(run)
    assert run.auth.exists()


@pytest.mark.parametrize("name", ["prompts", "config.toml"])
def test_what_lies_in_it_may_not_be_written_by_others_either(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path)
    (run.root / name).chmod(0o777)
    with pytest.raises(ValueError, match=rf"{name} has mode 777: other users could change"):
        auth.create_auth(run)


@pytest.mark.parametrize("mode", [0o710, 0o750, 0o755, 0o701])
def test_jobs_that_others_can_read_are_refused(tmp_path: Path, mode: int) -> None:
    run = make_run(tmp_path)
    run.jobs.mkdir(mode=0o700)
    auth.create_auth(run)
    run.jobs.chmod(mode)
    with pytest.raises(ValueError, match=f"jobs has mode {mode:o}: .* run chmod -R go-rwx .*jobs"):
        auth.create_auth(run)


@pytest.mark.parametrize("name", ["", auth.CERTIFICATE, auth.KEY, auth.TOKEN])
@pytest.mark.parametrize("mode", [0o740, 0o704, 0o710])
def test_secrets_that_others_can_read_are_refused(tmp_path: Path, name: str, mode: int) -> None:
    run = make_run(tmp_path)
    auth.create_auth(run)
    (run.auth / name).chmod(mode)
    for use in (auth.create_auth, auth.client_context):
        with pytest.raises(ValueError, match=f"mode {mode:o}: .* run chmod -R go-rwx .*auth"):
            use(run)


def test_the_buffer_does_not_start_in_a_directory_that_others_can_write(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.root.chmod(0o777)
    with pytest.raises(ValueError, match="other users could change this run's data"):
        server.serve(run, None)  # type: ignore[arg-type]  # refused before the config is read
    assert not run.buffer.exists()


def test_no_command_makes_a_file_that_others_may_write(tmp_path: Path) -> None:
    """Whatever the user's umask; the most open one is the worst case."""
    before = os.umask(0)
    try:
        (tmp_path / "open").mkdir()
        assert (tmp_path / "open").stat().st_mode & 0o022, "negative control: umask 0 lets others"
        assert main(["demo-data", str(tmp_path / "data")]) == 0
        deny_others_writing()
        (tmp_path / "closed").mkdir()
    finally:
        os.umask(before)
    made = [tmp_path / "closed", *(tmp_path / "data").rglob("*")]
    assert [path for path in made if path.stat().st_mode & 0o022] == []
