"""The actors as the buffer last heard of them. Not durable, except for the figures of batches."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from dapo_hpc.buffer.messages import ActorStats
from dapo_hpc.records import PolicyVersion

PRESENT_FRAC = 0.25
"""Share of lease_s without a sign of life after which no work is kept for an actor. Three missed
heartbeats at the defaults."""

GONE_LEASES = 20
"""Lease times of silence after which an actor's figures are kept only in a sum."""
KEPT_ACTORS = 1000
"""So many that were heard by earlier incarnations are waited for, the newest ones."""
GONE = "gone"
"""Where that sum is kept, among the names of actors."""


@dataclass(slots=True)
class ActorView:
    name: str
    version: PolicyVersion | None
    stats: ActorStats
    last_heard_s: float
    """Monotonic."""
    max_responses: int = 0
    """Most free places it ever asked for: what its engine holds when it is empty."""
    untold_aborts: list[int] = field(default_factory=list)
    """Lease ids to be told in the next reply, whatever it answers."""
    is_told_done: bool = False


class Fleet:
    """Who is there, what they hold, and the sums of what they did."""

    def __init__(self, lease_s: float, now: float, past: dict[str, ActorStats]) -> None:
        self.views: dict[str, ActorView] = {}
        self._lease_s = lease_s
        self._began_s = now
        self._past = dict(past)
        self._mark_s = now
        self._mark = self.totals()

    def heard(
        self, name: str, version: PolicyVersion | None, stats: ActorStats | None, now: float
    ) -> ActorView:
        """Note a sign of life."""
        view = self.views.get(name)
        if view is None:
            stats = stats or self._past.get(name, ActorStats())
            view = self.views[name] = ActorView(name, version, stats, now)
        view.version = version
        # A request that waits is looked at again later, and brings figures that are old by then.
        if stats is not None and stats.cpu_s >= view.stats.cpu_s:
            view.stats = stats
        view.last_heard_s = now
        return view

    def worked(self, name: str, stats: ActorStats, now: float) -> None:
        """Note newer figures of an actor that does not say which weights it holds."""
        view = self.views.get(name)
        self.heard(name, view.version if view else None, stats, now)

    def alive(self, now: float) -> list[ActorView]:
        """Actors heard from within a lease time."""
        return [v for v in self.views.values() if now - v.last_heard_s <= self._lease_s]

    def present(self, now: float) -> list[ActorView]:
        """Actors that will soon ask for work: heard from within a few heartbeats."""
        silent_s = self._lease_s * PRESENT_FRAC
        return [v for v in self.views.values() if now - v.last_heard_s <= silent_s]

    def stats(self) -> dict[str, ActorStats]:
        """Newest figures of every actor, those that are long gone in one sum."""
        return self._past | {name: view.stats for name, view in self.views.items()}

    def totals(self) -> ActorStats:
        """Sums over all actors there ever were; the maximum for memory."""
        return _sum(list(self.stats().values()))

    def forget_silent(self, now: float) -> None:
        """Fold actors that are long gone into one sum: there is no end to them in a long run."""
        silent_s = GONE_LEASES * self._lease_s
        for name, view in list(self.views.items()):
            if now - view.last_heard_s > silent_s:
                self._past[name] = view.stats
                del self.views[name]
        gone = [name for name in self._past if name not in self.views]
        if now - self._began_s <= silent_s:
            gone = gone[:-KEPT_ACTORS]
        if gone:
            total = _sum([self._past[name] for name in gone])
            kept = {name: stats for name, stats in self._past.items() if name not in gone}
            self._past = {GONE: total} | kept

    def metrics(self, now: float) -> dict[str, float]:
        """`actor/*` figures; rates are since the last call, which is once for each batch."""
        self.forget_silent(now)
        totals, alive = self.totals(), self.alive(now)
        busy_s = totals.busy_s - self._mark.busy_s
        idle_s = totals.idle_s - self._mark.idle_s
        tokens = totals.generated_tokens - self._mark.generated_tokens
        elapsed_s = now - self._mark_s
        self._mark, self._mark_s = totals, now
        return {
            "actor/count": len(alive),
            "actor/generated_tokens": totals.generated_tokens,
            "actor/tokens_per_s": tokens / elapsed_s if elapsed_s > 0 else 0.0,
            "actor/idle_frac": idle_s / (busy_s + idle_s) if busy_s + idle_s > 0 else 0.0,
            "actor/cpu_s": totals.cpu_s,
            "actor/peak_memory_mib": totals.peak_memory_mib,
            "actor/verifier_timeouts": totals.verifier_timeouts,
            "actor/probe_mean_diff": max((v.stats.probe_mean_diff for v in alive), default=0.0),
        }


def _sum(every: list[ActorStats]) -> ActorStats:
    """Of figures that add up; the maximum for memory."""
    sums = {
        f.name: sum(getattr(s, f.name) for s in every)
        for f in fields(ActorStats)
        if f.name not in ("peak_memory_mib", "probe_mean_diff")
    }
    peak = max((s.peak_memory_mib for s in every), default=0.0)
    return ActorStats(**sums, peak_memory_mib=peak)
