"""Random things that happen to the jobs of one run on a real Slurm, and how long it takes each time
until the run trains again."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from dapo_hpc.launch import slurm
from dapo_hpc.launch.slurm import QueuedJob
from dapo_hpc.observe import metrics
from dapo_hpc.run_dir import RunDir
from tests.slurm.clusters import MiniCluster

LIMIT_S = 240.0
"""Nothing may stand still longer than this."""
POLL_S = 0.1
NODES = ("mn1", "mn2", "mn3", "mn4")
AWAY_S = (0.5, 4.0)
"""How long a node, a link or the controller stays away."""
INTRUDER_S = 3
"""How long the job with the higher priority holds the nodes."""


@dataclass(kw_only=True)
class Chaos:
    """One run, one cluster, one random order of events."""

    cluster: MiniCluster
    run: RunDir
    num_actors: int
    draw: random.Random
    say: Callable[[str], None] = print
    events: Counter[str] = field(default_factory=Counter)
    recovery_s: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Event -> from its beginning until the run was whole again and had trained another step."""

    def fight(self, num_events: int) -> None:
        """Raises AssertionError when the run does not recover."""
        self._wait_until_whole()
        began_s = time.monotonic()
        for number in range(1, num_events + 1):
            possible = self._possible()
            name = self.draw.choice(list(possible))
            event_s = time.monotonic()
            possible[name]()
            self._wait_until_whole()
            took_s = time.monotonic() - event_s
            self.events[name] += 1
            self.recovery_s[name].append(took_s)
            left_s = (time.monotonic() - began_s) * (num_events - number) / number
            self.say(
                f"{number}/{num_events} {name}: whole again after {took_s:.1f} s, step "
                f"{self._step()}; {left_s:.0f} s left"
            )

    def _possible(self) -> dict[str, Callable[[], object]]:
        found: dict[str, Callable[[], object]] = {
            "preempt": self._preempt,
            "requeue": self._requeue,
            "kill task": self._kill_task,
            "node down and up": self._lose_a_node,
            "restart slurmctld": self._restart_controller,
        }
        if self.cluster.form == "root":
            found["cut link"] = self._cut_a_link
        return found

    # ---- events ---------------------------------------------------------------------------

    def _preempt(self) -> None:
        """A job of the better partition takes all but the learner's node for a moment."""
        busy = {node for job in self._jobs("learner") for node in slurm.hosts(job.nodes)}
        job = self.cluster.sbatch(
            f"sleep {INTRUDER_S}",
            "--partition=learner",
            "--exclusive",
            f"--nodes={len(NODES) - len(busy)}",
            "--time=5",
            cwd=self.run.root,
        )
        self.cluster.wait_for_job(job, "COMPLETED", within_s=LIMIT_S)

    def _requeue(self) -> None:
        job = self.draw.choice([job for job in self._jobs() if job.state == "RUNNING"])
        slurm.requeue(job.address)
        self._wait(
            lambda: job.address not in {j.address for j in self._jobs() if j.state == "RUNNING"},
            f"{job.address} was requeued",
        )

    def _kill_task(self) -> None:
        """SIGKILL to one process of a role, as the kernel does when memory runs out."""
        os.kill(self.draw.choice(sorted(self._processes().values())), signal.SIGKILL)

    def _lose_a_node(self) -> None:
        node = self.draw.choice(NODES)
        self.cluster.act("crash", node)
        self.cluster.run("scontrol", "update", f"nodename={node}", "state=down", "reason=chaos")
        time.sleep(self.draw.uniform(*AWAY_S))
        self.cluster.act("revive", node)
        # An administrator does not leave it at one attempt either.
        self._wait(lambda: self._is_back(node), f"{node} is in service")

    def _is_back(self, node: str) -> bool:
        state = self.cluster.run("sinfo", "--noheader", f"--nodes={node}", "--format=%t").split()[0]
        if state.startswith(("down", "drain")):
            self.cluster.act("revive", node)
        return not state.startswith(("down", "drain"))

    def _cut_a_link(self) -> None:
        node = self.draw.choice(NODES)
        self.cluster.act("cut", node)
        time.sleep(self.draw.uniform(*AWAY_S))
        self.cluster.act("mend", node)

    def _restart_controller(self) -> None:
        self.cluster.act("killctld")
        time.sleep(self.draw.uniform(*AWAY_S))
        self.cluster.act("startctld")

    # ---- the run --------------------------------------------------------------------------

    def _step(self) -> int:
        return metrics.newest_step(self.run.metrics, "step")

    def _wait_until_whole(self) -> None:
        """Every process runs that should, and together they train."""
        roles = {("learner", ""), ("buffer", "")}
        roles |= {("actor", f"--index={index}") for index in range(self.num_actors)}
        self._wait(lambda: set(self._processes()) == roles, "every role of the run lives")
        before = self._step()
        self._wait(lambda: self._step() > before, f"a step after {before}")

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            assert time.monotonic() < deadline, (
                f"not within {LIMIT_S:.0f} s: {what}\n{self._picture()}"
            )
            time.sleep(POLL_S)

    def _jobs(self, kind: str = "") -> list[QueuedJob]:
        return [job for job in slurm.queue() if job.name.endswith(kind)]

    def _processes(self) -> dict[tuple[str, str], int]:
        """(role, its number) -> process; the supervisors and srun are none."""
        found = {}
        for entry in Path("/proc").iterdir():
            try:
                words = (entry / "cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
            if str(self.run.root) not in words or "role" not in words or "srun" in words[0]:
                continue
            role = words[words.index("role") + 1]
            number = next((word for word in words if word.startswith("--index=")), "")
            found[role, number] = int(entry.name)
        return found

    def _picture(self) -> str:
        logs = sorted(self.run.logs.glob("*.log"), key=lambda log: log.stat().st_mtime)
        tails = [f"--- {log.name}\n{log.read_text(errors='replace')[-1500:]}" for log in logs[-6:]]
        return self.cluster.run("squeue", "-r") + self.cluster.run("sinfo") + "\n".join(tails)
