"""Everything durable about the buffer. It changes only in `dapo_hpc.buffer.book`.

The state holds no clock, no config and no payload.
"""

from __future__ import annotations

import msgspec

from dapo_hpc.buffer.group import Group, LeaseRecord
from dapo_hpc.buffer.messages import ActorStats
from dapo_hpc.records import EvalResult, PolicyVersion


class Returned(msgspec.Struct, frozen=True, order=True):
    """A prompt at the head of the order, to be dispatched again; sorted by position."""

    position: int
    row: int
    failures: int
    deaths: int


class Rollback(msgspec.Struct, frozen=True):
    """Versions of lineages below `lineage` with more than `step` steps are abandoned."""

    lineage: int
    step: int


class Batch(msgspec.Struct, kw_only=True):
    step: int
    group_ids: list[int]
    expected_groups: int
    is_short: bool
    min_step: int
    is_filtered: bool
    digest: bytes
    """Of its content, when it closed; see Book.batch_digest."""
    metrics: dict[str, float]


class Evaluation(msgspec.Struct, kw_only=True):
    """A requested evaluation that is not finished."""

    version: PolicyVersion
    num_prompts: int
    num_samples: int
    group_ids: list[int]


class Window(msgspec.Struct):
    """What finished since the last batch closed."""

    responses: int = 0
    correct: int = 0
    groups: int = 0
    informative: int = 0
    by_correct: list[int] = []
    """Finished groups by number of correct responses."""


class State(msgspec.Struct):
    """The durable state; a snapshot is the msgpack of this."""

    groups: dict[int, Group] = {}
    leases: dict[int, LeaseRecord] = {}
    returned: list[Returned] = []
    parked_rows: dict[int, int] = {}
    """Rows of the prompts that no actor gets again, and the group that was given up."""
    cursor: int = 0
    """Positions of the prompt order that were dispatched at least once."""
    passes: int = 1
    """Passes over the prompts that may be used."""
    next_group_id: int = 1
    next_lease_id: int = 1
    next_record_id: int = 1
    lineage: int = 0
    rollbacks: list[Rollback] = []
    newest: PolicyVersion | None = None
    """None until the registered learner has published."""
    current_step: int = 1
    """The batch being filled."""
    committed_step: int = 0
    batches: dict[int, Batch] = {}
    evaluations: list[Evaluation] = []
    results: list[EvalResult] = []
    counters: dict[str, int] = {}
    purged: dict[str, int] = {}
    """Training groups forgotten after a commit, by state."""
    window: Window = msgspec.field(default_factory=Window)
    history: list[float] = []
    """Groups up to the last cut by number of correct responses; each batch halves what was before.
    """
    unmeasured: dict[int, bool] = {}
    """Uniform groups behind the last cut, and whether they are all correct."""
    archive: list[int] = []
    """Records with the history of forgotten groups, oldest first."""
    actor_stats: dict[str, ActorStats] = {}
    """As of the last closed batch; also of actors that are gone."""
    is_finished: bool = False
