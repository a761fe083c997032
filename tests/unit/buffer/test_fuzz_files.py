"""Damaged ledgers and segments: the buffer opens with what it acknowledged, or refuses and names
the file; never another payload, never memory without bound."""

from __future__ import annotations

import json
import random
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from dapo_hpc import config
from dapo_hpc.buffer import events as ev
from dapo_hpc.buffer import messages as msg
from dapo_hpc.buffer import server, wal
from dapo_hpc.buffer.core import Core
from dapo_hpc.buffer.segments import PayloadCorrupt
from dapo_hpc.buffer.writer import Job
from dapo_hpc.records import PolicyVersion
from dapo_hpc.run_dir import RunDir
from tests.buffer_process import make_run
from tests.buffer_world import response, submission

NUM_DAMAGES = 12
"""For each kind of file and damage."""
MIB = 2**20


class Written:
    """A run directory as a buffer leaves it, and what it had acknowledged.

    Killed, most of the ledger lies in its write-ahead log; closed, in the database.
    """

    def __init__(self, directory: Path, *, is_killed: bool) -> None:
        self.run = make_run(directory, num_prompts=30)
        opened = server.open_buffer(self.run, config.load(self.run.config))
        self.store, self.core = opened.store, opened.core
        self.payloads: dict[int, bytes] = {}
        self.freed: set[int] = set()
        for step in (1, 2, 3):
            self._fill(step)
        self.snapshot = self.core.book.snapshot()
        self.files = directory / "left"
        if is_killed:
            shutil.copytree(self.run.root, self.files)
        opened.close()
        if not is_killed:
            shutil.copytree(self.run.root, self.files)
        owner = next(self.files.rglob("owner.1"))
        owner.write_text(json.dumps({**json.loads(owner.read_text()), "start_ticks": 1}))

    def _fill(self, step: int) -> None:
        core = self.core
        if step == 1:
            core.register(msg.RegisterRequest(step=0), 0.0)
        version = PolicyVersion(step=step - 1, lineage=1)
        core.publish(msg.PublishRequest(version=version, is_evaluated=False), 0.0)
        asked = msg.LeaseRequest(
            actor="a", version=version, max_responses=40, wait_s=0.0, stats=msg.ActorStats()
        )
        for lease in core.lease(asked, 0.0, f"call-{step}").leases:
            done = [response(i, version, is_correct=i == 0, num_tokens=50 + i) for i in (0, 1)]
            core.submit(submission(lease.lease_id, done), 0.0)
        self._write(is_snapshot=False)
        if step == 3:
            core.commit(msg.CommitRequest(lineage=1, step=1), 0.0)
            self._write(is_snapshot=True)

    def _write(self, *, is_snapshot: bool) -> None:
        effects = self.core.take_effects()
        self.payloads |= {k: record.content for k, record in effects.payloads.items()}
        self.freed.update(effects.freed)
        events = [ev.encode_event(event) for event in effects.events]
        snapshot = self.core.book.snapshot() if is_snapshot else None
        job = Job(events, effects.payloads, effects.freed, snapshot, lambda: None)
        self.store.write([job])

    def damaged_copy(self, directory: Path) -> RunDir:
        shutil.copytree(self.files, directory)
        return RunDir(directory)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return Written(tmp_path_factory.mktemp("killed"), is_killed=True)


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return Written(tmp_path_factory.mktemp("closed"), is_killed=False)


def files(run: RunDir, kind: str) -> list[Path]:
    return sorted(path for path in run.buffer.rglob(f"*{kind}") if path.stat().st_size)


@pytest.mark.parametrize("left", ["killed", "closed"])
def test_an_undamaged_buffer_opens_with_all_it_acknowledged(
    left: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Negative control of the damages."""
    written: Written = request.getfixturevalue(left)
    run = written.damaged_copy(tmp_path / "run")
    for owner, kind in KINDS:
        assert owner != left or files(run, kind), f"{kind} is there to be damaged"
    opened = server.open_buffer(run, config.load(run.config))
    assert opened.core.book.snapshot() == written.snapshot
    needed = written.payloads.keys() - written.freed
    assert needed
    assert all(opened.store.read(k) == written.payloads[k] for k in needed)
    opened.close()


def flip(content: bytearray, draw: random.Random) -> None:
    for _ in range(draw.choice([1, 1, 5, 100])):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)


def cut(content: bytearray, draw: random.Random) -> None:
    del content[draw.randrange(len(content)) :]


def blank(content: bytearray, draw: random.Random) -> None:
    """A block that never reached the disk."""
    start = draw.randrange(len(content))
    size = min(draw.choice([1, 16, 512, 4096]), len(content) - start)
    content[start : start + size] = bytes(size)


def overwrite(content: bytearray, draw: random.Random) -> None:
    start = draw.randrange(len(content))
    size = min(draw.choice([4, 64, 4096]), len(content) - start)
    content[start : start + size] = draw.randbytes(size)


def append(content: bytearray, draw: random.Random) -> None:
    content += draw.randbytes(draw.choice([1, 44, 5000]))


def swap(content: bytearray, draw: random.Random) -> None:
    """Two blocks of a file changed places."""
    size = min(512, len(content) // 2)
    first, second = (draw.randrange(len(content) - size + 1) for _ in range(2))
    content[first : first + size], content[second : second + size] = (
        content[second : second + size],
        content[first : first + size],
    )


DAMAGES: list[Callable[[bytearray, random.Random], None]] = [
    flip, cut, blank, overwrite, append, swap,
]  # fmt: skip
KINDS = [
    ("killed", ".seg"), ("killed", "ledger.sqlite"), ("killed", "ledger.sqlite-wal"),
    ("closed", "ledger.sqlite"),
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize(("left", "kind"), KINDS)
def test_damaged_files_never_change_what_was_acknowledged(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    left: str,
    kind: str,
    damage: Callable[[bytearray, random.Random], None],
) -> None:
    written: Written = request.getfixturevalue(left)
    draw = random.Random(f"{left} {kind} {damage.__name__}")
    outcomes = []
    for number in range(NUM_DAMAGES):
        run = written.damaged_copy(tmp_path / str(number))
        path = draw.choice(files(run, kind))
        content = bytearray(path.read_bytes())
        before = bytes(content)
        damage(content, draw)
        path.write_bytes(content)
        outcomes.append(_open(run, written, path) if content != before else "same")
        shutil.rmtree(run.root)
    assert set(outcomes) <= {"same", "whole", "earlier", "refused", "noticed"}


def _open(run: RunDir, written: Written, path: Path) -> str:
    """What became of it; asserts that it is one of the allowed ends."""
    refusal, opened = "", None
    tracemalloc.start()
    try:
        opened = server.open_buffer(run, config.load(run.config))
    except ValueError as error:
        refusal = str(error)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * MIB
    if opened is None:
        assert path.name in refusal, f"{path.name} is not named"
        return "refused"
    try:
        return _outcome(opened.core, opened.store.read, written)
    finally:
        opened.close()


def _outcome(core: Core, read: Callable[[int], bytes], written: Written) -> str:
    assert core.check() == []
    is_noticed = False
    for group in core.book.state.groups.values():
        for record_id in group.record_ids():
            try:
                assert read(record_id) == written.payloads[record_id], "another payload"
            except PayloadCorrupt:
                is_noticed = True
    if core.book.snapshot() == written.snapshot:
        return "noticed" if is_noticed else "whole"
    assert _is_earlier(core, written), "a state that never was"
    return "earlier"


def _is_earlier(core: Core, written: Written) -> bool:
    """A prefix of the history: what a cut log that looks complete gives back."""
    now, then = core.book.state, written.core.book.state
    same = now.groups.keys() & then.groups.keys()
    return now.current_step <= then.current_step and all(
        now.groups[k].responses.items() <= then.groups[k].responses.items() for k in same
    )


def commit_frames(content: bytes) -> list[int]:
    """Offsets of the frames that end a transaction."""
    page_bytes = int.from_bytes(content[8:12], "big")
    starts = range(wal.HEADER_BYTES, len(content), wal.FRAME_HEADER_BYTES + page_bytes)
    salts = content[16:24]
    return [
        start
        for start in starts
        if content[start + 4 : start + 8] != bytes(4) and content[start + 8 : start + 16] == salts
    ]


def test_a_log_damaged_before_acknowledged_commits_is_refused_and_a_torn_end_is_not(
    killed: Written, tmp_path: Path
) -> None:
    """Damage at each commit of the log in turn: only the last one may be an unfinished write."""
    path = files(RunDir(killed.files), "ledger.sqlite-wal")[0]
    content = path.read_bytes()
    starts = commit_frames(content)
    assert len(starts) > 3
    assert wal.damage(path) is None
    causes = []
    for start in starts:
        damaged = bytearray(content)
        damaged[start + 100] ^= 1
        (tmp_path / "wal").write_bytes(damaged)
        causes.append(wal.damage(tmp_path / "wal"))
    assert causes[-1] is None
    assert all(f"before {len(starts) - 1 - i} ack" in (c or "") for i, c in enumerate(causes[:-1]))
    for start in starts:
        (tmp_path / "wal").write_bytes(content[: start + 50])
        assert wal.damage(tmp_path / "wal") is None, "a file that ends early is a torn end"
    (tmp_path / "wal").write_bytes(bytes([content[0] ^ 1]) + content[1:])
    assert wal.damage(tmp_path / "wal") == "the head of its -wal file is damaged"
    assert wal.damage(tmp_path / "none") is None
