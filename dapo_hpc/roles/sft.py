"""Supervised fine-tuning: makes the model that reinforcement learning starts from."""

from __future__ import annotations

from dapo_hpc.config import RunConfig
from dapo_hpc.rank import Rank
from dapo_hpc.roles import startup
from dapo_hpc.run_dir import RunDir


def main(run: RunDir, config: RunConfig, rank: Rank) -> int:
    """Run one rank of supervised fine-tuning until model.path is written, or until SIGTERM.

    At SIGTERM it leaves at once; the next start resumes from the newest checkpoint.
    """
    startup.leave_at_once_when_asked()
    startup.silence_megatron()
    with startup.quick_start():
        from dapo_hpc.learner.parallel import Layout, connect
        from dapo_hpc.learner.sft import fine_tune

    section = config.learner
    layout = Layout.of(section)
    layout.require_world(rank.world)
    here = connect(layout, rank.rank, run.root / "sft.json", threads=section.threads)
    fine_tune(run, config, here)
    return 0
