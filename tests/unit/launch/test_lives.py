"""What jobs write down about themselves, and what they are asked to do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dapo_hpc.launch import lives
from dapo_hpc.launch.lives import Life, LifeRecord, Place, read_lives, starts_without_progress
from dapo_hpc.run_dir import RunDir

RECORD = LifeRecord(
    kind="actors",
    job_id="12",
    array_job_id="10",
    task=2,
    restart=0,
    nodes=("n1", "n2"),
    gpus=4,
    first_actor=8,
    started_unix_s=100.0,
    seen_unix_s=100.0,
    phase="running",
    cause="",
    step_at_start=3,
)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path)


def write(run: RunDir, record: LifeRecord) -> None:
    life = Life(run, record, clock=lambda: record.seen_unix_s)
    life.begin()
    life.close()


def reach(run: RunDir, step: int) -> None:
    """The metrics as after this step."""
    run.metrics.write_text(json.dumps({"kind": "step", "step": step, "lineage": 1}) + "\n")


def test_a_life_is_read_as_it_was_written(run: RunDir) -> None:
    write(run, RECORD)
    assert read_lives(run) == [RECORD]
    assert RECORD.address == "10_2"
    assert [path.name for path in lives.lives_dir(run).iterdir()] == ["actors-10_2-0.json"]
    assert run.jobs.stat().st_mode & 0o777 == 0o700


def test_a_turn_is_written_at_once_with_the_time(run: RunDir) -> None:
    now = [100.0]
    life = Life(run, RECORD, clock=lambda: now[0])
    life.begin()
    now[0] = 160.0
    life.turn("handed_over", "SIGUSR2 from Slurm")
    life.close()
    (found,) = read_lives(run)
    assert (found.phase, found.cause, found.seen_unix_s) == (
        "handed_over",
        "SIGUSR2 from Slurm",
        160.0,
    )


def test_it_is_kept_fresh_without_anybody_doing_anything(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lives, "SEEN_EVERY_S", 0.02)
    times = iter(range(100, 10**6))
    life = Life(run, RECORD, clock=lambda: float(next(times)))
    life.begin()
    first = read_lives(run)[0].seen_unix_s
    while read_lives(run)[0].seen_unix_s == first:
        pass
    life.close()


def test_each_start_of_a_job_has_a_file_and_they_come_in_order(run: RunDir) -> None:
    later = replace(RECORD, restart=1, started_unix_s=50.0)
    for record in (RECORD, later):
        write(run, record)
    assert [life.restart for life in read_lives(run)] == [1, 0]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"kind": "actors"}'])
def test_files_of_another_kind_are_passed_over(run: RunDir, text: str) -> None:
    write(run, RECORD)
    (lives.lives_dir(run) / "torn.json").write_text(text)
    assert read_lives(run) == [RECORD]


def learner(restart: int, step: int, **changes: object) -> LifeRecord:
    record = replace(
        RECORD, kind="learner", restart=restart, step_at_start=step, started_unix_s=100.0 + restart
    )
    return replace(record, **changes)  # type: ignore[arg-type]


def test_starts_are_counted_since_the_newest_step(run: RunDir) -> None:
    reach(run, 7)
    for restart, step in enumerate([0, 4, 7, 7]):
        write(run, learner(restart, step))
    write(run, replace(RECORD, step_at_start=7))
    assert starts_without_progress(run, "learner") == 2
    reach(run, 8)
    assert starts_without_progress(run, "learner") == 0


def test_after_giving_up_the_count_begins_anew(run: RunDir) -> None:
    write(run, learner(0, 0))
    write(run, learner(1, 0, phase="failed"))
    assert starts_without_progress(run, "learner") == 0
    write(run, learner(2, 0))
    assert starts_without_progress(run, "learner") == 1


def test_stop_and_target(run: RunDir) -> None:
    assert not lives.stop_requested(run)
    lives.request_stop(run)
    assert lives.stop_requested(run)
    lives.clear_stop(run)
    lives.clear_stop(run)
    assert not lives.stop_requested(run)
    assert lives.target(run) is None
    lives.set_target(run, 12)
    assert lives.target(run) == 12


def test_a_place_is_read_from_slurms_variables() -> None:
    place = Place.of(
        {
            "SLURM_JOB_ID": "12",
            "SLURM_ARRAY_JOB_ID": "10",
            "SLURM_ARRAY_TASK_ID": "3",
            "SLURM_RESTART_COUNT": "2",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_ON_NODE": "16",
            "SLURM_GPUS_ON_NODE": "8",
        }
    )
    assert (place.address, place.log_id, place.restart, place.gpus_on_node) == ("10_3", "10", 2, 8)
    alone = Place.of({"SLURM_JOB_ID": "12"})
    assert (alone.address, alone.log_id, alone.restart, alone.num_nodes) == ("12", "12", 0, 1)
