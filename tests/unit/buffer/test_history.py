"""The history that a run exports is the history it had."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from dapo_hpc.buffer import messages as msg
from dapo_hpc.buffer.export import GROUPS, RESPONSES, export, read_history
from dapo_hpc.buffer.history import GroupRow, ResponseRow, decode_block, encode_block
from dapo_hpc.cli import main
from dapo_hpc.records import Lease, PolicyVersion
from dapo_hpc.run_dir import RunDir
from tests.buffer_process import client_of, make_run
from tests.buffer_served import ServedBuffer
from tests.buffer_world import World, make_prompts, response, submission


@dataclass
class Notes:
    """What clients know of a run."""

    rows: dict[int, int] = field(default_factory=dict)
    actors: dict[int, list[str]] = field(default_factory=dict)
    """Of each lease of a group."""
    stored: dict[tuple[int, int], tuple[bool, int, str, int]] = field(default_factory=dict)
    """(group, index) -> (is correct, tokens, actor, policy step)."""
    batches: dict[int, list[int]] = field(default_factory=dict)

    def leased(self, lease: Lease, actor: str) -> None:
        self.rows[lease.group_id] = lease.prompt.row
        self.actors.setdefault(lease.group_id, []).append(actor)

    def assert_told(self, rows: list[GroupRow]) -> None:
        by_id = {row.group_id: row for row in rows}
        assert len(by_id) == len(rows), "each group once"
        assert sorted(by_id) == list(range(1, len(rows) + 1)), "none is missing"
        for group_id, actors in self.actors.items():
            row = by_id[group_id]
            assert (row.row, row.num_leases) == (self.rows[group_id], len(actors))
            assert row.actors == list(dict.fromkeys(actors))
        told = {
            (row.group_id, r.index): (r.is_correct, r.num_tokens, row.actors[r.actor], r.max_step)
            for row in rows
            for r in row.responses
        }
        assert told == self.stored
        for step, group_ids in self.batches.items():
            assert [row.group_id for row in rows if row.step == step] == group_ids
            assert {by_id[group_id].state for group_id in group_ids} == {"taken"}


def world_rows(world: World) -> list[GroupRow]:
    state = world.core.book.state
    blocks = [decode_block(world.records[record_id]) for record_id in state.archive]
    kept = [GroupRow.of(group, state.leases) for group in state.groups.values()]
    return sorted([*sum(blocks, []), *kept], key=lambda row: row.group_id)


@pytest.mark.parametrize("seed", range(5))
def test_every_group_of_a_random_run_is_told(seed: int) -> None:
    """Expiries, uniform groups, surplus, commits, a rollback and a crash included."""
    draw = random.Random(seed)
    world = World(make_prompts(12), max_staleness=seed % 3, prompts_per_step=3)
    notes = Notes()
    version = world.start(is_evaluated=True)
    for step in range(1, 13):
        while (reply := world.take(step)).groups is None:
            actor = f"actor-{draw.randrange(3)}"
            for lease in world.lease(actor):
                notes.leased(lease, actor)
                if draw.random() < 0.8:
                    _answer(world, notes, lease, actor, version, draw)
            world.tick(draw.choice([1, 1, 31]))
        notes.batches[step] = [group.group_id for group in reply.groups]
        version = world.publish(step, is_evaluated=step % 4 == 0)
        if step % 3 == 0:
            world.commit(step - 1)
        if step == 7:
            world.crash()
            version = world.start(step)
    assert len(world.core.book.state.archive) > 3
    notes.assert_told(world_rows(world))
    world.crash()
    notes.assert_told(world_rows(world))
    with pytest.raises(AssertionError):
        notes.assert_told(world_rows(world)[1:])


def _answer(
    world: World,
    notes: Notes,
    lease: Lease,
    actor: str,
    version: PolicyVersion,
    draw: random.Random,
) -> None:
    used = lease.version or version
    for part in lease.missing:
        tokens = draw.randrange(1, 30)
        is_correct = draw.random() < 0.5
        one = response(part.index, used, is_correct=is_correct, num_tokens=tokens, prefix=part)
        if world.submit(lease.lease_id, [one], actor) == ["stored"]:
            key = (lease.group_id, part.index)
            notes.stored[key] = (is_correct, len(one.token_ids), actor, used.step)


def test_a_group_takes_a_few_dozen_bytes() -> None:
    """16 responses of random lengths; a block is what a commit of 512 groups forgets."""
    draw = random.Random(0)
    actors = [
        f"actor-{i}-node-{i:04d}-{draw.randrange(10**6)}-{draw.randrange(10**18)}"
        for i in range(20)
    ]
    rows = [
        GroupRow(
            i, "train", draw.randrange(17_000), i, "taken", 7, 0, 1, [draw.choice(actors)],
            [
                ResponseRow(k, draw.randrange(200, 20_480), draw.choice([1.0, -1.0]),
                            draw.random() < 0.5, False, 6, 6, 0)
                for k in range(16)
            ],
        )
        for i in range(512)
    ]  # fmt: skip
    block = encode_block(rows)
    assert decode_block(block) == rows
    assert len(block) / len(rows) < 90


def test_a_damaged_block_is_refused() -> None:
    with pytest.raises(ValueError, match="a block of the history is damaged"):
        decode_block(b"no block")
    with pytest.raises(ValueError, match="damaged|truncated"):
        decode_block(encode_block([])[:-6] + b"\0" * 6)


# the command


@pytest.fixture
def served(tmp_path: Path) -> ServedBuffer:
    served = ServedBuffer(make_run(tmp_path, num_prompts=40))
    served.start()
    return served


def work(served: ServedBuffer, notes: Notes, num_steps: int) -> None:
    """Steps with commits, over the network."""
    client = client_of(served.run)
    draw = random.Random(4)
    version = PolicyVersion(step=0, lineage=client.register(0))
    client.publish(version, is_evaluated=False)
    for step in range(1, num_steps + 1):
        while (reply := client.take(version.lineage, step, 0.0)).groups is None:
            asked = msg.LeaseRequest(
                actor="actor-0", version=version, max_responses=20, wait_s=0.0,
                stats=msg.ActorStats(),
            )  # fmt: skip
            for lease in client.lease(asked).leases:
                notes.leased(lease, "actor-0")
                done = [
                    response(part.index, version, is_correct=draw.random() < 0.5, num_tokens=9)
                    for part in lease.missing
                ]
                verdicts = client.submit(submission(lease.lease_id, done, "actor-0")).verdicts[0]
                for one, verdict in zip(done, verdicts, strict=True):
                    if verdict == "stored":
                        key = (lease.group_id, one.index)
                        notes.stored[key] = (one.is_correct, 9, "actor-0", version.step)
        notes.batches[step] = [group.group_id for group in reply.groups]
        version = PolicyVersion(step=step, lineage=version.lineage)
        client.publish(version, is_evaluated=False)
        client.commit(version.lineage, step - 1)
    client.close()


def listing(run: RunDir) -> dict[str, tuple[int, int]]:
    paths = [
        path for path in run.buffer.rglob("*") if path.is_file() and path.name != "status.json"
    ]
    return {str(p.relative_to(run.root)): (p.stat().st_size, p.stat().st_mtime_ns) for p in paths}


def test_the_export_is_the_history_while_the_buffer_runs_and_afterwards(
    served: ServedBuffer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notes = Notes()
    work(served, notes, num_steps=6)
    before = listing(served.run)
    notes.assert_told(read_history(served.run))
    assert listing(served.run) == before, "nothing in the run directory is touched"
    served.stop()
    notes.assert_told(read_history(served.run))
    assert main(["history", str(served.run.root), "--out", str(tmp_path / "out")]) == 0
    assert f"{len(notes.stored)} responses" in capsys.readouterr().out
    groups = pq.read_table(tmp_path / "out" / GROUPS).to_pylist()
    responses = pq.read_table(tmp_path / "out" / RESPONSES).to_pylist()
    for group in groups:
        mine = [r for r in responses if r["group_id"] == group["group_id"]]
        assert group["num_responses"] == len(mine)
        assert group["num_correct"] == sum(r["is_correct"] for r in mine)
        if mine:
            assert group["pass_rate"] == group["num_correct"] / len(mine)
            assert group["mean_tokens"] == group["max_tokens"] == 9
            assert {r["actor"] for r in mine} == {"actor-0"}
        assert group["prompt_uid"] == f"prompt-{group['prompt_row']}"
        assert group["state"] == "taken" or group["step"] is None
    taken = {s: [g["group_id"] for g in groups if g["step"] == s] for s in notes.batches}
    assert taken == notes.batches
    assert {g["pass"] for g in groups} <= {0, 1, 2}


def test_the_export_disturbs_no_busy_buffer(served: ServedBuffer) -> None:
    """Read again and again while it writes: each time a history that was true at some moment."""
    notes = Notes()
    worker = threading.Thread(target=work, args=(served, notes, 12))
    worker.start()
    sizes = []
    deadline_s = time.monotonic() + 60
    while worker.is_alive() and time.monotonic() < deadline_s:
        rows = read_history(served.run)
        sizes.append(len(rows))
        assert [row.group_id for row in rows] == list(range(1, len(rows) + 1))
    worker.join(60)
    assert served.fatal == []
    assert sizes == sorted(sizes)
    notes.assert_told(read_history(served.run))
    served.stop()


def test_a_run_without_a_ledger_is_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path)
    assert main(["history", str(run.root)]) == 2
    assert "holds no ledger" in capsys.readouterr().err


def test_a_damaged_ledger_is_a_sentence(
    served: ServedBuffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    work(served, Notes(), num_steps=2)
    served.stop()
    monkeypatch.setattr("dapo_hpc.buffer.export.PAUSE_S", 0.0)
    path = next(served.run.buffer.glob("ledger.*/ledger.sqlite"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="ledger.sqlite is damaged"):
        export(served.run, served.run.report)
