"""The learner's life: resume, publish, train step by step, hand over the model."""

from __future__ import annotations

import logging
import time

from dapo_hpc.learner.session import AskedToLeave, Session
from dapo_hpc.learner.step import rollout_step

log = logging.getLogger(__name__)

DONE = b"done"
EVALUATION_POLL_S = 0.5


def train(session: Session) -> None:
    """Train until run.total_steps, then write the model and finish the run.

    When asked to leave: until the end of the step under way, with a checkpoint of it.
    """
    total = session.config.run.total_steps
    done = session.resume()
    session.publish(done)
    try:
        for step in range(done + 1, total + 1):
            began_s = time.monotonic()
            figures = rollout_step(session, step)
            done = step
            log.info(
                "step %d of %d: accuracy %.3f, entropy %.3f, %.1f s.",
                step,
                total,
                figures["train/accuracy"],
                figures["learner/entropy"],
                time.monotonic() - began_s,
            )
        finish(session)
    except AskedToLeave:
        session.checkpoint_before_leaving(done)
        log.info("asked to leave; the checkpoint of step %d is written.", done)


def finish(session: Session) -> None:
    """After the last step: wait for evaluations, write the model, end the run."""
    here = session.processes
    if here.rank == 0:
        await_evaluations(session)
        here.announce(DONE)
    else:
        session.hear()
    session.export(session.run.model)
    if here.rank == 0:
        session.buffer.finish(session.lineage)
        total = session.config.run.total_steps
        log.info("all %d steps are trained; the model is in %s.", total, session.run.model)


def await_evaluations(session: Session) -> None:
    """Wait until no evaluation is under way. Raises AskedToLeave."""
    while session.record_evaluations():
        session.leave_if_asked()
        session.processes.check_peers()
        time.sleep(EVALUATION_POLL_S)
