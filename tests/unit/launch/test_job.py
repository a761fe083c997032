"""The supervisor of a job with real processes: small scripts stand in for the roles, a FakeSrun and
a FakeSlurm for Slurm. tests/slurm has the real ones."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dapo_hpc.launch import fleet, hand_over, job, lives, slurm
from dapo_hpc.launch.job import run_job, wait_for_run
from dapo_hpc.launch.lives import Kind, LifeRecord, read_lives
from dapo_hpc.run_dir import RunDir
from tests.unit.launch import fake_slurm, fake_srun
from tests.unit.launch.fake_slurm import FakeJob, FakeSlurm
from tests.unit.launch.submitted_run import make_run, make_site

STAND_IN = """
    import os, pathlib, signal, sys, time
    here, words = pathlib.Path(sys.argv[1]), sys.argv[4:]
    role = sys.argv[4]
    given = dict(word[2:].partition("=")[::2] for word in words[1:])
    run = pathlib.Path(words[words.index("--run") + 1])

    def note(text):
        with open(here / "events", "a") as file:
            file.write(f"{role} {text}\\n")

    def leave(*_):
        time.sleep(0.2)
        note("left")
        os._exit(0)

    signal.signal(signal.SIGUSR2, leave)
    note("up")
    exec((here / role).read_text())
    time.sleep(60)
"""
"""Called as `python stand_in.py DIRECTORY dapo role NAME --run RUN ...`."""
COMPLETE = "time.sleep(0.5); (run / 'model').mkdir(); sys.exit(0)"
STAY = "pass"


@dataclass
class World:
    """A run whose roles are scripts, in a job of a FakeSlurm."""

    directory: Path
    slurm: FakeSlurm
    site: dict[str, Any] = field(default_factory=dict)
    actors: int = 1

    def __post_init__(self) -> None:
        stand_in = self.directory / "stand_in.py"
        stand_in.write_text(textwrap.dedent(STAND_IN))
        prefix = [sys.executable, str(stand_in), str(self.directory)]
        handover = {"before_s": 60, "drain_s": 5, **self.site.pop("handover", {})}
        site = make_site(environment={"prefix": prefix}, handover=handover, **self.site)
        self.run = make_run(self.directory, site, actors=self.actors)
        self.run.logs.mkdir()
        self.run.train_prompts.parent.mkdir()
        self.run.train_prompts.touch()
        for role in ("buffer", "learner", "actor"):
            self.let(role, STAY)

    def let(self, role: str, script: str) -> None:
        (self.directory / role).write_text(textwrap.dedent(script))

    def events(self) -> list[str]:
        path = self.directory / "events"
        return path.read_text().split("\n")[:-1] if path.exists() else []

    def start(self, kind: Kind) -> int:
        return run_job(kind, run=self.run.root, config=None, site=None)

    def life(self) -> LifeRecord:
        return read_lives(self.run)[-1]

    def when(self, condition: Callable[[], bool], act: Callable[[], object]) -> None:
        """Beside the supervisor, which has the main thread."""

        def wait() -> None:
            while not condition():
                time.sleep(0.05)
            act()

        threading.Thread(target=wait, daemon=True).start()

    def are_up(self, *roles: str) -> Callable[[], bool]:
        return lambda: all(f"{role} up" in self.events() for role in roles)


MakeWorld = Callable[..., World]


@pytest.fixture
def make_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeWorld]:
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "4")
    monkeypatch.setattr(job, "WATCH_EVERY_S", 0.1)
    monkeypatch.setattr(fleet, "FINISH_S", 1.0)
    monkeypatch.setattr(job, "FINISH_S", 1.0)
    monkeypatch.setattr(hand_over, "KILLED_WITHIN_S", 1.0)
    fake_srun.install(tmp_path / "bin", monkeypatch)
    running = FakeJob(41, None, None, "some_run.learner", "", "", "", state="RUNNING")
    fake = fake_slurm.install(FakeSlurm(jobs=[running]), monkeypatch)
    monkeypatch.setattr(slurm, "hosts", lambda _nodes: ["n1"])
    monkeypatch.setattr(slurm, "steps", lambda _job: [])

    def make(**changes: Any) -> World:
        return World(tmp_path, fake, **changes)

    yield make
    for handler in list(logging.getLogger().handlers):  # it writes to what this test captured
        logging.getLogger().removeHandler(handler)


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.splitlines()[-1]


def calls(world: World, command: str) -> list[list[str]]:
    return [words for words in world.slurm.calls if words[:2] == command.split()]


def test_the_end_of_the_run_ends_the_job(make_world: MakeWorld) -> None:
    world = make_world()
    world.let("learner", COMPLETE)
    assert world.start("learner") == 0
    assert world.life().phase == "complete"
    assert world.events()[-1] == "buffer left"
    assert not calls(world, "scontrol requeue")


def test_told_to_stop_all_leave_in_order_and_the_job_exits_0(make_world: MakeWorld) -> None:
    world = make_world(actors=2)
    world.when(world.are_up("buffer", "learner", "actor"), lambda: lives.request_stop(world.run))
    assert world.start("train") == 0
    assert world.life().phase == "stopped"
    left = [event for event in world.events() if event.endswith("left")]
    assert left == ["actor left", "actor left", "learner left", "buffer left"]
    assert not calls(world, "scontrol requeue")


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_at_a_signal_of_slurm_it_gives_way_and_is_requeued(
    number: signal.Signals, make_world: MakeWorld
) -> None:
    world = make_world()
    world.when(world.are_up("buffer", "learner"), lambda: os.kill(os.getpid(), number))
    seen: list[str] = []
    real = world.slurm.run

    def run(words: Any, **given: Any) -> Any:
        if words[:2] == ["scontrol", "requeue"]:
            seen.extend(world.events())
            seen.append(world.life().phase)
        return real(words, **given)

    slurm.subprocess.run = run  # the FakeSlurm's place
    assert world.start("learner") == 1, "nobody killed it, which is an error"
    assert calls(world, "scontrol requeue") == [["scontrol", "requeue", "41"]]
    assert seen[-3:] == ["learner left", "buffer left", "handed_over"], "the roles left before"


def test_roles_that_somebody_else_asked_to_leave_mean_that_the_job_gives_way(
    make_world: MakeWorld,
) -> None:
    """As at preemption without a signal to the batch shell: Slurm asks the steps alone."""
    world = make_world()
    world.let("learner", "time.sleep(0.5); sys.exit(0)")
    world.start("learner")
    assert calls(world, "scontrol requeue")
    assert "asked to leave by somebody else" in world.life().cause or world.life().phase == "failed"
    assert world.events().count("learner up") == 1


def test_a_cancelled_job_does_not_come_back(make_world: MakeWorld) -> None:
    world = make_world()
    world.slurm.jobs[0].state = "COMPLETING"
    world.when(world.are_up("learner"), lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert world.start("learner") == 0
    assert not calls(world, "scontrol requeue")
    assert "Slurm is ending the job" in world.life().cause


def test_with_successors_it_exits_and_one_of_them_takes_over(make_world: MakeWorld) -> None:
    world = make_world(site={"successors": 2})
    world.when(world.are_up("learner"), lambda: os.kill(os.getpid(), signal.SIGUSR2))
    assert world.start("learner") == 0
    assert world.life().phase == "handed_over"
    assert not calls(world, "scontrol requeue")


def test_a_requeue_that_is_refused_is_an_error_with_a_sentence(
    make_world: MakeWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    world = make_world()
    real = world.slurm.run

    def run(words: Any, **given: Any) -> Any:
        if words[:2] == ["scontrol", "requeue"]:
            return fake_slurm._answer(1, "Requested operation is presently disabled for job 41")
        return real(words, **given)

    slurm.subprocess.run = run  # the FakeSlurm's place
    world.when(world.are_up("learner"), lambda: os.kill(os.getpid(), signal.SIGUSR2))
    assert world.start("learner") == 1
    assert world.life().phase == "failed"
    assert "presently disabled" in world.life().cause
    assert "dapo submit" in last_line(capsys)


def test_a_dead_step_is_started_again_under_a_line_in_its_log(make_world: MakeWorld) -> None:
    world = make_world()
    world.let("learner", "sys.exit(7) if len(here.joinpath('events').read_text()) < 25 else None\n")
    script = f"""
        died = here / "died"
        if not died.exists():
            died.touch()
            print("12:00:00 CRITICAL learner-0: weights are torn.", flush=True)
            sys.exit(7)
        {COMPLETE}
    """
    world.let("learner", script)
    assert world.start("learner") == 0
    lines = (world.run.logs / "learner-41_0.log").read_text().split("\n")
    assert lines[0].startswith("=== learner, job 41, start 1, attempt 1")
    assert any(line.startswith("=== learner, job 41, start 1, attempt 2") for line in lines)


def test_a_final_refusal_is_known_though_another_rank_has_a_higher_code(
    make_world: MakeWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 1 is ended by srun because of rank 0, with 143."""
    world = make_world()
    world.run.config.write_text(
        world.run.config.read_text().replace("data_parallel = 1", "data_parallel = 2")
    )
    refuses = """
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if os.environ["SLURM_PROCID"] == "0":
            time.sleep(0.5)
            pathlib.Path(given["final-mark"]).write_text("checkpoints are torn; restore one.\\n")
            sys.exit(3)
    """
    world.let("learner", refuses)
    assert world.start("learner") == 1
    assert world.events().count("learner up") == 2, "two ranks, one start"
    assert "checkpoints are torn; restore one." in last_line(capsys)
    assert "another start would end the same way" in world.life().cause


def test_starts_without_a_further_step_end_the_run(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    world = make_world(site={"successors": 1})  # so that giving way is quick
    world.when(world.are_up("learner"), lambda: None)
    world.let("learner", "sys.exit(0)")
    limit = 5
    for start in range(limit):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(start))
        assert world.start("learner") == 0
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(limit))
    assert world.start("learner") == 1
    assert world.life().phase == "failed"
    assert "launch.max_job_starts" in last_line(capsys)
    assert world.events().count("learner up") == limit, "the last start started nothing"
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    assert world.start("learner") == 0, "a person who submits again gets all attempts again"


def test_actors_without_work_give_their_job_back(make_world: MakeWorld) -> None:
    world = make_world(site={"per_job": 2}, actors=2)
    world.let("actor", "time.sleep(0.2 if given['index'] == '0' else 0.8); sys.exit(4)")
    assert world.start("actors") == 0
    assert world.life().phase == "idle"
    assert world.events() == ["actor up"] * 2


def test_an_element_above_the_target_drains(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world(actors=3)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "40")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    world.when(world.are_up("actor"), lambda: lives.set_target(world.run, 2))
    assert world.start("actors") == 0
    assert world.life().phase == "stopped"
    assert "2 actors" in world.life().cause
    assert world.events() == ["actor up", "actor left"]
    assert (world.run.logs / "actor-40_2.log").exists()


def test_actors_leave_a_run_that_is_complete(make_world: MakeWorld) -> None:
    world = make_world()
    world.when(world.are_up("actor"), lambda: world.run.model.mkdir())
    assert world.start("actors") == 0
    assert world.life().phase == "complete"


def test_a_run_that_never_appears_is_told(tmp_path: Path) -> None:
    clock = iter(range(0, 10**6, 100))
    with pytest.raises(ValueError, match=r"there is no run in .*appeared within 600 s"):
        wait_for_run(tmp_path / "none", sleep=lambda _s: None, clock=lambda: float(next(clock)))


def test_outside_slurm_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(ValueError, match="SLURM_JOB_ID is not set"):
        run_job("learner", run=tmp_path, config=None, site=None)


def test_two_jobs_that_make_the_run_at_once_make_it_once(
    make_world: MakeWorld, tmp_path: Path
) -> None:
    from dapo_hpc.config import load

    world = make_world()
    config = load(world.run.config)
    source = tmp_path / "source.toml"
    source.write_text(world.run.config.read_text())
    section = config.run.model_copy(update={"name": "other"})
    config = config.model_copy(update={"run": section})
    made = []

    def make() -> None:
        made.append(job.make_run(config, source))

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 4
    assert len({(run.root, str(kept)) for run, kept in made}) == 1
    run: RunDir = made[0][0]
    assert not [path for path in run.root.iterdir() if path.name.startswith(".config")]
    assert json.loads(run.env.read_text())["kind"] == "train"
