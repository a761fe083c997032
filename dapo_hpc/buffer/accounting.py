"""The books must balance: invariants that are checked while the buffer runs, and its figures.

Each check compares two independent entries: a counter kept at every transition, and a recount of
what is there. docs/buffer.md, "Invariants", says what is tested where.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import get_args

from dapo_hpc.buffer.book import Book
from dapo_hpc.buffer.forecast import MAX_OPEN
from dapo_hpc.buffer.group import Group, LeaseEnd, WasteCause
from dapo_hpc.buffer.selection import BufferSettings
from dapo_hpc.buffer.state import Batch
from dapo_hpc.records import EvalResult, Prompt

INVARIANTS = tuple(f"I{number}" for number in range(1, 12))
LEASE_ENDS: tuple[LeaseEnd, ...] = get_args(LeaseEnd)
USED_UP = ("taken", "all_correct", "all_wrong", "parked")
"""States from which a prompt does not return to the order."""
WASTE: tuple[WasteCause, ...] = get_args(WasteCause)
"""Why tokens were sampled in vain."""
MAX_SENTENCES = 1000
"""Violations remembered apart; a broken run must not fill the memory with them."""


class Audit:
    """The violations of one buffer process, each counted once."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def look(self, book: Book, settings: BufferSettings) -> list[str]:
        """What does not hold now."""
        found = violations(book, settings)
        self.note(found)
        return found

    def look_at_batch(self, book: Book, step: int) -> None:
        """I7: a batch handed out again has the content it had when it closed."""
        batch = book.state.batches[step]
        if book.batch_digest(batch.group_ids) != batch.digest:
            self.note([f"I7: batch {step} is not what it was when it closed."])

    def note(self, sentences: list[str]) -> None:
        """Count violations that somebody found."""
        for sentence in sentences:
            if len(self._seen) < MAX_SENTENCES:
                self._seen.add(sentence)

    def counts(self) -> dict[str, int]:
        """By invariant, zeros included."""
        found = Counter(sentence.partition(":")[0] for sentence in self._seen)
        return {name: found[name] for name in INVARIANTS}


def violations(book: Book, settings: BufferSettings) -> list[str]:
    """One sentence for each invariant that does not hold; empty when the books balance."""
    return [
        *_payload_kept(book),
        *_trained_once(book),
        *_batches_sound(book),
        *_responses_conserved(book),
        *_groups_conserved(book),
        *_tokens_conserved(book),
        *_prompts_conserved(book),
        *_leases_sound(book),
        *_in_order(book, settings),
        *_bounded(book, settings),
    ]


def _payload_kept(book: Book) -> list[str]:
    """I1: every response of a group that may be trained is complete and its payload is kept."""
    freed = set(book.freed)
    return [
        f"I1: group {group.group_id} ({group.state}) lost a response or its payload."
        for group in book.state.groups.values()
        if group.state in ("ready", "taken")
        and (not group.is_complete or freed.intersection(group.record_ids()))
    ]


def _trained_once(book: Book) -> list[str]:
    """I2: a group, and a prompt of one pass, is in one batch at most."""
    taken = [g for batch in book.state.batches.values() for g in batch.group_ids]
    positions = [book.state.groups[g].position for g in taken]
    found = [f"I2: group {g} is in {n} batches." for g, n in Counter(taken).items() if n > 1]
    return found + [
        f"I2: the prompt at position {p} was taken {n} times."
        for p, n in Counter(positions).items()
        if n > 1
    ]


def _batches_sound(book: Book) -> list[str]:
    """I3 and I5: exact size, complete, none uniform when filtered, none too old."""
    found = []
    for batch in book.state.batches.values():
        if len(batch.group_ids) != batch.expected_groups and not batch.is_short:
            found.append(
                f"I5: batch {batch.step} has {len(batch.group_ids)} groups, not "
                f"{batch.expected_groups}."
            )
        for group_id in batch.group_ids:
            found += _group_sound(batch, book.state.groups[group_id])
    return found


def _group_sound(batch: Batch, group: Group) -> list[str]:
    where = f"group {group.group_id} of batch {batch.step}"
    found = []
    if sorted(group.responses) != group.indices:
        found.append(f"I5: {where} has {len(group.responses)} of {len(group.indices)} responses.")
    if batch.is_filtered and len({r.is_correct for r in group.responses.values()}) != 2:
        found.append(f"I5: {where} is uniform.")
    oldest = min((v.step for v in group.response_versions()), default=batch.min_step)
    if oldest < batch.min_step:
        found.append(f"I3: {where} holds tokens of step {oldest}, older than {batch.min_step}.")
    return found


def _responses_conserved(book: Book) -> list[str]:
    """I6: leased = accepted + expired + released + failed + aborted + in flight."""
    counters = book.state.counters
    leased = counters.get("responses_leased", 0)
    ended = {name: counters.get(f"responses_{name}", 0) for name in ("accepted", *LEASE_ENDS)}
    in_flight = responses_in_flight(book)
    if leased == sum(ended.values()) + in_flight:
        return []
    return [f"I6: {leased} responses leased, but {ended} and {in_flight} in flight."]


def responses_in_flight(book: Book) -> int:
    leases = (lease for lease in book.state.leases.values() if lease.state == "live")
    return sum(len(book.unfilled(lease)) for lease in leases)


def group_counts(book: Book) -> Counter[str]:
    """Training groups ever dispatched, by state, recounted."""
    counts: Counter[str] = Counter(book.state.purged)
    counts.update(g.state for g in book.state.groups.values() if g.kind == "train")
    return counts


def _groups_conserved(book: Book) -> list[str]:
    """I6: dispatched groups = the sum over states; each gauge = its recount."""
    counters, counts = book.state.counters, group_counts(book)
    found = []
    if counters.get("groups_dispatched", 0) != counts.total():
        found.append(
            f"I6: {counters.get('groups_dispatched', 0)} groups dispatched, {counts.total()} found."
        )
    gauges = {k[6:]: n for k, n in counters.items() if k.startswith("train_") and n}
    if gauges != {k: n for k, n in counts.items() if n}:
        found.append(f"I6: groups by state are {dict(counts)}, counted as {gauges}.")
    return found


def _tokens_conserved(book: Book) -> list[str]:
    """I6: delivered = trained + evaluated + wasted by cause + held by groups under way."""
    delivered = book.state.counters.get("tokens_delivered", 0)
    used = token_counts(book)
    if delivered == sum(used.values()):
        return []
    return [f"I6: {delivered} tokens were delivered, but {used} are accounted for."]


def token_counts(book: Book) -> dict[str, int]:
    """What became of all tokens that actors delivered."""
    counters = book.state.counters
    held = (g.num_tokens() for g in book.state.groups.values() if g.state in ("open", "ready"))
    return {
        "trained": counters.get("tokens_taken", 0),
        "evaluated": counters.get("tokens_evaluated", 0),
        "in_flight": sum(held),
        **{cause: counters.get(f"tokens_{cause}", 0) for cause in WASTE},
    }


def token_shares(book: Book, generated_tokens: int) -> dict[str, float]:
    """What became of all tokens that actors say they sampled; the shares add up to 1.

    'unreported' was sampled, but did not arrive: it is on its way, was given up by an actor that
    was told to, or was lost with one. `generated_tokens` is as of each actor's last message; what a
    killed actor sampled after it, at most a heartbeat's worth, nobody knows.
    """
    counts = token_counts(book)
    delivered = sum(counts.values())
    counts["unreported"] = max(0, generated_tokens - delivered)
    total = max(generated_tokens, delivered)
    return {name: count / total if total else 0.0 for name, count in counts.items()}


def _prompts_conserved(book: Book) -> list[str]:
    """I9: every position dispatched is live, used up, or at the head of the order."""
    counts = group_counts(book)
    used = sum(counts[state] for state in USED_UP)
    known = used + len(book.index.live) + len(book.state.returned)
    if known == book.state.cursor:
        return []
    return [f"I9: {book.state.cursor} prompts left the order, {known} are accounted for."]


def _leases_sound(book: Book) -> list[str]:
    """I4: an open group is either waiting or under exactly one live lease, its newest."""
    found = []
    for group in book.state.groups.values():
        lease = book.state.leases.get(group.lease_id or 0)
        is_held = lease is not None and lease.state == "live"
        is_newest = group.lease_id == group.last_lease_id
        if group.lease_id is not None and not (is_held and is_newest and group.state == "open"):
            found.append(f"I4: group {group.group_id} ({group.state}) holds a dead lease.")
        if group.is_waiting != (group.group_id in book.index.waiting):
            found.append(f"I4: group {group.group_id} waits, but would never be leased again.")
    return found


def _in_order(book: Book, settings: BufferSettings) -> list[str]:
    """I8: no group that is still to be trained was dispatched before one that was taken."""
    state = book.state
    if settings.closing != "dispatch_order" or not state.batches:
        return []
    last = max(max(batch.group_ids) for batch in state.batches.values())
    return [f"I8: group {g} was overtaken by group {last}." for g in book.index.live if g < last]


def _bounded(book: Book, settings: BufferSettings) -> list[str]:
    """I11: leases are withheld before there is more to keep than the bound."""
    limit = MAX_OPEN * (settings.max_staleness + 1) * settings.prompts_per_step
    if len(book.index.live) <= limit:
        return []
    return [f"I11: {len(book.index.live)} groups are open or ready; the bound is {limit}."]


def buffer_metrics(book: Book, generated_tokens: int, violated: dict[str, int]) -> dict[str, float]:
    """`buffer/*` counters from the start of the run."""
    counters = book.state.counters
    window = book.state.window
    return {
        "buffer/groups_informative": counters.get("groups_informative", 0),
        "buffer/groups_all_correct": counters.get("train_all_correct", 0),
        "buffer/groups_all_wrong": counters.get("train_all_wrong", 0),
        "buffer/kept_frac": window.informative / window.groups if window.groups else 0.0,
        **{f"buffer/tokens_{name}": n for name, n in token_counts(book).items()},
        **{
            f"buffer/tokens_{name}_frac": share
            for name, share in token_shares(book, generated_tokens).items()
        },
        "buffer/leases_expired": counters.get("leases_expired", 0),
        "buffer/leases_crashed": counters.get("leases_crashed", 0),
        "buffer/prompts_parked": counters.get("train_parked", 0),
        "buffer/prompts_suspect": sum(g.deaths > 1 for g in book.index.live.values()),
        "buffer/invariant_violations": sum(violated.values()),
        **{f"buffer/{name.lower()}_violations": n for name, n in violated.items()},
        "train/accuracy": window.correct / window.responses if window.responses else 0.0,
    }


def batch_staleness(step: int, groups: list[Group]) -> dict[str, float]:
    """In versions, from the oldest token of each group of the batch of `step`."""
    lags = [step - 1 - min(v.step for v in group.response_versions()) for group in groups]
    return {
        "buffer/staleness_mean": sum(lags) / len(lags),
        "buffer/staleness_max": max(lags),
    }


def eval_result(book: Book, index: int, prompts: Sequence[Prompt]) -> EvalResult:
    """The figures of a pending evaluation whose units all ended.

    A unit that was parked counts neither as right nor as wrong.
    """
    evaluation = book.state.evaluations[index]
    by_row: dict[int, list[bool]] = {}
    tokens: list[int] = []
    for group_id in evaluation.group_ids:
        group = book.state.groups[group_id]
        outcomes = [response.is_correct for response in group.responses.values()]
        if outcomes:
            by_row.setdefault(group.row, []).extend(outcomes)
        tokens += [response.num_tokens for response in group.responses.values()]
    means = {row: sum(outcomes) / len(outcomes) for row, outcomes in by_row.items()}
    by_source: dict[str, list[float]] = {}
    for row, mean in means.items():
        by_source.setdefault(prompts[row].data_source, []).append(mean)
    return EvalResult(
        version=evaluation.version,
        num_prompts=len(means),
        num_samples=evaluation.num_samples,
        accuracy=_mean(list(means.values())),
        pass_at_k=_mean([float(any(outcomes)) for outcomes in by_row.values()]),
        mean_tokens=_mean([float(n) for n in tokens]),
        accuracy_by_source={name: _mean(values) for name, values in by_source.items()},
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
