"""Runs tasks: check every provider, warm it up, let all take turns, write rows as they come."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch

from . import machine, truth
from .ceilings import CeilingProbe, Ceilings
from .clock import Budget, Candidate, GpuClock, at_most, clock_of, sentence, take_turns
from .record import Record
from .task import Absent, Provider, Results, Row, Settings, Task, Work

START_S = 45.0
"""A provider that has not compiled by then is left out."""
LAST_START_S = 10.0
"""No task begins with less time than this."""
REWRITE_S = 5.0


class DeviceLost(Exception):
    """The GPU answers no more in this process: a kernel has gone astray."""


class Runner:
    def __init__(self, settings: Settings, record: Record, budget: Budget) -> None:
        self.settings, self.record, self.budget = settings, record, budget
        self.clock = clock_of(settings.device)
        self.probe = CeilingProbe(settings.device, self.clock)

    def run(self, task: Task) -> None:
        """Adds the task's rows to the record; a provider that fails gets a row that says so."""
        started = time.monotonic()
        if self.budget.left_s() < LAST_START_S:
            self.record.skip(task.name, f"only {self.budget.left_s():.0f} s were left")
            return
        ceilings = self.probe.measure()
        try:
            self._measure(task, ceilings)
        except RuntimeError as error:
            # Its inputs alone may be too large for this card.
            self.record.skip(task.name, sentence(error))
        else:
            self.record.finish(task.name, ceilings, machine.clocks(), time.monotonic() - started)
        self._clean()

    def _measure(self, task: Task, ceilings: Ceilings) -> None:
        providers = {p.name: p for p in task.providers if self.settings.takes(p)}
        rows = {name: self._empty_row(task, provider) for name, provider in providers.items()}
        true = task.truth(task.draw(task.check))
        right = [p for p in providers.values() if self._check(task, p, true, rows[p.name])]
        inputs = task.draw(task.sizes)
        work = task.work(inputs)
        candidates = {p.name: self._prepare(task, p, inputs, rows[p.name]) for p in right}
        ready = {name: candidate for name, candidate in candidates.items() if candidate}

        def tell() -> None:
            for name, candidate in ready.items():
                figures = _figures(candidate, providers[name].work or work, ceilings)
                rows[name].update(figures)
            self.record.set_rows(task.name, list(rows.values()))

        self._take_turns(task, ready, rows, tell)
        tell()

    def _take_turns(
        self,
        task: Task,
        ready: dict[str, Candidate],
        rows: dict[str, Row],
        tell: Callable[[], None],
    ) -> None:
        """Times of those that are ready; whoever fails on the way is ready no more."""
        told_s = time.monotonic()

        def after_round() -> None:
            nonlocal told_s
            if time.monotonic() - told_s > REWRITE_S:
                tell()
                told_s = time.monotonic()

        seconds = min(task.seconds, self.budget.left_s())
        failed = take_turns(
            self.clock, ready, launches=task.launches, seconds=seconds, after_round=after_round
        )
        for name, reason in reversed(failed.items()):
            # The first to fail may have taken the device with it, and so is noted last.
            self.record.doing(f"{task.name}: timing {name}", name)
            rows[name].update(status="failed", reason=reason)
            del ready[name]
        if isinstance(self.clock, GpuClock):
            for name, candidate in ready.items():
                if task.is_short:
                    rows[name]["latency_ms"] = self.clock.latency_ms(candidate)
                if task.counts_kernels:
                    rows[name]["kernels"] = self.clock.count_kernels(candidate)

    # ------------------------------------------------------------------ one provider

    def _check(self, task: Task, provider: Provider, true: Results, row: Row) -> bool:
        """Results on the small shape against float64. Whether it may be timed."""

        def compare() -> truth.Errors:
            results = provider.bind(task.draw(task.check))()
            return truth.errors_of(provider.finish(results) if provider.finish else results, true)

        errors = self._guard(task, provider, row, "checking", compare)
        if errors is None:
            return False
        row["errors"], row["error"] = truth.as_json(errors), truth.worst(errors)
        row["status"], row["reason"] = truth.verdict(errors)
        return row["status"] == "right"

    def _prepare(self, task: Task, provider: Provider, inputs: Any, row: Row) -> Candidate | None:
        """Bound to the inputs and warm; None, and the row says why, where that failed."""

        def warm_up() -> Candidate:
            restore = inputs.restore if provider.destroys_inputs else None
            candidate = Candidate(provider.bind(inputs), restore, provider.calls)
            self.clock.prepare(candidate)
            return candidate

        candidate = self._guard(task, provider, row, "starting", warm_up)
        if provider.destroys_inputs:
            inputs.restore()
        return candidate

    def _guard(
        self, task: Task, provider: Provider, row: Row, doing: str, action: Callable[[], Any]
    ) -> Any:
        """The action's value; None where it raised, and then the row has the sentence."""
        self.record.doing(f"{task.name}: {doing} {provider.name}", provider.name)
        value = None
        try:
            with at_most(min(START_S, max(self.budget.left_s(), 1.0))):
                value = action()
        except (Absent, ImportError) as reason:
            row.update(status="absent", reason=str(reason))
        except Exception as error:  # a peer may raise anything; ours must go on
            row.update(status="failed", reason=sentence(error))
        if row["status"] in ("absent", "failed"):
            self._clean()
        return value

    # ------------------------------------------------------------------ rows

    def _empty_row(self, task: Task, provider: Provider) -> Row:
        return {
            "task": task.name,
            "provider": provider.name,
            "shape": task.sizes.named(),
            "dtype": str(task.dtype).removeprefix("torch."),
            "device": self.settings.device.type,
            "status": "right",
            "reason": "",
            "note": provider.note,
        }

    def _clean(self) -> None:
        gc.collect()
        if self.settings.device.type == "cuda":
            try:
                torch.cuda.synchronize(self.settings.device)
            except RuntimeError as error:
                raise DeviceLost(sentence(error)) from error
            torch.cuda.empty_cache()


def _figures(candidate: Candidate, work: Work, ceilings: Ceilings) -> Row:
    """Times, and what they are of the ceilings measured just before."""
    if not candidate.times_ms:
        return {}
    figures = candidate.figures()
    floor_ms = ceilings.floor_ms(work)
    return {
        **figures,
        "status": "measured",
        "bytes": work.bytes,
        "flops": work.flops,
        "floor_ms": floor_ms,
        "bound": ceilings.bound(work),
        "share": floor_ms / figures["ms"],
    }
