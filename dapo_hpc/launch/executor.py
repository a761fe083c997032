"""The run's jobs as submitit's: the same scripts, with submitit's command in their last line.

submitit keeps its pickles in RUN/jobs, which only the owner can enter.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from submitit.core import utils
from submitit.core.core import InfoWatcher
from submitit.slurm.slurm import SlurmExecutor, SlurmJob

from dapo_hpc.launch import slurm
from dapo_hpc.launch.jobs import JobKind, JobSpec
from dapo_hpc.launch.lives import Place
from dapo_hpc.launch.repair import Send, array_option
from dapo_hpc.launch.sbatch import file_name, script_text
from dapo_hpc.run_dir import RunDir, deny_others_writing, write_text

WATCH_S = 60
"""Between two calls of squeue for all jobs together."""
ENDED = "COMPLETED"
"""Of a job that Slurm has finished with; how it ended, its result or the run's files tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunJob:
    """What submitit calls in the job: the same as `dapo job`, in the same process."""

    kind: JobKind
    run: Path
    config: Path | None
    site: Path | None

    def __call__(self) -> int:
        """Exit code of the job, 0. Raises RuntimeError when it is another one.

        A job that Slurm is ending leaves without a result: it may have been preempted or requeued,
        and submitit takes a job with a result for done.
        """
        from dapo_hpc.launch.hand_over import is_running
        from dapo_hpc.launch.job import run_job

        deny_others_writing()
        code = run_job(self.kind, run=self.run, config=self.config, site=self.site)
        if not is_running(Place.of(os.environ).address):
            sys.exit(code)
        if code:
            raise RuntimeError(f"{self.kind} of {self.run} ended with exit code {code}")
        return code


class QueueWatcher(InfoWatcher):  # type: ignore[misc]  # submitit's types are not read
    """Job states from squeue. submitit's own come from sacct, and without accounting it would wait
    for ever for a job that was cancelled."""

    def update(self) -> None:
        """One call of squeue. What it does not know any more has ended."""
        self._num_calls += 1
        waited_for = self._registered - self._finished
        try:
            found = {job.address: job for job in slurm.queue()} if waited_for else {}
        except slurm.SlurmUnavailable:
            return
        for job_id in waited_for:
            job = found.get(job_id)
            state = {"State": job.state, "NodeList": job.nodes} if job else {"State": ENDED}
            self._info_dict[job_id] = {"JobID": job_id, **state}
            if job is None:
                self._finished.add(job_id)
        self._last_status_check = time.time()

    def get_state(self, job_id: str, mode: str = "standard") -> str:
        """PENDING, RUNNING, ..., COMPLETED once it is no longer in the queue."""
        return str(self.get_info(job_id, mode=mode).get("State") or "UNKNOWN")


class RunSlurmJob(SlurmJob):  # type: ignore[misc]  # submitit's types are not read
    """A job of the run. `state`, `cancel()`, `done()` and `result()` need no accounting."""

    watcher = QueueWatcher(delay_s=WATCH_S)


class RunExecutor(SlurmExecutor):  # type: ignore[misc]  # submitit's types are not read
    """Submits one job, or one array, of a run.

    Args:
        run: of which it is.
        spec: what is asked for.
        directory: in which sbatch runs.
        options: further words for sbatch.
        elements: of the array.
    """

    job_class = RunSlurmJob

    def __init__(
        self,
        run: RunDir,
        spec: JobSpec,
        directory: Path,
        options: Sequence[str] = (),
        elements: Sequence[int] = (),
    ) -> None:
        super().__init__(folder=run.jobs)
        self._run, self._spec, self._directory = run, spec, directory
        self._options, self._elements = options, elements

    def _make_submission_file_text(self, command: str, uid: str) -> str:  # noqa: ARG002
        return script_text(self._spec, ["env", "SUBMITIT_EXECUTOR=slurm", *shlex.split(command)])

    def _internal_process_submissions(
        self, delayed_submissions: list[utils.DelayedSubmission]
    ) -> list[RunSlurmJob]:
        """As submitit's own, which would submit an array with a script of its own making."""
        command = [sys.executable, "-u", "-m", "submitit.core._submit", str(self.folder)]
        script = self.folder / f"submitit-{file_name(self._spec)}"
        write_text(script, self._make_submission_file_text(shlex.join(command), ""))
        options = [*self._options, *array_option(self._elements)]
        job_id = slurm.sbatch(script, *options, cwd=self._directory)
        addresses = [f"{job_id}_{element}" for element in self._elements] or [job_id]
        jobs = []
        for address, delayed in zip(addresses, delayed_submissions, strict=True):
            job = RunSlurmJob(folder=self.folder, job_id=address)
            # The job waits a minute for its pickle, whose name holds the job's number.
            with utils.temporary_save_path(job.paths.submitted_pickle) as temporary:
                delayed.dump(temporary)
            jobs.append(job)
        return jobs


def send_through_submitit(run: RunDir, into: dict[str, RunSlurmJob]) -> Send:
    """For launch.repair; the job objects are put into `into`, by job id or ARRAY_ELEMENT."""

    def send(
        spec: JobSpec, directory: Path, options: Sequence[str], elements: Sequence[int]
    ) -> str:
        executor = RunExecutor(run, spec, directory, options, elements)
        call = _call(spec, directory)
        with executor.batch():
            jobs = [executor.submit(call) for _ in elements or (0,)]
        into.update({job.job_id: job for job in jobs})
        return str(jobs[0].job_id).partition("_")[0]

    return send


def _call(spec: JobSpec, directory: Path) -> RunJob:
    """The job's `dapo job` words, with absolute paths."""
    given = dict(zip(spec.words[3::2], spec.words[4::2], strict=True))
    paths = {option: directory / value for option, value in given.items()}
    return RunJob(
        kind=spec.kind,
        run=paths["--run"],
        config=paths.get("--config"),
        site=paths.get("--site"),
    )
