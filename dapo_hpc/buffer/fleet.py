"""The actors as the buffer last heard of them. Not durable, except for the figures of batches."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from dapo_hpc.buffer.messages import ActorStats
from dapo_hpc.records import PolicyVersion


@dataclass(slots=True)
class ActorView:
    name: str
    version: PolicyVersion | None
    stats: ActorStats
    last_heard_s: float
    """Monotonic."""
    untold_aborts: list[int] = field(default_factory=list)
    """Lease ids to be told in the next reply, whatever it answers."""
    is_told_done: bool = False


class Fleet:
    """Who is there, what they hold, and the sums of what they did."""

    def __init__(self, lease_s: float, now: float, past: dict[str, ActorStats]) -> None:
        self.views: dict[str, ActorView] = {}
        self._lease_s = lease_s
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

    def stats(self) -> dict[str, ActorStats]:
        """Newest figures of every actor there ever was."""
        return self._past | {name: view.stats for name, view in self.views.items()}

    def totals(self) -> ActorStats:
        """Sums over all actors there ever were; the maximum for memory."""
        every = list(self.stats().values())
        sums = {
            f.name: sum(getattr(s, f.name) for s in every)
            for f in fields(ActorStats)
            if f.name not in ("peak_memory_mib", "probe_mean_diff")
        }
        peak = max((s.peak_memory_mib for s in every), default=0.0)
        return ActorStats(**sums, peak_memory_mib=peak)

    def metrics(self, now: float) -> dict[str, float]:
        """`actor/*` figures; rates are since the last call, which is once for each batch."""
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
