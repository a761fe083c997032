"""A network that drops, duplicates, delays and reorders, and clients that repeat their calls."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from dapo_hpc.buffer import messages as msg
from tests.chaos.simulation import Answer, Simulation

TIMEOUT_S = 2.0
FIRST_DELAY_S = 0.1
MAX_DELAY_S = 5.0
FAST_S = 0.005
"""Mean delay of a message that is not held up."""


@dataclass(frozen=True, slots=True)
class Outcome:
    kind: Literal["ok", "refused", "fenced"]
    body: bytes = b""
    text: str = ""


class Server(Protocol):
    """What listens at an address."""

    is_dead: bool

    def receive(self, verb: str, body: bytes, call_id: str, answer: Answer) -> None: ...


class Fenced(Exception):
    """The buffer says that a newer learner registered."""


class Refused(Exception):
    """The buffer says that the client made a mistake. A correct client never hears this."""


@dataclass(slots=True)
class Trouble:
    """Probabilities for each message."""

    drop: float = 0.0
    duplicate: float = 0.0
    hold_up: float = 0.0
    """Delayed by up to three time-outs, so that it arrives after its repetition."""


class Network:
    def __init__(self, sim: Simulation, trouble: Trouble) -> None:
        self.sim = sim
        self.trouble = trouble
        self.endpoint: Server | None = None
        """What `endpoint.json` says."""
        self.num_messages = 0
        self.num_dropped = 0
        self.num_duplicated = 0

    def send(self, server: Server | None, verb: str, body: bytes, call_id: str) -> Answer:
        """One attempt; the answer is an Outcome, or None: time-out, or nobody listens."""
        heard = Answer()
        self.sim.after(TIMEOUT_S, lambda: heard.give(None))
        if server is None:
            return heard
        copies = 1
        if self.sim.random.random() < self.trouble.duplicate:
            copies, self.num_duplicated = 2, self.num_duplicated + 1
        for _ in range(copies):
            self._carry(lambda: self._deliver(server, verb, body, call_id, heard))
        return heard

    def _deliver(self, server: Server, verb: str, body: bytes, call_id: str, heard: Answer) -> None:
        if server.is_dead:
            heard.give(None)
            return
        reply = Answer()
        reply.when_there(lambda outcome: self._carry(lambda: heard.give(outcome)))
        server.receive(verb, body, call_id, reply)

    def _carry(self, arrive: Any) -> None:
        self.num_messages += 1
        draw = self.sim.random
        if draw.random() < self.trouble.drop:
            self.num_dropped += 1
            return
        delay_s = draw.expovariate(1 / FAST_S)
        if draw.random() < self.trouble.hold_up:
            delay_s += draw.uniform(0.0, 3 * TIMEOUT_S)
        self.sim.after(delay_s, arrive)


class Client:
    """Speaks as dapo_hpc.buffer.client does: repeats a call under one name until it is answered."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._address: Server | None = None

    def call(self, verb: str, message: Any, kind: type = msg.Empty) -> Generator[Any, Any, Any]:
        """`reply = yield from client.call(...)`. Raises Fenced, Refused."""
        call_id = f"{self._network.sim.random.getrandbits(64):x}"
        body = msg.encode(message)
        delay_s = FIRST_DELAY_S
        while True:
            address = self._address or self._network.endpoint
            outcome = yield self._network.send(address, verb, body, call_id)
            if outcome is not None:
                self._address = address
                return _opened(outcome, kind)
            self._address = None
            yield delay_s
            delay_s = min(2 * delay_s, MAX_DELAY_S)


def _opened(outcome: Outcome, kind: type) -> Any:
    if outcome.kind == "fenced":
        raise Fenced(outcome.text)
    if outcome.kind == "refused":
        raise Refused(outcome.text)
    return msg.decode(outcome.body, kind)
