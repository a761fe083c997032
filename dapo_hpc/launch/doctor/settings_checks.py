"""Checks on the login node: how this cluster preempts, requeues and keeps its books."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from dapo_hpc.launch.doctor.cluster_view import ClusterView, Partition, Run
from dapo_hpc.launch.doctor.findings import Finding, note, ok, problem
from dapo_hpc.launch.doctor.slurm_checks import find_partition
from dapo_hpc.launch.jobs import MAX_ELEMENTS
from dapo_hpc.launch.site import Site
from dapo_hpc.launch.slurm import SlurmRefused, SlurmUnavailable


def check_settings(site: Site, view: ClusterView, run: Run) -> Iterator[Finding]:
    actors = find_partition("actors", site.actors, view)
    if isinstance(actors, Partition):
        yield check_preemption(actors, view.config, jobs_may_submit=site.jobs_may_submit)
        yield check_notice(actors, view.config, drain_s=site.handover.drain_s)
    yield check_requeue(view.config, successors=site.learner.successors)
    yield check_arrays(view.config)
    yield check_accounting(run)


def check_preemption(
    actors: Partition, config: Mapping[str, str], *, jobs_may_submit: bool
) -> Finding:
    """What becomes of an actor that gives way."""
    check = "preemption"
    if config.get("PreemptType", "preempt/none") == "preempt/none":
        return ok(check, "this cluster does not preempt jobs.")
    mode = actors["PreemptMode"] or config.get("PreemptMode", "")
    if "REQUEUE" in mode:
        return ok(check, f"preempted jobs of partition {actors.name} are requeued ({mode}).")
    if "OFF" in mode:
        return ok(check, f"jobs of partition {actors.name} are not preempted.")
    if "CANCEL" in mode and jobs_may_submit:
        text = f"preempted jobs of partition {actors.name} are cancelled, not requeued ({mode})."
        return note(check, f"{text} The learner's job submits lost actors again within a minute.")
    if "CANCEL" in mode:
        return note(
            check,
            f"preempted jobs of partition {actors.name} are cancelled, not requeued, and "
            "jobs_may_submit = false keeps the learner from replacing them.",
            "repeat `dapo submit RUN --site SITE` when actors are missing (cron does it), or set "
            "jobs_may_submit = true if sbatch works on compute nodes.",
        )
    return problem(
        check,
        f"PreemptMode of partition {actors.name} is {mode}: a preempted actor keeps its memory and "
        "stands still, and its leases run out while it holds them.",
        "set actors.partition to one whose jobs are requeued or cancelled.",
    )


def check_notice(actors: Partition, config: Mapping[str, str], *, drain_s: float) -> Finding:
    """How much time an actor has between the first signal and SIGKILL."""
    check = "notice"
    grace_s = _seconds(actors["GraceTime"])
    kill_wait_s = _seconds(config.get("KillWait", "30"))
    is_signalled = "preempt_send_user_signal" in config.get("SlurmctldParameters", "")
    if is_signalled and grace_s:
        first = "the job's own signal (preempt_send_user_signal)"
    elif is_signalled:
        first = "the job's own signal and SIGTERM in the same second"
    else:
        first = "SIGTERM (preempt_send_user_signal is off)"
    left_s = grace_s + kill_wait_s
    text = f"preemption begins with {first}; SIGKILL follows {left_s} s later"
    text += f" (GraceTime {grace_s} s, KillWait {kill_wait_s} s)"
    if left_s < drain_s:
        return note(
            check,
            f"{text}, less than handover.drain_s = {drain_s:g}. What an actor sampled since its "
            "last heartbeat is sampled again; nothing else is lost.",
        )
    return ok(check, f"{text}.")


def check_requeue(config: Mapping[str, str], *, successors: int) -> Finding:
    """Whether jobs can come back by themselves."""
    if successors:
        return ok("requeue", f"not needed: learner.successors = {successors} jobs wait.")
    if config.get("JobRequeue", "1") == "0":
        return note(
            "requeue",
            "JobRequeue=0: jobs do not come back unless they ask for it. Ours do (--requeue); some "
            "clusters forbid it all the same.",
            "if `scontrol requeue` is refused, set learner.successors to the number of jobs that a "
            "run may need.",
        )
    return ok("requeue", "JobRequeue=1: jobs come back after preemption and the loss of a node.")


def check_arrays(config: Mapping[str, str]) -> Finding:
    """Whether an array of actors may have as many elements as we would give it."""
    largest = int(config.get("MaxArraySize", "1001")) - 1
    text = f"MaxArraySize allows {largest} jobs in one array of actors"
    if largest < 1:
        return problem(
            "arrays",
            "MaxArraySize allows no job arrays on this cluster, and actors are one.",
            "ask the cluster's support to allow arrays.",
        )
    if largest < MAX_ELEMENTS:
        return note(
            "arrays", f"{text}.", f"a run with more needs actors_per_job above 1 (now {largest})."
        )
    return ok("arrays", f"{text}.")


def check_accounting(run: Run) -> Finding:
    """Whether sacct works, and what is lost without it."""
    lost = (
        "`dapo status` does not need it. Lost are: the final state of jobs older than MinJobAge, "
        "and `.result()` of submitit's objects for a job that was cancelled or killed, which would "
        "wait for ever"
    )
    try:
        run(["sacct", "--noheader", "--allocations", "--starttime=now-1minutes"])
    except (SlurmRefused, SlurmUnavailable) as refused:
        return note(
            "accounting",
            f"sacct does not work here ({_first_line(refused)}). {lost}.",
            "in Python, ask `.state` of a job with a time limit of your own in place of "
            "`.result()`.",
        )
    return ok("accounting", "sacct works.")


def _seconds(text: str) -> int:
    """Of '30 sec', '30' or 'NO'."""
    number = text.split()[0] if text.split() else ""
    return int(number) if number.isdigit() else 0


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")
