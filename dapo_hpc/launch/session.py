"""`dapo train`, `dapo sft` and `dapo eval` on this machine, from config to last sentence."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow.parquet as pq

from dapo_hpc.buffer.auth import create_auth
from dapo_hpc.config import ConfigProblems, RunConfig
from dapo_hpc.launch import local, prepare
from dapo_hpc.launch.local import COMPLETE, INTERRUPTED, StopRequest
from dapo_hpc.launch.process import RoleCommand
from dapo_hpc.observe import metrics, report
from dapo_hpc.observe.live import View, eval_text, make_view
from dapo_hpc.plan import make_plan, sft_phase
from dapo_hpc.run_dir import RunDir


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """A run directory held by this launcher, with what shows it and what stops it."""

    run: RunDir
    config: RunConfig
    view: View
    request: StopRequest
    row_kind: Literal["step", "sft"]
    """Of the rows of metrics.jsonl that count its progress."""

    def stage(
        self,
        commands: list[RoleCommand],
        leader: str,
        is_complete: Callable[[], bool],
    ) -> int:
        launch = self.config.launch
        return local.run_units(
            commands,
            leader=leader,
            is_complete=is_complete,
            step=lambda: metrics.newest_step(self.run.metrics, self.row_kind),
            max_restarts=launch.max_restarts,
            stop_s=launch.stop_s,
            view=self.view,
            request=self.request,
        )


def train(config: RunConfig, source: Path) -> int:
    """Start a new run of the config in the TOML file `source`. Returns the exit code."""
    plan = make_plan(config, source.parent)
    needed = ("model.path", "model.imported", "prompts.train", "prompts.eval")
    missing = prepare.missing_files(config, needed)
    _require_none(source, missing + plan.problems)
    return _train(*prepare.create_run(config, "train"))


def sft(config: RunConfig, source: Path) -> int:
    """Fine-tune sft.init on sft.pairs in the run directory `<name>-sft`; writes model.path."""
    if config.sft is None:
        raise ValueError("dapo sft needs an [sft] section; the config has none.")
    problems = prepare.missing_files(config, ("sft.init", "sft.pairs"))
    problems += make_plan(sft_phase(config), source.parent).learner_problems
    if _holds_model(Path(config.model.path)):
        problems.append(
            f"model.path = {config.model.path!r} is where dapo sft would write, but it holds a "
            "model already. Set model.path to another directory, or delete that one."
        )
    _require_none(source, problems)
    return _sft(*prepare.create_run(_renamed(config, "sft"), "sft"))


def evaluate(config: RunConfig, model: Path, source: Path) -> int:
    """Evaluate a Hugging Face directory on prompts.eval, in the run directory `<name>-eval`."""
    if config.prompts.eval is None:
        raise ValueError("dapo eval needs held-out prompts: set prompts.eval to a parquet file.")
    if not _holds_model(model):
        raise ValueError(f"--model {model} holds no safetensors files; expected a model directory.")
    section = config.model.model_copy(update={"path": str(model)})
    config = config.model_copy(update={"model": section})
    missing = prepare.missing_files(config, ("prompts.train", "prompts.eval"))
    _require_none(source, missing + make_plan(config, source.parent).engine_problems)
    return _evaluate(*prepare.create_run(_renamed(config, "eval"), "eval"))


def resume(root: Path, overrides: list[str], kind: Literal["train", "sft"]) -> int:
    """Go on with an existing run, in its own config. Returns the exit code."""
    if overrides:
        raise ValueError(
            f"--set cannot be used with --resume: a run keeps the config in {root}/config.toml."
        )
    run, config = prepare.open_run(root, kind)
    return _train(run, config) if kind == "train" else _sft(run, config)


def _require_none(source: Path, problems: list[str]) -> None:
    if problems:
        raise ConfigProblems(source.name, problems)


# ------------------------------------------------------------------ the three kinds


def _train(run: RunDir, config: RunConfig) -> int:
    if run.model.exists():
        print(f"The run is complete already. Model: {run.model}")
        return COMPLETE
    with _session(run, config, "step", config.run.total_steps) as session:
        _say_start(session)
        _ensure_auth(run)
        outcome = session.stage(local.train_commands(run, config), "learner", run.model.exists)
    return _end(session, outcome, "train", _train_summary)


def _sft(run: RunDir, config: RunConfig) -> int:
    assert config.sft is not None, "a run of `dapo sft` has an [sft] section"
    total_steps = pq.read_metadata(config.sft.pairs).num_rows // config.sft.batch_size
    with _session(run, config, "sft", total_steps) as session:
        _say_start(session)
        commands = local.rank_commands(run, config, "sft")
        outcome = session.stage(commands, "sft", lambda: _holds_model(Path(config.model.path)))
    return _end(session, outcome, "sft", _sft_summary)


def _evaluate(run: RunDir, config: RunConfig) -> int:
    with _session(run, config, "step", config.run.total_steps) as session:
        _say_start(session)
        _ensure_auth(run)
        commands = local.sampling_commands(run, config)
        commands.append(local.evaluate_command(run, Path(config.model.path)))
        outcome = session.stage(commands, "evaluate", lambda: any(run.eval.glob("*.json")))
    return _end(session, outcome, "eval", _eval_summary)


def _ensure_auth(run: RunDir) -> None:
    """Certificate and token, unless an earlier start made them."""
    if not run.auth.exists():
        create_auth(run)


@contextmanager
def _session(
    run: RunDir, config: RunConfig, kind: Literal["step", "sft"], total_steps: int
) -> Iterator[Session]:
    with prepare.lock_run(run), local.stop_requests() as request:
        view = make_view(run.metrics, kind=kind, total_steps=total_steps)
        try:
            yield Session(run=run, config=config, view=view, request=request, row_kind=kind)
        finally:
            view.close()


def _holds_model(directory: Path) -> bool:
    return any(directory.glob("*.safetensors"))


def _renamed(config: RunConfig, suffix: str) -> RunConfig:
    section = config.run.model_copy(update={"name": f"{config.run.name}-{suffix}"})
    return config.model_copy(update={"run": section})


# ------------------------------------------------------------------ sentences


def _say_start(session: Session) -> None:
    run = session.run
    session.view.say(f"run directory: {run.root}\n  from elsewhere: dapo status {run.root}")


def _end(session: Session, outcome: int, kind: str, summary: Callable[[Session], str]) -> int:
    root = session.run.root
    if outcome == COMPLETE:
        print(summary(session))
        return COMPLETE
    how = "Stopped." if outcome == INTERRUPTED else "The run stopped before its end."
    if kind != "eval":
        how += f" Nothing finished is lost; to go on: dapo {kind} --resume {root}"
    print(how, file=sys.stderr)
    return outcome


def _train_summary(session: Session) -> str:
    run = session.run
    evals = metrics.read(run.metrics, "eval")
    lines = [eval_text(evals[-1])] if evals else []
    return "\n".join(
        [
            f"Complete: {session.config.run.total_steps} steps.",
            *lines,
            f"picture: {report.draw(run)}",
            f"model:   {run.model}",
            f"to look again: dapo status {run.root}",
        ]
    )


def _sft_summary(session: Session) -> str:
    rows = metrics.read(session.run.metrics, "sft")
    loss = f" Last loss: {rows[-1]['sft/loss']:.4f} nats a token." if rows else ""
    return f"Complete.{loss}\nmodel: {session.config.model.path}"


def _eval_summary(session: Session) -> str:
    evals = metrics.read(session.run.metrics, "eval")
    settings = session.config.eval
    last = evals[-1]
    text = [
        f"held-out accuracy of {session.config.model.path}: {last['eval/accuracy']:.4f} "
        f"(mean of {settings.samples} samples, temperature {settings.temperature}, "
        f"top_p {settings.top_p})"
    ]
    if settings.samples > 1:
        text.append(f"prompts with a correct sample: {last['eval/pass_at_k']:.4f}")
    text += [f"  {source}: {accuracy:.4f}" for source, accuracy in _by_source(session.run)]
    return "\n".join(text)


def _by_source(run: RunDir) -> list[tuple[str, float]]:
    """Accuracy for each data source of the newest evaluation."""
    newest = max(run.eval.glob("*.json"))
    return list(json.loads(newest.read_text())["accuracy_by_source"].items())
