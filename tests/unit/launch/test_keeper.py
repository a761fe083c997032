"""What the keeper notices and does; the clock and Slurm are given."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from dapo_hpc.launch import keeper, lives, slurm
from dapo_hpc.launch.keeper import SILENT_S, Keeper, find_silent, left_out, living_jobs
from dapo_hpc.launch.lives import Life, LifeRecord
from dapo_hpc.launch.placement import Job
from dapo_hpc.launch.slurm import QueuedJob, SlurmRefused
from tests.unit.launch import fake_slurm
from tests.unit.launch.fake_slurm import FakeSlurm
from tests.unit.launch.submitted_run import make_run, make_site
from tests.unit.launch.test_lives import RECORD
from tests.unit.launch.test_steps import a_place

NOW = 10_000.0


def a_life(
    task: int, *, job_id: str = "50", seen_s_ago: float = 0.0, **changes: object
) -> LifeRecord:
    record = replace(
        RECORD, job_id=job_id, array_job_id="50", task=task, seen_unix_s=NOW - seen_s_ago
    )
    return replace(record, **changes)  # type: ignore[arg-type]


def queued(task: int, job_id: str, *, used_s: int = 4000, state: str = "RUNNING") -> QueuedJob:
    return QueuedJob(
        job_id=job_id,
        array_job_id="50",
        task=task,
        state=state,
        reason="None",
        nodes=f"n{task}",
        num_nodes=1,
        name="some_run.actors",
        directory="",
        comment="",
        time_left_s=None,
        time_used_s=used_s,
    )


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    from dapo_hpc.config import load

    site = make_site()
    run = make_run(tmp_path, site, actors=3)
    fake_slurm.install(FakeSlurm(), monkeypatch)
    return Job(kind="learner", run=run, config=load(run.config), site=site, place=a_place())


def hear(job: Job, ages: dict[str, float], *, status_age_s: float = 0.0) -> None:
    """The buffer's snapshot: actor -> seconds since it was heard."""
    actors = {name: {"heard_s_ago": age_s} for name, age_s in ages.items()}
    job.run.status.parent.mkdir(exist_ok=True)
    job.run.status.write_text(json.dumps({"actors": actors}))
    os.utime(job.run.status, (NOW - status_age_s, NOW - status_age_s))


# ------------------------------------------------------------------ silence


def test_a_job_is_silent_when_neither_supervisor_nor_actors_are_heard() -> None:
    silent_s = SILENT_S + 20
    jobs = [queued(0, "50"), queued(1, "51"), queued(2, "52"), queued(3, "53", used_s=10)]
    known = [
        a_life(0, job_id="50"),
        a_life(1, job_id="51", seen_s_ago=silent_s),
        a_life(2, job_id="52", seen_s_ago=silent_s),
        a_life(3, job_id="53", seen_s_ago=silent_s),
    ]
    found = find_silent(jobs, known, {"52"}, NOW)
    assert [(s.job.address, s.seen_s_ago) for s in found] == [("50_1", silent_s)]


def test_a_job_that_never_wrote_is_silent_after_a_while() -> None:
    assert not find_silent([queued(0, "50", used_s=100)], [], set(), NOW)
    assert find_silent([queued(0, "50", used_s=1000)], [], set(), NOW)


def test_waiting_and_leaving_jobs_and_the_learner_are_left_alone() -> None:
    learner = replace(queued(0, "50"), task=None, array_job_id=None)
    jobs = [queued(0, "50", state="PENDING"), queued(1, "51", state="COMPLETING"), learner]
    assert not find_silent(jobs, [], set(), NOW)


def test_without_news_from_the_buffer_nobody_is_accused() -> None:
    assert not find_silent([queued(0, "50")], [], None, NOW)


def test_jobs_are_known_by_the_names_of_their_actors(job: Job) -> None:
    assert living_jobs(job.run, NOW) is None, "there is no snapshot yet"
    hear(job, {"actor-0-job51-n1-77-1": 3.0, "actor-1-job52-n1-78-1": 500.0, "actor-2-n1-9-1": 1.0})
    assert living_jobs(job.run, NOW) == {"51"}
    hear(job, {"actor-0-job51-n1-77-1": 3.0}, status_age_s=SILENT_S + 1)
    assert living_jobs(job.run, NOW) is None, "the buffer itself is not heard"


def test_a_silent_job_is_reported_requeued_and_kept_from_its_node(
    job: Job, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(slurm, "requeue", lambda job: asked.append(("requeue", job)))
    monkeypatch.setattr(slurm, "stay_away", lambda job, nodes: asked.append((job, nodes)))
    monkeypatch.setattr(keeper.repair, "queued", lambda _run: [queued(1, "51")])
    monkeypatch.setattr(keeper.repair, "repair", lambda *_, **__: keeper.repair.Repaired())
    hear(job, {})
    guard = Keeper(job, hopeless=pytest.fail, clock=lambda: NOW)
    guard.round()
    assert asked == [("requeue", "50_1"), ("50_1", "n1")]
    row = json.loads((job.run.jobs / "silent.jsonl").read_text())
    assert (row["job"], row["nodes"], row["seen_s_ago"]) == ("50_1", "n1", 4000)
    assert "runs on n1 by Slurm's account" in caplog.text


def test_a_node_that_cannot_be_excluded_is_no_failure(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_job: str, _nodes: str) -> None:
        raise SlurmRefused("Access/permission denied")

    monkeypatch.setattr(slurm, "requeue", lambda _job: None)
    monkeypatch.setattr(slurm, "stay_away", refuse)
    monkeypatch.setattr(keeper.repair, "queued", lambda _run: [queued(1, "51")])
    monkeypatch.setattr(keeper.repair, "repair", lambda *_, **__: keeper.repair.Repaired())
    hear(job, {})
    Keeper(job, hopeless=pytest.fail, clock=lambda: NOW).round()


# ------------------------------------------------------------------ bringing actors back


def test_idle_elements_rest_and_failed_ones_too(job: Job) -> None:
    known = [
        a_life(0, phase="idle", seen_s_ago=100),
        a_life(1, phase="idle", seen_s_ago=5000),
        a_life(2, phase="failed", seen_s_ago=10),
        a_life(3, phase="failed", seen_s_ago=1000),
        a_life(4, phase="handed_over", seen_s_ago=1),
    ]
    assert left_out(known, job, NOW) == ({0, 2}, set())


def test_an_element_that_fails_again_and_again_is_given_up_until_there_is_a_step(job: Job) -> None:
    limit = job.config.launch.max_job_starts
    failed = [a_life(0, phase="failed", seen_s_ago=9000 - i, step_at_start=4) for i in range(limit)]
    assert left_out(failed, job, NOW) == (set(), {0})
    assert left_out(failed[1:], job, NOW) == (set(), set())
    progress = [*failed, a_life(0, phase="failed", seen_s_ago=1000, step_at_start=5)]
    assert left_out(progress, job, NOW) == (set(), set())


def write(job: Job, records: list[LifeRecord]) -> None:
    for record in records:
        life = Life(job.run, record, clock=lambda record=record: record.seen_unix_s)
        life.begin()
        life.close()


def test_missing_elements_come_back_but_for_those_that_rest(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = fake_slurm.install(FakeSlurm(), monkeypatch)
    write(job, [a_life(1, phase="idle", seen_s_ago=100)])
    Keeper(job, hopeless=pytest.fail, clock=lambda: NOW).round()
    assert {j.task for j in fake.named(ending=".actors")} == {0, 2}


def test_where_jobs_may_not_submit_nothing_is_submitted(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = fake_slurm.install(FakeSlurm(), monkeypatch)
    site = job.site.model_copy(update={"jobs_may_submit": False})
    Keeper(replace(job, site=site), hopeless=pytest.fail, clock=lambda: NOW).round()
    assert not fake.count("sbatch")


def test_when_every_element_was_given_up_the_run_is_told_why(job: Job) -> None:
    limit = job.config.launch.max_job_starts
    write(
        job,
        [
            a_life(
                task, restart=i, phase="failed", cause="no GPU", seen_s_ago=9000, step_at_start=0
            )
            for task in range(3)
            for i in range(limit)
        ],
    )
    said: list[str] = []
    Keeper(job, hopeless=said.append, clock=lambda: NOW).round()
    assert len(said) == 1
    assert "no GPU" in said[0]


def test_a_slurm_that_fails_ends_nobody(
    job: Job, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(keeper, "EVERY_S", 0.01)
    rounds: list[int] = []

    def fail(_run: object) -> list[QueuedJob]:
        rounds.append(1)
        raise slurm.SlurmUnavailable("squeue: the Slurm controller does not answer")

    monkeypatch.setattr(keeper.repair, "queued", fail)
    guard = Keeper(job, hopeless=pytest.fail)
    guard.start()
    while len(rounds) < 3:
        pass
    guard.stop()
    assert caplog.text.count("does not answer") == 1, "said once"


def test_in_one_allocation_it_has_nothing_to_do(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "read_lives", pytest.fail)
    Keeper(replace(job, kind="train"), hopeless=pytest.fail).round()
    assert lives.target(job.run) is None
