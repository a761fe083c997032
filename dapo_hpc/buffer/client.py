"""How actors and the learner speak to the buffer: every call is safe to repeat, and is repeated."""

from __future__ import annotations

import hashlib
import json
import logging
import time
import uuid
from typing import Any

import httpx

from dapo_hpc.buffer import auth
from dapo_hpc.buffer import messages as msg
from dapo_hpc.buffer.desk import LineageFenced
from dapo_hpc.buffer.endpoint import read_endpoint
from dapo_hpc.buffer.segments import PayloadCorrupt
from dapo_hpc.records import Group, PolicyVersion, Response
from dapo_hpc.run_dir import RunDir

__all__ = ["BufferClient", "BufferUnreachable", "LineageFenced", "PayloadCorrupt"]

log = logging.getLogger(__name__)

FIRST_DELAY_S = 0.1
MAX_DELAY_S = 5.0
"""Between two attempts; the delay doubles from the first to this."""
RETRY_TIMEOUTS = 12
"""A call gives up after this many request time-outs: longer than a successor needs to take over."""
CONNECT_S = 5.0
FETCH_GROUPS = 2
"""Groups in one reply: while the buffer encrypts it, nobody else is answered."""
CALL_HEADER = "dapo-call"


class BufferUnreachable(Exception):
    """No buffer answered within the deadline; its process is gone, or the network is."""


class BufferClient:
    """Thread-safe; finds the buffer again when it moves."""

    def __init__(
        self, run: RunDir, *, request_timeout_s: float, give_up_s: float | None = None
    ) -> None:
        """`give_up_s`: for how long a call is repeated; None: 12 times the request time-out."""
        self._run = run
        self._timeout_s = request_timeout_s
        self._give_up_s = RETRY_TIMEOUTS * request_timeout_s if give_up_s is None else give_up_s
        self._urls: list[str] = []
        self._session: httpx.Client | None = None

    # actors

    def lease(self, request: msg.LeaseRequest) -> msg.LeaseReply:
        """Ask for work; waits up to `request.wait_s` for it."""
        reply: msg.LeaseReply = self._call("lease", request, msg.LeaseReply, request.wait_s)
        return reply

    def heartbeat(self, request: msg.HeartbeatRequest) -> msg.HeartbeatReply:
        """Keep leases, hand over new tokens. They are durable when this returns."""
        reply: msg.HeartbeatReply = self._call("heartbeat", request, msg.HeartbeatReply)
        return reply

    def submit(self, request: msg.SubmitRequest) -> msg.SubmitReply:
        """Store finished responses; they are durable when this returns.

        Raises ValueError for a mistake of the caller: do not repeat it.
        """
        reply: msg.SubmitReply = self._call("submit", request, msg.SubmitReply)
        return reply

    def release(self, request: msg.ReleaseRequest) -> None:
        """Hand leases back, with the tokens sampled so far."""
        self._call("release", request, msg.Empty)

    # the learner

    def register(self, step: int) -> int:
        """Start from `step` trained steps. Returns the lineage; older learners are fenced."""
        request = msg.RegisterRequest(step=step)
        reply: msg.RegisterReply = self._call("register", request, msg.RegisterReply)
        return reply.lineage

    def take(self, lineage: int, step: int, wait_s: float) -> msg.TakeReply:
        """The batch of a step, the same each time; `groups` is None when it is not closed yet."""
        request = msg.TakeRequest(lineage=lineage, step=step, wait_s=wait_s)
        reply: msg.TakeReply = self._call("take", request, msg.TakeReply, wait_s)
        return reply

    def fetch(self, group_ids: list[int]) -> list[Group]:
        """Groups of a taken batch, in the order asked.

        Raises PayloadCorrupt when a record is not what the buffer once received.
        """
        groups: list[Group] = []
        for start in range(0, len(group_ids), FETCH_GROUPS):
            request = msg.FetchRequest(group_ids=group_ids[start : start + FETCH_GROUPS])
            reply: msg.FetchReply = self._call("fetch", request, msg.FetchReply)
            groups += [verified(stored) for stored in reply.groups]
        return groups

    def publish(self, version: PolicyVersion, *, is_evaluated: bool) -> None:
        """Say that the weights of a version are complete and durable."""
        self._call("publish", msg.PublishRequest(version=version, is_evaluated=is_evaluated))

    def commit(self, lineage: int, step: int) -> None:
        """Release batches up to `step`: the oldest retained checkpoint is of that step."""
        self._call("commit", msg.CommitRequest(lineage=lineage, step=step))

    def evaluations(self) -> msg.EvaluationsReply:
        reply: msg.EvaluationsReply = self._call("evaluations", msg.Empty(), msg.EvaluationsReply)
        return reply

    def finish(self, lineage: int) -> None:
        """The run is complete: actors may exit."""
        self._call("finish", msg.FinishRequest(lineage=lineage))

    def status(self) -> dict[str, Any]:
        """The buffer's snapshot of itself, as in `dapo status`."""
        snapshot: dict[str, Any] = json.loads(self._request("GET", "status", b"", 0.0).content)
        return snapshot

    def close(self) -> None:
        if self._session is not None:
            self._session.close()

    # transport

    def _call(self, verb: str, message: Any, kind: type = msg.Empty, wait_s: float = 0.0) -> Any:
        response = self._request("POST", verb, msg.encode(message), wait_s)
        return msg.decode(response.content, kind)

    def _request(self, method: str, verb: str, body: bytes, wait_s: float) -> httpx.Response:
        """Repeat until a buffer answers. Raises BufferUnreachable after `give_up_s`."""
        call_id = uuid.uuid4().hex
        until = time.monotonic() + self._give_up_s + wait_s
        delay_s = FIRST_DELAY_S
        attempt = 1
        while True:
            response, cause = self._try_all(method, verb, body, wait_s, call_id)
            if response is not None:
                return _checked(response)
            self._urls = []
            if time.monotonic() + delay_s > until:
                raise BufferUnreachable(
                    f"the buffer of {self._run.root} did not answer {verb} in {attempt} attempts "
                    f"over {self._give_up_s:.0f} s; the last cause: {cause}. See its log in "
                    f"{self._run.logs}."
                )
            log.warning(
                "%s: no answer from the buffer (%s); attempt %d, the next in %.1f s.",
                verb, cause, attempt, delay_s,
            )  # fmt: skip
            time.sleep(delay_s)
            delay_s = min(2 * delay_s, MAX_DELAY_S)
            attempt += 1

    def _try_all(
        self, method: str, verb: str, body: bytes, wait_s: float, call_id: str
    ) -> tuple[httpx.Response | None, str]:
        """The first answer of any address, or the last cause why there is none."""
        cause = ""
        try:
            for url in self._known_urls():
                try:
                    response = self._send(method, f"{url}/v1/{verb}", body, wait_s, call_id)
                except httpx.TransportError as error:
                    cause = f"{url}: {type(error).__name__} {error}"
                    continue
                if response.status_code < 500:
                    self._urls = [url]
                    return response, ""
                cause = f"{url}: status {response.status_code} {response.text[:200]}"
        except FileNotFoundError as error:
            cause = f"{error.filename or self._run.auth} does not exist yet"
        return None, cause

    def _known_urls(self) -> list[str]:
        urls = self._urls
        return urls or read_endpoint(self._run).urls()

    def _send(
        self, method: str, url: str, body: bytes, wait_s: float, call_id: str
    ) -> httpx.Response:
        timeout = httpx.Timeout(
            self._timeout_s, connect=min(CONNECT_S, self._timeout_s), read=self._timeout_s + wait_s
        )
        return self._http().request(
            method,
            url,
            content=body,
            timeout=timeout,
            headers={"Authorization": f"Bearer {auth.token(self._run)}", CALL_HEADER: call_id},
            extensions={"sni_hostname": auth.SERVER_NAME},
        )

    def _http(self) -> httpx.Client:
        if self._session is None:
            self._session = httpx.Client(verify=auth.client_context(self._run), trust_env=False)
        return self._session


def _checked(response: httpx.Response) -> httpx.Response:
    """Raises what the buffer's refusal means."""
    if response.status_code == 409:
        raise LineageFenced(response.text)
    if response.status_code in (401, 403):
        raise PermissionError(
            "the buffer refused this run's token; the files in auth/ are not those the buffer was "
            "started with. Stop the run and start it again."
        )
    if response.status_code >= 400:
        raise ValueError(response.text)
    return response


def verified(stored: msg.StoredGroup) -> Group:
    """Decode a group after checking each record's hash. Raises PayloadCorrupt."""
    responses: list[Response] = []
    for record, sha256 in zip(stored.records, stored.sha256, strict=True):
        if hashlib.sha256(record).digest() != sha256:
            raise PayloadCorrupt(
                f"response {len(responses)} of group {stored.group_id} does not have the hash it "
                "had when the buffer received it. Do not train on it."
            )
        responses.append(msg.decode(record, Response))
    return Group(group_id=stored.group_id, prompt=stored.prompt, responses=tuple(responses))
