"""The learner: trains the policy with Megatron-Core on the batches the buffer closes."""

from __future__ import annotations

from dapo_hpc.config import RunConfig
from dapo_hpc.roles import startup
from dapo_hpc.run_dir import RunDir


def main(run: RunDir, config: RunConfig, rank: int, world: int) -> int:
    """Run one rank of the learner until the run is complete, or until SIGTERM.

    At SIGTERM it leaves at once: the next start resumes from the newest checkpoint and is given
    the same batches again.
    """
    startup.leave_at_once_when_asked()
    startup.silence_megatron()
    with startup.quick_start():
        from dapo_hpc.buffer.client import BufferClient
        from dapo_hpc.learner.parallel import Layout, connect
        from dapo_hpc.learner.session import open_session
        from dapo_hpc.learner.train import train

    section = config.learner
    layout = Layout.of(section)
    layout.require_world(world)
    here = connect(layout, rank, run.root / "learner.json", threads=section.threads)
    buffer = BufferClient(run, request_timeout_s=config.buffer.request_timeout_s)
    train(open_session(run, config, here, buffer))
    buffer.close()
    return 0
