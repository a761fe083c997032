"""Which steps a job has, where they lie, and how srun is told."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dapo_hpc.config import parse
from dapo_hpc.launch import slurm
from dapo_hpc.launch.lives import Kind, Place
from dapo_hpc.launch.placement import Job
from dapo_hpc.launch.site import Site
from dapo_hpc.launch.steps import Share, StepCommand, StepProcess, srun_environment
from dapo_hpc.observe.final import FINAL_EXIT
from dapo_hpc.run_dir import RunDir
from tests.unit.launch.submitted_run import NODE, config_table, make_site


def a_place(**changes: Any) -> Place:
    found: dict[str, Any] = {
        "job_id": "7",
        "array_job_id": None,
        "task": 0,
        "restart": 0,
        "nodelist": "n1",
        "num_nodes": 1,
        "cpus_on_node": 4,
        "gpus_on_node": 0,
        **changes,
    }
    return Place(**found)


def a_job(
    directory: Path,
    kind: Kind,
    place: Place,
    *,
    site: Site | None = None,
    actors: int = 1,
    **sections: dict[str, Any],
) -> Job:
    table = config_table(directory, actors)
    for name, section in sections.items():
        table[name] = {**table.get(name, {}), **section}
    run = RunDir(directory / "run")
    run.train_prompts.parent.mkdir(parents=True, exist_ok=True)
    run.train_prompts.touch()
    return Job(kind=kind, run=run, config=parse(table), site=site or make_site(), place=place)


def options(command: StepCommand) -> set[str]:
    """Of srun alone."""
    end = next(i for i, word in enumerate(command.words) if word == sys.executable)
    return set(command.words[:end])


def named(job: Job) -> dict[str, StepCommand]:
    return {command.name: command for command in job.commands()}


# ------------------------------------------------------------------ words


def test_the_words_of_a_step(tmp_path: Path) -> None:
    """In full, once: a step says all that it needs, since it inherits little from its job."""
    job = a_job(tmp_path, "learner", a_place(num_nodes=2), learner={"data_parallel": 4})
    run = job.run.root
    assert list(named(job)["learner"].words) == [
        "srun", "--job-name=learner",
        "--nodes=2", "--ntasks=4", "--ntasks-per-node=2", "--cpus-per-task=2", "--relative=0",
        "--distribution=block", "--mem=0", "--exact", "--gres=none", "--overlap",
        "--kill-on-bad-exit=1", "--export=ALL", "--input=none", "--open-mode=append",
        f"--output={run}/logs/learner-7_%t.log",
        sys.executable, "-m", "dapo_hpc.cli", "role", "learner", "--run", f"{run}",
        f"--final-mark={run}/jobs/final-learner-7", "--from-slurm",
    ]  # fmt: skip
    assert [log.name for log in named(job)["learner"].logs] == [
        f"learner-7_{rank}.log" for rank in range(4)
    ]


def test_in_a_container_the_role_is_the_one_installed_there(tmp_path: Path) -> None:
    site = make_site(environment={"prefix": ["apptainer", "exec", "image.sif"]})
    words = named(a_job(tmp_path, "learner", a_place(), site=site))["buffer"].words
    at = words.index("apptainer")
    assert words[at : at + 6] == ("apptainer", "exec", "image.sif", "dapo", "role", "buffer")


def test_the_network_of_the_site_reaches_the_roles(tmp_path: Path) -> None:
    site = make_site(network={"interface": "ib0", "port_range": [40000, 40100]})
    commands = named(a_job(tmp_path, "learner", a_place(), site=site))
    assert commands["buffer"].words[-2:] == ("--interface=ib0", "--ports=40000-40100")
    assert commands["learner"].words[-2:] == ("--from-slurm", "--interface=ib0")


def test_what_srun_would_take_for_options_is_not_passed_on() -> None:
    """SLURM_EXPORT_ENV would hide from the roles what the batch script has set up."""
    given = {
        "PATH": "/bin",
        "SLURM_JOB_ID": "7",
        "SLURM_EXPORT_ENV": "HOME",
        "SLURM_NTASKS": "8",
        "SLURM_GPUS_PER_NODE": "8",
        "SLURM_CPUS_PER_TASK": "4",
    }
    assert srun_environment(given, threads=3) == {
        "PATH": "/bin",
        "SLURM_JOB_ID": "7",
        "OMP_NUM_THREADS": "3",
        "PYTHONUNBUFFERED": "1",
    }


def test_prompts_are_prepared_before_the_first_buffer(tmp_path: Path) -> None:
    job = a_job(tmp_path, "learner", a_place())
    job.run.train_prompts.unlink()
    commands = named(job)
    assert list(commands) == ["prompts", "buffer", "learner"]
    assert commands["buffer"].after == "prompts"


# ------------------------------------------------------------------ placement


def test_the_buffer_is_where_the_site_wants_it(tmp_path: Path) -> None:
    site = make_site(with_buffer=True)
    assert list(named(a_job(tmp_path, "learner", a_place(), site=site))) == ["learner"]
    assert list(named(a_job(tmp_path, "buffer", a_place(), site=site))) == ["buffer"]


def test_an_element_of_the_array_has_its_own_actors(tmp_path: Path) -> None:
    place = a_place(array_job_id="6", task=2, gpus_on_node=4, cpus_on_node=48)
    site = make_site(per_job=2)
    job = a_job(tmp_path, "actors", place, site=site, rollout={"tensor_parallel": 2})
    commands = named(job)
    assert list(commands) == ["actor-4", "actor-5"]
    assert {"--gpus-per-node=2", "--cpus-per-task=24", "--ntasks=1"} <= options(commands["actor-5"])
    assert "--overlap" not in options(commands["actor-5"]), "no other step uses its GPUs"
    assert commands["actor-5"].words[-2:] == ("--index=5", "--idle-exit-s=1800")
    assert commands["actor-5"].log.name == "actor-6_5.log"


def test_in_one_allocation_engines_fill_what_the_learner_leaves(tmp_path: Path) -> None:
    place = a_place(num_nodes=3, gpus_on_node=8, cpus_on_node=96)
    site = make_site(
        learner={**NODE, "gpus_per_node": 8}, actors={**NODE, "gpus_per_node": 8}
    )  # fmt: skip
    job = a_job(
        tmp_path, "train", place, site=site, actors=5,
        learner={"data_parallel": 8}, rollout={"tensor_parallel": 4}, hardware={"gpus_per_node": 8},
    )  # fmt: skip
    with pytest.raises(ValueError, match="no place for actor 4"):
        job.commands()
    job = a_job(
        tmp_path, "train", place, site=site, actors=4,
        learner={"data_parallel": 8}, rollout={"tensor_parallel": 4}, hardware={"gpus_per_node": 8},
    )  # fmt: skip
    commands = named(job)
    where = [
        next(word for word in commands[f"actor-{i}"].words if word.startswith("--relative"))
        for i in range(4)
    ]
    assert where == ["--relative=1", "--relative=1", "--relative=2", "--relative=2"]
    assert {"--nodes=1", "--ntasks=8", "--gpus-per-node=8"} <= options(commands["learner"])
    assert {"--gres=none", "--overlap"} <= options(commands["buffer"])


def test_on_one_node_of_gpus_all_share_it(tmp_path: Path) -> None:
    place = a_place(gpus_on_node=8, cpus_on_node=96)
    site = make_site(
        learner={**NODE, "gpus_per_node": 8, "ranks_per_node": 4},
        actors={**NODE, "gpus_per_node": 8},
    )
    sections: dict[str, Any] = {"learner": {"data_parallel": 4}, "hardware": {"gpus_per_node": 8}}
    job = a_job(tmp_path, "train", place, site=site, actors=4, **sections)
    commands = named(job)
    assert {"--gpus-per-node=4", "--cpus-per-task=12"} <= options(commands["learner"])
    assert {"--gpus-per-node=1", "--cpus-per-task=12", "--relative=0"} <= options(
        commands["actor-3"]
    )


def test_on_processors_engines_go_to_nodes_without_the_learner(tmp_path: Path) -> None:
    job = a_job(tmp_path, "train", a_place(num_nodes=3), actors=3)
    where = {
        name: next(word for word in command.words if word.startswith("--relative"))
        for name, command in named(job).items()
    }
    assert where == {
        "buffer": "--relative=0",
        "learner": "--relative=0",
        "actor-0": "--relative=1",
        "actor-1": "--relative=2",
        "actor-2": "--relative=1",
    }


@pytest.mark.parametrize(
    ("nodes", "gpus", "ranks"),
    [
        (2, 0, 3),  # not as many on each node
        (1, 4, 8),  # more than GPUs
    ],
)
def test_a_learner_that_does_not_fit_is_refused(
    tmp_path: Path, nodes: int, gpus: int, ranks: int
) -> None:
    place = a_place(num_nodes=nodes, gpus_on_node=gpus)
    job = a_job(tmp_path, "learner", place, learner={"data_parallel": ranks})
    with pytest.raises(ValueError, match=f"the learner has {ranks} ranks"):
        job.commands()


# ------------------------------------------------------------------ a running step


def a_step(tmp_path: Path, script: str, tasks: int = 1) -> StepProcess:
    """Its srun is any process."""
    (tmp_path / "logs").mkdir()
    logs = tuple(tmp_path / "logs" / f"learner-7_{task}.log" for task in range(tasks))
    for log in logs:
        log.touch()
    command = StepCommand(
        name="learner", unit="learner", words=(sys.executable, "-c", script), log=logs[0],
        logs=logs, threads=1, final_mark=tmp_path / "final",
    )  # fmt: skip
    return StepProcess.start(command, 1, a_place())


def ended(step: StepProcess) -> int:
    while (code := step.exit_code()) is None:
        time.sleep(0.01)
    return code


def test_tasks_of_an_srun_that_was_killed_are_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else would: srun alone is gone, its tasks are not."""
    cancelled: list[list[str]] = []
    monkeypatch.setattr(slurm, "steps", lambda _job: [("7.0", "buffer"), ("7.3", "learner")])
    monkeypatch.setattr(slurm, "cancel", lambda jobs, **_: cancelled.append(list(jobs)))
    step = a_step(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert ended(step) == -9
    assert cancelled[0] == ["7.3"]


def test_a_final_mark_outweighs_sruns_exit_code(tmp_path: Path) -> None:
    step = a_step(tmp_path, "import sys; sys.exit(143)")
    step.command.final_mark.write_text("weights are of another model.\n")
    assert ended(step) == FINAL_EXIT
    assert step.cause() == "weights are of another model."


def test_a_new_attempt_forgets_the_mark_of_the_last(tmp_path: Path) -> None:
    (tmp_path / "final").write_text("old")
    assert ended(a_step(tmp_path, "import sys; sys.exit(1)")) == 1


def test_the_cause_is_that_of_the_rank_that_died_first(tmp_path: Path) -> None:
    step = a_step(tmp_path, "import sys; sys.exit(1)", tasks=3)
    first, second, third = step.command.logs
    third.write_text("12:00:01 CRITICAL learner-2: OutOfMemoryError: CUDA out of memory\n")
    time.sleep(0.02)
    first.write_text(
        "12:00:02 CRITICAL learner-0: PeerLost: another rank was restarted\n"
        "slurmstepd-n1: error: *** STEP 7.0 ON n1 CANCELLED AT 2026-11-21T21:18:56 ***\n"
    )
    second.write_text("12:00:02 INFO learner-1: step 3 of 8\n")
    ended(step)
    assert step.cause() == "OutOfMemoryError: CUDA out of memory"


def test_a_step_is_killed_through_srun_and_else_through_the_controller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dapo_hpc.launch.steps.KILL_S", 0.3)
    cancelled: list[list[str]] = []
    monkeypatch.setattr(slurm, "steps", lambda _job: [("7.3", "learner")])
    monkeypatch.setattr(slurm, "cancel", lambda jobs, **_: cancelled.append(list(jobs)))
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    step = a_step(tmp_path, deaf)
    time.sleep(0.3)
    step.wait_killed()
    assert step.srun.returncode == -9
    assert cancelled == [["7.3"]]


def test_a_share_that_is_alone_does_not_overlap() -> None:
    assert "--overlap" not in Share(gpus_per_node=1, is_alone=True).options()
    assert "--overlap" in Share().options()
    assert subprocess.list2cmdline(Share(gpus_per_node=1, is_alone=True).options()).endswith(
        "--gpus-per-node=1"
    )
