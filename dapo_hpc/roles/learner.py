"""The learner: trains the policy with Megatron-Core on the batches the buffer closes."""

from __future__ import annotations

import signal

from dapo_hpc.config import RunConfig
from dapo_hpc.rank import Rank
from dapo_hpc.roles import startup
from dapo_hpc.run_dir import RunDir


def main(run: RunDir, config: RunConfig, rank: Rank, interface: str | None = None) -> int:
    """Run one rank of the learner until the run is complete, or until it is asked to leave.

    At SIGTERM it leaves at once: the next start resumes from the newest checkpoint and is given
    the same batches again. At SIGUSR2 it finishes its step and writes a checkpoint before.
    """
    startup.leave_at_once_when_asked()
    is_asked = startup.note_when_asked(signal.SIGUSR2)
    startup.silence_megatron()
    with startup.quick_start():
        from dapo_hpc.buffer.client import BufferClient
        from dapo_hpc.learner.parallel import Layout, connect
        from dapo_hpc.learner.session import open_session
        from dapo_hpc.learner.train import train

    section = config.learner
    layout = Layout.of(section)
    layout.require_world(rank.world)
    here = connect(
        layout,
        rank.rank,
        run.root / "learner.json",
        threads=section.threads,
        local_rank=rank.local,
        interface=interface,
    )
    buffer = BufferClient(run, request_timeout_s=config.buffer.request_timeout_s)
    train(open_session(run, config, here, buffer, is_asked_to_leave=is_asked))
    buffer.close()
    return 0
