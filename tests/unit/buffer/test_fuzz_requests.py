"""Whatever arrives with the token: an answer with a sentence, bounded memory, and books that
balance; afterwards valid requests work as before."""

from __future__ import annotations

import asyncio
import math
import random
import threading
import time
import tracemalloc
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.responses import PlainTextResponse

from dapo_hpc.buffer import auth, gate, service
from dapo_hpc.buffer import messages as msg
from dapo_hpc.records import PolicyVersion, Response
from tests.buffer_process import client_of, make_run
from tests.buffer_served import ServedBuffer, parsed, read_answer
from tests.buffer_world import piece, response, submission

MIB = 2**20
MAX_BODIES = 8 * MIB
REFUSALS = (400, 404, 405, 408, 409, 411, 413)
FUZZ = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
V0 = PolicyVersion(step=0, lineage=1)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedBuffer]:
    """A service that holds nobody for long and little in memory, with leases and a taken batch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(service, "MAX_WAIT_S", 0.01)
        patch.setattr(service, "MAX_TOKENS_BYTES", MIB)
        patch.setattr(service, "MAX_BODIES_BYTES", MAX_BODIES)
        patch.setattr(gate, "BODY_S", 0.5)
        served = ServedBuffer(make_run(tmp_path_factory.mktemp("fuzz"), num_prompts=400))
        served.start()
        client = client_of(served.run)
        client.publish(PolicyVersion(step=0, lineage=client.register(0)), is_evaluated=True)
        a_step_works(served)
        client.lease(lease_request(PolicyVersion(step=0, lineage=1)))
        yield served
        served.stop()


@pytest.fixture
def http(served: ServedBuffer) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {served.token}"}
    url = f"https://127.0.0.1:{served.port}"
    context = auth.client_context(served.run)
    with httpx.Client(
        base_url=url, verify=context, trust_env=False, headers=headers, timeout=20
    ) as http:
        yield http
    assert_unharmed(served)


def lease_request(version: PolicyVersion | None) -> msg.LeaseRequest:
    return msg.LeaseRequest(
        actor="a", version=version, max_responses=20, wait_s=0.0, stats=msg.ActorStats(busy_s=1.5)
    )


def a_step_works(served: ServedBuffer) -> None:
    """A learner registers, an actor fills its batch, and the payload is what was sent."""
    client = client_of(served.run)
    step = served.opened.core.book.state.current_step
    version = PolicyVersion(step=step - 1, lineage=client.register(step - 1))
    client.publish(version, is_evaluated=False)
    sent: dict[tuple[int, int], bytes] = {}
    deadline_s = time.monotonic() + 20
    while (reply := client.take(version.lineage, step, 0.0)).groups is None:
        assert time.monotonic() < deadline_s, served.opened.core.status(0.0)
        actor = f"honest-{step}"
        asked = msg.LeaseRequest(
            actor=actor, version=version, max_responses=40, wait_s=0.0, stats=msg.ActorStats()
        )
        for lease in client.lease(asked).leases:
            used = lease.version or version
            done = [
                response(part.index, used, is_correct=part.index == 0, prefix=part)
                for part in lease.missing
            ]
            sent |= {(lease.group_id, one.index): msg.encode(one) for one in done}
            client.submit(submission(lease.lease_id, done, actor))
        served.opened.core.desk.prolong(-100.0)  # leases the fuzzer took expire at once
    for group in client.fetch([group.group_id for group in reply.groups]):
        for one in group.responses:
            content = sent.get((group.group_id, one.index))
            assert content is None or msg.encode(one) == content
    client.close()


def assert_unharmed(served: ServedBuffer) -> None:
    assert served.fatal == []
    assert served.opened.core.check() == []
    a_step_works(served)


def valid_messages() -> dict[str, Any]:
    """For each endpoint a message as clients send it, arrays and all."""
    parts = [piece(0, 0, 5, V0), piece(1, 0, 3, V0)]
    progress = msg.LeaseProgress(lease_id=4, new_tokens=parts, offsets=[0, 0])
    return {
        "lease": lease_request(V0),
        "heartbeat": msg.HeartbeatRequest(
            actor="a", version=V0, leases=[progress], stats=msg.ActorStats(cpu_s=2.0)
        ),
        "submit": submission(4, [response(0, V0), response(1, V0, is_correct=False)]),
        "release": msg.ReleaseRequest(actor="a", leases=[progress], is_failure=False),
        "register": msg.RegisterRequest(step=0),
        "take": msg.TakeRequest(lineage=1, step=1, wait_s=0.5),
        "fetch": msg.FetchRequest(group_ids=[1, 2]),
        "publish": msg.PublishRequest(version=V0, is_evaluated=True),
        "commit": msg.CommitRequest(lineage=1, step=0),
        "evaluations": msg.Empty(),
        "finish": msg.FinishRequest(lineage=1),
    }


VERBS = sorted(valid_messages())
NUMBERS = st.one_of(
    st.sampled_from([0, -1, 1, 2**31, 2**53, 2**63 - 1, 2**64 - 1, -(2**63)]),
    st.sampled_from([0.0, -0.0, -1.0, 1e308, math.inf, -math.inf, math.nan]),
)
LEAVES = st.one_of(NUMBERS, st.none(), st.booleans(), st.text(max_size=8), st.binary(max_size=9))
JUNK = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=9), inner, max_size=4)
    ),
    max_leaves=12,
)


def bits_flipped(body: bytes, draw: random.Random, num_flips: int) -> bytes:
    flipped = bytearray(body)
    for _ in range(num_flips if body else 0):
        flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
    return bytes(flipped)


def planted(value: Any, draw: random.Random, junk: Any) -> Any:
    """The message with junk somewhere in it."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(list(value))
        return {**value, key: planted(value[key], draw, junk)}
    if isinstance(value, list) and value and draw.random() < 0.8:
        index = draw.randrange(len(value))
        return [*value[:index], planted(value[index], draw, junk), *value[index + 1 :]]
    return junk


@st.composite
def bodies(draw: st.DrawFn, verb: str) -> bytes:
    body = msg.encode(valid_messages()[verb])
    random_draw = draw(st.randoms(use_true_random=False))
    kind = draw(st.sampled_from(["random", "cut", "flip", "flip", "plant", "plant", "longer"]))
    if kind == "random":
        return draw(st.binary(max_size=200))
    if kind == "cut":
        return body[: draw(st.integers(0, len(body)))]
    if kind == "flip":
        return bits_flipped(body, random_draw, draw(st.integers(1, 3)))
    if kind == "longer":
        return body + draw(st.binary(min_size=1, max_size=20))
    plain = msgspec.msgpack.decode(body)
    return msgspec.msgpack.encode(planted(plain, random_draw, draw(JUNK)))


def assert_answered(answer: httpx.Response) -> None:
    if answer.status_code != 200:
        assert answer.status_code in REFUSALS, (answer.status_code, answer.text)
        assert len(answer.text) > 15, "a sentence"


@pytest.mark.parametrize("verb", VERBS)
def test_damaged_messages_are_answered(served: ServedBuffer, http: httpx.Client, verb: str) -> None:
    statuses: list[int] = []

    @FUZZ
    @given(body=bodies(verb))
    def fuzz(body: bytes) -> None:
        answer = http.post(f"/v1/{verb}", content=body)
        assert_answered(answer)
        statuses.append(answer.status_code)
        assert served.fatal == []

    fuzz()
    assert statuses.count(400) > len(statuses) // 3, "negative control: the fuzzer does damage"


def test_every_endpoint_is_fuzzed(served: ServedBuffer) -> None:
    posts = {path.rpartition("/")[2] for method, path in served.paths() if method == "POST"}
    assert posts == set(VERBS)


def test_random_bytes_to_status_and_to_no_endpoint(http: httpx.Client) -> None:
    draw = random.Random(3)
    for path in ("/v1/status", "/v1/nothing", "/", "/v1/lease?x=1", "/v1/%00"):
        for method in ("GET", "POST"):
            assert_answered(http.request(method, path, content=draw.randbytes(500)))


# messages that are small and claim to be large

HOSTILE: dict[str, tuple[str, bytes]] = {
    "array of 2^32 - 1": ("fetch", b"\x81\xa9group_ids\xdd\xff\xff\xff\xff\x01"),
    "map of 2^32 - 1": ("fetch", b"\xdf\xff\xff\xff\xff\xa1a\x01"),
    "text of 2^32 - 1": ("finish", b"\x81\xdb\xff\xff\xff\xffabc"),
    "bytes of 2^32 - 1": ("finish", b"\x81\xa7lineage\xc6\xff\xff\xff\xffabc"),
    "extension of 2^32 - 1": ("finish", b"\x81\xa7lineage\xc9\xff\xff\xff\xff\x01i"),
    "100 000 deep, known place": ("fetch", b"\x81\xa9group_ids" + b"\x91" * 60_000),
    "100 000 deep, unknown place": ("fetch", b"\x81\xa1x" + b"\x91" * 60_000 + b"\xc0"),
    "maps 60 000 deep": ("finish", b"\x81\xa1x" + b"\x81\xa1x" * 20_000 + b"\xc0"),
    "arrays of arrays": ("submit", b"\x83\xa6leases" + b"\xdd\x00\x01\x00\x00" * 13_000),
    "16 MB of groups": ("fetch", b"\x81\xa9group_ids\xdc\xff\xff" + b"\x01" * 65_000),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_small_message_never_takes_much_memory(http: httpx.Client, name: str) -> None:
    verb, body = HOSTILE[name]
    http.get("/v1/status")
    tracemalloc.start()
    try:
        answer = http.post(f"/v1/{verb}", content=body)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert answer.status_code == 400
    assert f"the body is not a {type(valid_messages()[verb]).__name__}" in answer.text
    assert peak < 2 * MIB


EXTENSIONS = [
    (1, b""), (1, b"i"), (1, b"i\x00"), (1, b"f" + b"\0" * 7), (1, b"x" + b"\0" * 8),
    (2, b"i" + b"\0" * 8), (-1, b"\0" * 4), (127, b"i" + b"\0" * 4), (1, b"f" + b"\0" * 8),
]  # fmt: skip
"""(code, content) of arrays that are none, or not the one that belongs there."""


@pytest.mark.parametrize(("code", "content"), EXTENSIONS)
@pytest.mark.parametrize("field", ["token_ids", "rollout_logprobs"])
def test_arrays_whose_sizes_or_types_lie(
    http: httpx.Client, code: int, content: bytes, field: str
) -> None:
    whole: Response = response(0, V0, num_tokens=3)
    plain = msgspec.msgpack.decode(msg.encode(submission(4, [whole])))
    plain["leases"][0]["responses"][0][field] = msgspec.msgpack.Ext(code, content)
    answer = http.post("/v1/submit", content=msgspec.msgpack.encode(plain))
    assert answer.status_code == 400
    assert_answered(answer)


@pytest.mark.parametrize("verb", ["lease", "take"])
@pytest.mark.parametrize("wait_s", [math.nan, math.inf, -1.0, 1e300])
def test_waits_that_are_no_time(http: httpx.Client, verb: str, wait_s: float) -> None:
    plain = msgspec.msgpack.decode(msg.encode(valid_messages()[verb]))
    answer = http.post(f"/v1/{verb}", content=msgspec.msgpack.encode(plain | {"wait_s": wait_s}))
    assert answer.status_code == 400
    assert "wait_s" in answer.text


def test_the_figures_stay_finite(http: httpx.Client) -> None:
    """Not a number in the figures of one actor would spoil every later metric and the status."""
    for bad in (math.nan, math.inf, -1.0):
        plain = msgspec.msgpack.decode(msg.encode(valid_messages()["heartbeat"]))
        plain["stats"]["cpu_s"] = bad
        assert http.post("/v1/heartbeat", content=msgspec.msgpack.encode(plain)).status_code == 400
    assert http.get("/v1/status").status_code == 200


@pytest.mark.parametrize("actor", ["", "a b", "x" * 257, "line\nbreak", "\x1b[2J", "a\n"])
def test_names_that_would_spoil_the_log(http: httpx.Client, actor: str) -> None:
    plain = msgspec.msgpack.decode(msg.encode(valid_messages()["lease"]))
    answer = http.post("/v1/lease", content=msgspec.msgpack.encode(plain | {"actor": actor}))
    assert answer.status_code == 400


def test_a_long_call_id_is_refused(http: httpx.Client) -> None:
    body = msg.encode(valid_messages()["lease"])
    answer = http.post("/v1/lease", content=body, headers={"dapo-call": "x" * 65})
    assert (answer.status_code, answer.text[:22]) == (400, "the header dapo-call h")


# bodies


def head_of(served: ServedBuffer, verb: str, *lines: str) -> bytes:
    first = [f"POST /v1/{verb} HTTP/1.1", "Host: x", f"Authorization: Bearer {served.token}"]
    return "\r\n".join([*first, *lines, "", ""]).encode()


@pytest.mark.parametrize("verb", VERBS)
def test_a_body_that_is_too_long_is_refused_before_it_is_sent(
    served: ServedBuffer, verb: str
) -> None:
    size = 2 * MIB if verb in ("heartbeat", "submit", "release") else service.MAX_BODY_BYTES + 1
    for declared in (size, 10**12, 10**40):
        answer = served.say(head_of(served, verb, f"Content-Length: {declared}"))
        status, sentence = parsed(answer)
        # A length of more than twenty digits is refused by the HTTP parser, with words of its own.
        assert (status, b"reads at most" in sentence) in ((413, True), (400, False))
        assert status == 413 or declared == 10**40


def test_a_body_without_a_size_is_refused(served: ServedBuffer) -> None:
    """Chunked, 400 MB of it: not a byte is kept."""
    chunk = b"%x\r\n" % MIB + b"\0" * MIB + b"\r\n"
    tracemalloc.start()
    with served.connection() as secret:
        secret.sendall(head_of(served, "submit", "Transfer-Encoding: chunked"))
        answer = secret.recv(4096)
        sent = 0
        try:
            while sent < 400:
                secret.sendall(chunk)
                sent += 1
        except OSError:
            pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert answer.startswith(b"HTTP/1.1 411")
    assert sent < 400, "the service closed the connection"
    assert peak < 8 * MIB


@pytest.mark.parametrize("length", ["-1", "1e3", "0x10", "ten", "5, 6", "9" * 25])
def test_a_size_that_is_none(served: ServedBuffer, length: str) -> None:
    status, _ = parsed(
        served.say(head_of(served, "submit", f"Content-Length: {length}") + b"12345")
    )
    assert status in (400, 413)


def test_a_body_that_stops_arriving_is_given_up(served: ServedBuffer) -> None:
    answer = served.say(head_of(served, "submit", "Content-Length: 1000") + b"\x80")
    assert parsed(answer)[0] == 408
    with served.connection() as secret:
        secret.sendall(head_of(served, "submit", "Content-Length: 1000") + b"\x80")
    assert_unharmed(served)


def test_endless_headers_without_a_token_are_cut(served: ServedBuffer) -> None:
    tracemalloc.start()
    sent = 0
    with served.connection() as secret:
        secret.sendall(b"GET /v1/status HTTP/1.1\r\nX: ")
        try:
            while sent < 200:
                secret.sendall(b"x" * MIB)
                sent += 1
        except OSError:
            pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sent < 200
    assert peak < 8 * MIB


def test_bytes_that_are_no_http(served: ServedBuffer) -> None:
    draw = random.Random(9)
    for size in (1, 10, 1000, 100_000):
        answer = served.say(draw.randbytes(size) + b"\r\n\r\n")
        assert answer == b"" or answer.startswith(b"HTTP/1.1 400")
    assert_unharmed(served)


NUM_UPLOADS = 48


@pytest.mark.parametrize("is_bounded", [True, False])
def test_many_uploads_at_once_share_one_bound(
    served: ServedBuffer, monkeypatch: pytest.MonkeyPatch, is_bounded: bool
) -> None:
    """48 bodies of 1 MiB with room for 8: all are answered, never more are held.

    Negative control: without the bound they are held all together.
    """
    monkeypatch.setattr(gate, "BODY_S", 20.0)
    room = served.service.app._app._room
    if not is_bounded:
        monkeypatch.setattr(room, "_total", 2**40)
    body = msg.encode(submission(4, [])).ljust(MIB, b"\0")
    half_way = threading.Barrier(NUM_UPLOADS + 1)
    answers: list[int] = []

    def upload() -> None:
        with served.connection() as secret:
            secret.sendall(head_of(served, "submit", f"Content-Length: {MIB}") + body[:1000])
            half_way.wait(20)
            secret.sendall(body[1000:])
            answers.append(parsed(read_answer(secret))[0])

    threads = [threading.Thread(target=upload) for _ in range(NUM_UPLOADS)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    half_way.wait(20)
    held = room._held
    for thread in threads:
        thread.join(20)
    assert answers == [400] * NUM_UPLOADS
    assert held <= MAX_BODIES if is_bounded else held > 2 * MAX_BODIES
    deadline_s = time.monotonic() + 5  # an answer is read a moment before its room is given back
    while room._held and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert room._held == 0
    assert_unharmed(served)


# the bound itself


@settings(FUZZ, max_examples=100)
@given(data=st.data())
def test_the_bound_holds_in_every_order(data: st.DataObject) -> None:
    """Requests that begin, finish and are cancelled at random, on the limiter alone."""
    asyncio.run(_random_requests(data))


async def _random_requests(data: st.DataObject) -> None:
    total, sizes, ended = 10, {}, {}  # type: int, dict[int, int], dict[int, asyncio.Event]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        number = scope["number"]
        sizes[number] = scope["size"]
        try:
            await ended[number].wait()
        finally:
            del sizes[number]
        await PlainTextResponse("done")(scope, receive, send)

    async def nothing(*_: Any) -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    limiter = gate.LimitBodies(app, limits={}, default=7, total=total)
    tasks: dict[int, asyncio.Task[None]] = {}
    for number in range(data.draw(st.integers(1, 20))):
        if tasks and data.draw(st.booleans()):
            chosen = data.draw(st.sampled_from(sorted(tasks)))
            task = tasks.pop(chosen)
            _ = task.cancel() if data.draw(st.booleans()) else ended[chosen].set()
        size = data.draw(st.integers(0, 7))
        ended[number] = asyncio.Event()
        scope = {
            "type": "http", "path": "/", "method": "POST", "number": number, "size": size,
            "headers": [(b"content-length", b"%d" % size)],
        }  # fmt: skip
        tasks[number] = asyncio.create_task(limiter(scope, nothing, nothing))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert sum(sizes.values()) <= total
    for event in ended.values():
        event.set()
    await asyncio.wait_for(asyncio.gather(*tasks.values(), return_exceptions=True), 5)
    await asyncio.sleep(0)
    assert limiter._room._held == 0
    assert not limiter._room._waiting
