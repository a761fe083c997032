"""A learner without a model: it takes, fetches, publishes, keeps two checkpoints, and commits."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from dapo_hpc.buffer.client import BufferClient
from dapo_hpc.records import PolicyVersion
from dapo_hpc.run_dir import RunDir, write_json
from tests.campaign.history import History

CHECKPOINT_EVERY = 3
RETAINED = 2
GIVE_UP_S = 300.0


def checkpoints(root: Path) -> list[int]:
    """Steps with a checkpoint, oldest first; 0 is the start of the run."""
    path = root / "checkpoints.json"
    steps: list[int] = json.loads(path.read_text()) if path.exists() else [0]
    return steps


def main(
    root: Path,
    life: int,
    is_over: Callable[[int, int], bool],
    trained: Callable[[int, int], None] = lambda _lineage, _step: None,
) -> None:
    """Train from the newest checkpoint on.

    Args:
        root: run directory.
        life: names this life's history.
        is_over: whether this was the last step, given its number and the groups of a batch.
        trained: told the lineage and the step after each.
    """
    client = BufferClient(RunDir(root), request_timeout_s=2.0, give_up_s=GIVE_UP_S)
    history = History(root / "history" / f"trainer-{life}.jsonl")
    kept = checkpoints(root)
    step = kept[-1]
    lineage = client.register(step)
    history.note("began", pid=os.getpid(), lineage=lineage, step=step)
    client.publish(PolicyVersion(step=step, lineage=lineage), is_evaluated=False)
    while True:
        step += 1
        size = _train(client, history, lineage, step)
        client.publish(PolicyVersion(step=step, lineage=lineage), is_evaluated=False)
        trained(lineage, step)
        is_last = is_over(step, size)
        if step % CHECKPOINT_EVERY == 0 or is_last:
            kept = [*kept, step][-RETAINED:]
            write_json(root / "checkpoints.json", kept)
            history.note("checkpoint", lineage=lineage, step=step)
            client.commit(lineage, kept[0])
            history.note("committed", lineage=lineage, step=kept[0])
        if is_last:
            client.finish(lineage)
            history.note("finished", lineage=lineage, step=step)
            return


def _train(client: BufferClient, history: History, lineage: int, step: int) -> int:
    """Write down what was handed out for training; its number of groups."""
    groups = None
    while groups is None:
        groups = client.take(lineage, step, 2.0).groups
    fetched = client.fetch([group.group_id for group in groups])
    history.note(
        "trained",
        lineage=lineage,
        step=step,
        groups=[
            {
                "group": group.group_id,
                "row": group.prompt.row,
                "responses": [
                    {
                        "index": one.index,
                        "is_correct": one.is_correct,
                        "steps": [span.version.step for span in one.spans],
                        "tokens": [int(token) for token in one.token_ids],
                    }
                    for one in group.responses
                ],
            }
            for group in fetched
        ],
    )
    return len(fetched)
