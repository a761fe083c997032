"""Repair: what is missing is submitted, what is there twice is cancelled, and twice is once."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from fake_slurm import FakeSlurm, install
from hypothesis import given, settings
from hypothesis import strategies as st
from submitted_run import make_run, make_site

from dapo_hpc.launch import lives, slurm
from dapo_hpc.launch.repair import array_text, cancel_waiting, queued, repair
from dapo_hpc.launch.site import Site
from dapo_hpc.run_dir import RunDir


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return install(FakeSlurm(), monkeypatch)


def counts(fake: FakeSlurm) -> dict[str, int]:
    return {kind: len(fake.named(ending=f".{kind}")) for kind in ("learner", "buffer", "actors")}


def tasks(fake: FakeSlurm) -> list[int | None]:
    return sorted((job.task for job in fake.named(ending=".actors")), key=lambda t: t or 0)


def test_the_first_repair_submits_everything(fake: FakeSlurm, tmp_path: Path) -> None:
    site = make_site(with_buffer=True)
    repaired = repair(make_run(tmp_path, site), site)
    assert [sent.kind for sent in repaired.sent] == ["buffer", "learner", "actors"]
    buffer, learner, *actors = fake.jobs
    assert buffer.dependency == "singleton"
    assert learner.dependency == f"singleton,after:{buffer.job_id}"
    assert {job.dependency for job in actors} == {f"after:{learner.job_id}"}
    assert tasks(fake) == [0, 1, 2, 3]
    assert fake.count("squeue") == 1


def test_lost_elements_are_added_under_their_own_numbers(fake: FakeSlurm, tmp_path: Path) -> None:
    site = make_site()
    run = make_run(tmp_path, site, actors=6)
    repair(run, site)
    fake.start_everything()
    fake.jobs = [job for job in fake.jobs if job.task not in (1, 4, 5)]
    repaired = repair(run, site)
    assert [(sent.kind, sent.elements) for sent in repaired.sent] == [("actors", (1, 4, 5))]
    assert "--array=1,4-5" in fake.calls[-1]
    assert not any("--dependency" in word for word in fake.calls[-1]), "the learner has started"
    assert tasks(fake) == list(range(6))


def test_successors_are_kept_at_their_number(fake: FakeSlurm, tmp_path: Path) -> None:
    site = make_site(successors=2)
    run = make_run(tmp_path, site)
    assert len([s for s in repair(run, site).sent if s.kind == "learner"]) == 3
    learners = fake.named(ending=".learner")
    assert {job.dependency for job in learners} == {"singleton"}
    actors = fake.named(ending=".actors")
    assert {job.dependency for job in actors} == {f"after:{learners[0].job_id}"}
    fake.jobs.remove(learners[0])
    learners[1].state = "RUNNING"
    assert [sent.kind for sent in repair(run, site).sent] == ["learner"]


def test_idle_elements_are_left_out_when_the_keeper_says_so(
    fake: FakeSlurm, tmp_path: Path
) -> None:
    site = make_site()
    run = make_run(tmp_path, site)
    repair(run, site, leave_out={1, 2})
    assert tasks(fake) == [0, 3]


def test_nothing_happens_to_a_run_that_is_complete_or_was_stopped(
    fake: FakeSlurm, tmp_path: Path
) -> None:
    site = make_site()
    run = make_run(tmp_path, site)
    lives.request_stop(run)
    assert repair(run, site).sent == ()
    lives.clear_stop(run)
    run.model.mkdir()
    assert repair(run, site).sent == ()
    assert fake.calls == []


def test_jobs_of_another_run_of_that_name_are_left_alone(fake: FakeSlurm, tmp_path: Path) -> None:
    site = make_site()
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    ours, theirs = make_run(here, site), make_run(there, site)
    repair(theirs, site)
    assert len(repair(ours, site).sent) == 2
    assert len(fake.jobs) == 10
    assert len(queued(ours)) == len(queued(theirs)) == 5
    cancel_waiting(ours)
    assert len(queued(theirs)) == 5


def test_a_submission_whose_answer_was_lost_is_found_by_the_next_repair(
    fake: FakeSlurm, tmp_path: Path
) -> None:
    site = make_site()
    run = make_run(tmp_path, site)
    fake.lost_answers = 1
    with pytest.raises(slurm.SlurmUnavailable):
        repair(run, site)
    assert counts(fake) == {"learner": 1, "buffer": 0, "actors": 0}
    assert [sent.kind for sent in repair(run, site).sent] == ["actors"]


def test_what_two_callers_submitted_at_once_is_there_once_after_the_next_repair(
    fake: FakeSlurm, tmp_path: Path
) -> None:
    """As where the file system knows no locks: the second looks before the first has submitted."""
    site = make_site()
    run = make_run(tmp_path, site)
    second = FakeSlurm(jobs=fake.jobs, _ids=fake._ids)

    def other_turn() -> None:
        with pytest.MonkeyPatch.context() as patch:
            install(second, patch)
            patch.setattr("dapo_hpc.launch.repair._locked", lambda _descriptor: True)
            repair(run, site)

    fake.before_sbatch = other_turn
    repair(run, site)
    assert counts(fake)["learner"] == 2
    assert counts(fake)["actors"] == 8
    oldest = fake.named(ending=".learner")[0].job_id
    repaired = repair(run, site)
    assert len(repaired.cancelled) == 5
    assert counts(fake) == {"learner": 1, "buffer": 0, "actors": 4}
    assert fake.named(ending=".learner")[0].job_id == oldest


def test_of_two_the_one_that_runs_stays(fake: FakeSlurm, tmp_path: Path) -> None:
    site = make_site()
    run = make_run(tmp_path, site, actors=1)
    repair(run, site)
    pending = fake.named(ending=".actors")[0]
    fake.jobs.remove(pending)
    repair(run, site)
    running = fake.named(ending=".actors")[0]
    running.state = "RUNNING"
    fake.jobs.append(pending)
    assert repair(run, site).cancelled == (pending.address,)


def test_a_job_that_is_leaving_is_neither_replaced_nor_cancelled(
    fake: FakeSlurm, tmp_path: Path
) -> None:
    """It shows as COMPLETING while it is requeued."""
    site = make_site()
    run = make_run(tmp_path, site, actors=1)
    repair(run, site)
    for job in fake.jobs:
        job.state = "COMPLETING"
    repaired = repair(run, site)
    assert (repaired.sent, repaired.cancelled) == ((), ())


def test_a_run_submitted_with_plain_sbatch_gets_a_site_file(
    fake: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_site()
    run = make_run(tmp_path, site)
    for name in ("site.toml", "origin.json"):
        (run.jobs / name).unlink()
    monkeypatch.chdir(tmp_path)
    repair(run, site)
    assert (run.jobs / "site.toml").exists()
    assert {job.directory for job in fake.jobs} == {str(tmp_path)}


STATES = st.sampled_from(["PENDING", "RUNNING", "COMPLETING", "SUSPENDED", "CONFIGURING"])


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_repair_restores_any_subset_and_then_does_nothing(data: st.DataObject) -> None:
    """Whatever is alive, in whatever state, after any scaling: never two learners, exactly the
    wanted elements, and a second repair changes nothing."""
    per_job = data.draw(st.integers(1, 3), "actors per job")
    site = make_site(
        per_job=per_job,
        successors=data.draw(st.integers(0, 2), "successors"),
        with_buffer=data.draw(st.booleans(), "buffer job"),
    )
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        fake = install(FakeSlurm(), patch)
        run = make_run(Path(name), site, actors=per_job * data.draw(st.integers(1, 5), "jobs"))
        for _ in range(data.draw(st.integers(1, 3), "disasters")):
            repair(run, site)
            _disaster(fake, data)
            if data.draw(st.booleans(), "scales"):
                lives.set_target(run, per_job * data.draw(st.integers(0, 6), "target"))
            repair(run, site)
            _check(fake, run, site)
            before = list(fake.jobs)
            again = repair(run, site)
            assert (again.sent, again.cancelled) == ((), ())
            assert fake.jobs == before


def _disaster(fake: FakeSlurm, data: st.DataObject) -> None:
    """Some jobs vanish, the others are in any state; elements may be there twice."""
    fake.jobs = [job for job in fake.jobs if data.draw(st.booleans(), f"{job.address} lives")]
    for job in fake.jobs:
        job.state = data.draw(STATES, job.address)


def _check(fake: FakeSlurm, run: RunDir, site: Site) -> None:
    asked = lives.target(run)
    actors = fake_wanted(run) if asked is None else asked
    wanted = set(range(actors // site.actors.actors_per_job))
    elements = [job for job in fake.named(ending=".actors")]
    assert len({job.task for job in elements}) == len(elements), "an element twice"
    assert {job.task for job in elements} >= wanted
    beyond = [job for job in elements if job.task not in wanted]
    assert all(job.state != "PENDING" for job in beyond), "those that run drain by themselves"
    assert len(fake.named(ending=".learner")) == 1 + site.learner.successors
    assert len(fake.named(ending=".buffer")) == int(site.buffer is not None)


def fake_wanted(run: RunDir) -> int:
    from dapo_hpc.config import load

    return load(run.config).rollout.num_actors


@pytest.mark.parametrize(
    ("elements", "text"), [([0], "0"), ([0, 1, 2], "0-2"), ([0, 2, 3, 7], "0,2-3,7"), ([], "")]
)
def test_slurms_shorthand_for_elements(elements: list[int], text: str) -> None:
    assert array_text(elements) == text
