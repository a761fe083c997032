"""`python -m tests.slurm.chaos_run`: one run of fake roles, EVENTS faults on a mini cluster of its
own, one scorecard, and exit code 1 for any fault."""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from dapo_hpc.launch.submission import from_run, submit_scripts
from dapo_hpc.run_dir import RunDir
from tests.campaign.checker import Promise, Verdict, judge
from tests.slurm.chaos import LIMIT_S, Chaos
from tests.slurm.clusters import MiniCluster, wait_for
from tests.slurm.fake_roles import FINISH
from tests.slurm.fake_run import (
    BATCH_GROUPS,
    GROUP_SIZE,
    MAX_STALENESS,
    make_fake_run,
    write_fake_site,
)

PROMISE = Promise(group_size=GROUP_SIZE, batch_groups=BATCH_GROUPS, max_staleness=MAX_STALENESS)


def main() -> int:
    options = _options()
    directory = options.directory or Path(tempfile.mkdtemp(prefix="chaos-slurm-"))
    cluster = MiniCluster.start(f"chaos-{os.getpid()}", options.form)
    os.environ["SLURM_CONF"] = str(cluster.conf)
    began = time.monotonic()
    try:
        chaos, verdict = fight(
            cluster, directory, seed=options.seed, events=options.events, actors=options.actors
        )
    finally:
        cluster.stop()
    card = scorecard(chaos, verdict, time.monotonic() - began)
    print("\n".join([f"{name:45} {value}" for name, value in card.items()]))
    print("\n".join(verdict.examples))
    if options.out:
        options.out.write_text(json.dumps(card, indent=2) + "\n")
    if not options.directory and not verdict.faults:
        shutil.rmtree(directory)
    return 1 if verdict.faults else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--actors", type=int, default=3)
    parser.add_argument("--form", choices=["user", "root"], default="root")
    parser.add_argument("--out", type=Path, help="file for the scorecard, JSON")
    parser.add_argument("--directory", type=Path, help="where to work (default: a temporary one)")
    return parser.parse_args()


def fight(
    cluster: MiniCluster, directory: Path, *, seed: int, events: int, actors: int
) -> tuple[Chaos, Verdict]:
    """Submit the run, let the events happen, let it end well, and judge what was written down."""
    run = make_fake_run(directory, actors=actors, launch__max_job_starts=1000)
    site = write_fake_site(directory / "site.toml")
    print(submit_scripts(from_run(run.root, site)), flush=True)
    chaos = Chaos(
        cluster=cluster,
        run=run,
        num_actors=actors,
        draw=random.Random(seed),
        say=lambda line: print(line, flush=True),
    )
    chaos.fight(events)
    _end(cluster, run)
    return chaos, judge(run.root, PROMISE)


def _end(cluster: MiniCluster, run: RunDir) -> None:
    (run.root / FINISH).touch()
    wait_for(run.model.exists, within_s=LIMIT_S, what="the learner ended the run")
    wait_for(
        lambda: not cluster.run("squeue", "--noheader", "--me"),
        within_s=LIMIT_S,
        what=lambda: f"every job of the complete run ended:\n{cluster.run('squeue', '-r')}",
    )


def scorecard(chaos: Chaos, verdict: Verdict, seconds: float) -> dict[str, Any]:
    """Everything worth publishing; each entry of `faults` must be 0."""
    times = sorted(took for taken in chaos.recovery_s.values() for took in taken)
    card: dict[str, Any] = {
        "form of the cluster": chaos.cluster.form,
        "seconds": round(seconds, 1),
        "events": chaos.events.total(),
        **{f"events: {name}": count for name, count in sorted(chaos.events.items())},
        **{name: round(value, 3) for name, value in verdict.figures.items()},
        **{f"FAULT {name}": count for name, count in verdict.faults.items()},
        "faults": sum(verdict.faults.values()),
    }
    if len(times) > 1:
        card["event to whole again and training, median s"] = round(statistics.median(times), 1)
        card["event to whole again and training, p95 s"] = round(
            statistics.quantiles(times, n=20)[-1], 1
        )
    return card


if __name__ == "__main__":
    sys.exit(main())
