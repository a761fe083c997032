"""`dapo job KIND`: what a batch script starts. It runs the job's roles as steps and watches them.

It lives in the batch step, on the job's first node. All state is in the run directory, so it may be
killed at any time with everything else.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from dapo_hpc.buffer.auth import create_auth
from dapo_hpc.config import RunConfig, load
from dapo_hpc.launch import lives, prepare, slurm
from dapo_hpc.launch.fleet import COMPLETE, FAILED, IDLE, INTERRUPTED, Fleet
from dapo_hpc.launch.hand_over import JobRequest, stages, start_again
from dapo_hpc.launch.keeper import Keeper
from dapo_hpc.launch.lives import Kind, Life, LifeRecord, Place, starts_without_progress
from dapo_hpc.launch.placement import BUFFER, LEARNER, Job
from dapo_hpc.launch.site import LearnerTable, Site, load_site
from dapo_hpc.launch.steps import StepCommand, StepProcess
from dapo_hpc.launch.supervise import RestartPolicy
from dapo_hpc.observe import log as observe_log
from dapo_hpc.observe import metrics, report
from dapo_hpc.observe.live import ProcessState
from dapo_hpc.run_dir import RunDir

WATCH_EVERY_S = 2.0
"""Between two looks at jobs/STOP and jobs/target.json."""
RUN_APPEARS_S = 600.0
"""How long a job waits for another one to make the run directory."""
RUN_POLL_S = 2.0
FINISH_S = 30.0
"""After the last step, for the buffer to tell every actor of every job."""
QUIET_DELAY_S = 15.0
"""An actor that Slurm asked to leave takes longer than a learner; both have left by then."""
SIGNALS = (signal.SIGUSR2, signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

log = logging.getLogger(__name__)


def run_job(kind: Kind, *, run: Path | None, config: Path | None, site: Path | None) -> int:
    """Run the roles of one job until it is complete, told to stop, or gives way.

    Args:
        kind: of job.
        run: run directory; None: that of the config.
        config: TOML file from which the run is made if it is not there yet.
        site: TOML file of the cluster; None: the copy in the run directory.

    Returns:
        Exit code of the batch job. 0: complete, or told to stop. A job that gives way does not
        return; it is killed after its requeue.

    Raises:
        ValueError: nothing was started because of config, site or allocation.
    """
    place = Place.of(os.environ)
    observe_log.setup(f"{kind}-{place.address}")
    request = JobRequest()
    with _signals(request):
        opened, resolved = _open_run(run, config, site)
        table = _site(opened, site, place)
        job = Job(kind=kind, run=opened, config=resolved, site=table, place=place)
        return Supervisor(job=job, request=request).run()


@dataclass(slots=True, kw_only=True)
class Supervisor:
    """One life of one job."""

    job: Job
    request: JobRequest
    _looked_s: float = 0.0
    _life: Life = field(init=False)

    def run(self) -> int:
        job = self.job
        commands = job.commands()
        self._life = Life(job.run, _record(job))
        self._life.begin()
        try:
            return self._attempt(commands)
        finally:
            self._life.close()

    def _attempt(self, commands: Sequence[StepCommand]) -> int:
        job, limit = self.job, self.job.config.launch.max_job_starts
        starts = starts_without_progress(job.run, job.kind) if job.has_learner else 0
        if starts > limit:
            return self._failed(
                f"{limit} starts of the learner without a further step (launch.max_job_starts); "
                f"the run stops. The last lines of {job.run.logs}/learner-*.log say why."
            )
        fleet = self._fleet(commands)
        with self._keeper():
            outcome = fleet.run()
        return self._conclude(outcome, fleet.cause)

    def _fleet(self, commands: Sequence[StepCommand]) -> Fleet:
        job, launch = self.job, self.job.config.launch
        leader = LEARNER if job.has_learner else BUFFER if job.has_buffer else None
        return Fleet(
            commands=commands,
            start=partial(StepProcess.start, place=job.place),
            policy=RestartPolicy.of(
                commands,
                leader=leader,
                max_restarts=launch.max_restarts,
                quiet_delay_s=QUIET_DELAY_S,
            ),
            view=JobView(self._life, self.request),
            request=self.request,
            is_complete=job.run.model.exists,
            step=lambda: metrics.newest_step(job.run.metrics, "step"),
            stages=stages(job),
            finish_s=FINISH_S,
            watch=self._watch,
            core=job.actor_names | ({leader} if leader else set()),
        )

    def _watch(self) -> None:
        if time.monotonic() - self._looked_s < WATCH_EVERY_S:
            return
        self._looked_s = time.monotonic()
        job, request = self.job, self.request
        if lives.stop_requested(job.run):
            request.ask("stop", "told to stop")
        if job.kind == "actors":
            target = lives.target(job.run)
            if target is not None and job.actor_indices.start >= target:
                request.ask("surplus", f"the run is to have {target} actors")
            if job.run.model.exists():
                request.ask("complete", "the run is complete")

    @contextmanager
    def _keeper(self) -> Iterator[None]:
        """Beside the learner, who alone has an interest in the others."""
        if not self.job.has_learner:
            yield
            return
        keeper = Keeper(self.job, hopeless=lambda cause: self.request.ask("fail", cause))
        keeper.start()
        try:
            yield
        finally:
            keeper.stop()

    def _conclude(self, outcome: int, cause: str) -> int:
        wish, why = self.request.wish, self.request.cause
        if outcome == COMPLETE or wish == "complete":
            if self.job.has_learner:
                _say_results(self.job.run)
            return self._ended("complete", "the run is complete")
        if outcome == FAILED or wish == "fail":
            return self._failed(cause or why)
        if outcome == IDLE:
            return self._ended("idle", "its actors had no work")
        if outcome == INTERRUPTED and wish in ("stop", "surplus"):
            return self._ended("stopped", why)
        why = why or "every role was asked to leave by somebody else, as Slurm does at preemption"
        return start_again(self.job, self._life, why)

    def _ended(self, phase: lives.Phase, cause: str) -> int:
        self._life.turn(phase, cause)
        log.info("%s; the job ends.", cause)
        return 0

    def _failed(self, cause: str) -> int:
        self._life.turn("failed", " ".join(cause.split()))
        log.critical("%s", " ".join(cause.split()))
        return 1


def _say_results(run: RunDir) -> None:
    with suppress(report.NothingToDraw):
        log.info("picture: %s", report.draw(run))
    log.info("model: %s", run.model)


@dataclass(slots=True)
class JobView:
    """What a person reads in the job's own log and in the file of its life."""

    life: Life
    request: JobRequest

    def say(self, text: str) -> None:
        log.info("%s", text)

    def update(self, processes: Sequence[ProcessState]) -> None:
        """Steps have logs of their own."""
        del processes
        if self.request.count and self.life.record.phase == "running":
            self.life.turn("draining", self.request.cause)

    def close(self) -> None: ...


def _record(job: Job) -> LifeRecord:
    place, now = job.place, time.time()
    return LifeRecord(
        kind=job.kind,
        job_id=place.job_id,
        array_job_id=place.array_job_id,
        task=place.task,
        restart=place.restart,
        nodes=tuple(slurm.hosts(place.nodelist)),
        gpus=place.gpus_on_node * place.num_nodes,
        first_actor=job.actor_indices.start if job.actor_indices else None,
        started_unix_s=now,
        seen_unix_s=now,
        phase="running",
        cause="",
        step_at_start=metrics.newest_step(job.run.metrics, "step"),
    )


@contextmanager
def _signals(request: JobRequest) -> Iterator[None]:
    before = {number: signal.signal(number, request) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------ the run and the site


def _open_run(
    root: Path | None, source: Path | None, site: Path | None
) -> tuple[RunDir, RunConfig]:
    """The run, made from the config if nobody has made it yet."""
    if source is None:
        if root is None:
            raise ValueError("dapo job needs --run, or --config to make the run from.")
        return wait_for_run(root)
    config = load(source)
    if root is None and site is not None and (runs := load_site(site).storage.runs):
        root = Path(runs) / config.run.name
    root = root or config.run_dir
    section = config.run.model_copy(update={"dir": str(root.parent), "name": root.name})
    return make_run(config.model_copy(update={"run": section}), source)


def make_run(config: RunConfig, source: Path) -> tuple[RunDir, RunConfig]:
    """Make the run, or open the one that is there. Two jobs may do so at once."""
    try:
        run, made = prepare.create_run(config, "train")
    except prepare.RunExists:
        run, made = prepare.open_run(config.run_dir, "train")
        if made != prepare.with_absolute_paths(config):
            log.warning("%s is not read: the run keeps %s, which differs.", source, run.config)
    create_auth(run)
    return run, made


def wait_for_run(
    root: Path,
    *,
    limit_s: float = RUN_APPEARS_S,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[RunDir, RunConfig]:
    """The run that another job makes. Raises ValueError when it does not appear in time."""
    deadline_s = clock() + limit_s
    while not RunDir(root).config.exists():
        if clock() > deadline_s:
            raise ValueError(
                f"there is no run in {root.absolute()} (no config.toml), and none appeared within "
                f"{limit_s:.0f} s. The learner's job makes it; look at its log, or submit the run "
                "with dapo submit."
            )
        sleep(RUN_POLL_S)
    return prepare.open_run(root, "train")


def _site(run: RunDir, path: Path | None, place: Place) -> Site:
    """The file given, else the run's copy, else what the allocation itself tells."""
    kept = run.jobs / "site.toml"
    if path is not None or kept.exists():
        return load_site(path or kept)
    node = {"cpus_per_node": place.cpus_on_node, "gpus_per_node": place.gpus_on_node}
    table = LearnerTable.model_validate({**node, "time_limit": "365-0"})
    return Site.model_validate(
        {
            "name": "allocation",
            "jobs_may_submit": False,
            "learner": table.model_dump(),
            "actors": {**node, "time_limit": "365-0"},
        }
    )
