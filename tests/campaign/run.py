"""`python -m tests.campaign.run`: one campaign, its scorecard, and exit code 1 for any fault."""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.buffer_process import make_run
from tests.campaign.checker import Evidence, Promise, Verdict, judge, recovery_s
from tests.campaign.killer import Campaign

GROUP_SIZE = 4
MAX_STALENESS = 4
LEASE_S = 3.0
NUM_PROMPTS = 2000


def main() -> int:
    options = _options()
    promise = Promise(
        group_size=GROUP_SIZE, batch_groups=options.batch, max_staleness=MAX_STALENESS
    )
    root = options.directory or Path(tempfile.mkdtemp(prefix="campaign-"))
    run = make_run(
        root,
        num_prompts=NUM_PROMPTS,
        run__total_steps=10**7,
        rollout__prompts_per_step=promise.batch_groups,
        rollout__group_size=promise.group_size,
        buffer__lease_s=LEASE_S,
        buffer__max_staleness=promise.max_staleness,
    )
    campaign = Campaign(
        run=run,
        seed=options.seed,
        num_actors=options.actors,
        num_groups=options.groups,
        num_kills=options.kills,
        batch_groups=promise.batch_groups,
        lease_s=LEASE_S,
        prelude=options.prelude,
        say=lambda line: print(line, flush=True),
    )
    began = time.monotonic()
    campaign.fight()
    verdict = judge(run.root, promise)
    card = scorecard(campaign, verdict, time.monotonic() - began)
    print("\n".join([f"{name:45} {value}" for name, value in card.items()]))
    print("\n".join(verdict.examples))
    if options.out:
        options.out.write_text(json.dumps(card, indent=2) + "\n")
    if not options.directory and not verdict.faults:
        shutil.rmtree(root)
    return 1 if verdict.faults else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="SIGKILLs, spread over the run")
    parser.add_argument("--groups", type=int, default=10_000, help="groups to train")
    parser.add_argument("--batch", type=int, default=32, help="groups in a training batch")
    parser.add_argument("--actors", type=int, default=8, help="sampling processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file for the scorecard, JSON")
    parser.add_argument("--directory", type=Path, help="where to work (default: a temporary one)")
    parser.add_argument("--prelude", default="", help="Python run by each buffer process first")
    return parser.parse_args()


def scorecard(campaign: Campaign, verdict: Verdict, seconds: float) -> dict[str, Any]:
    """Everything worth publishing; each entry of `faults` must be 0."""
    leased_at = Evidence.read(campaign.run.root / "history", Verdict()).leased_at
    recoveries = recovery_s(campaign.buffer_killed_at, leased_at)
    card: dict[str, Any] = {
        "seed": campaign.seed,
        "actors": campaign.num_actors,
        "seconds": round(seconds, 1),
        "SIGKILLs": sum(n for role, n in campaign.kills.items() if role != "replaced"),
        **{f"SIGKILLs of {role}": n for role, n in campaign.kills.items() if role != "replaced"},
        "buffers replaced while they slept": campaign.kills["replaced"],
        **{name: round(value, 3) for name, value in verdict.figures.items()},
        **{f"FAULT {name}": n for name, n in verdict.faults.items()},
        "faults": sum(verdict.faults.values()),
    }
    if len(recoveries) > 1:
        card["buffer killed to next lease, median s"] = round(statistics.median(recoveries), 2)
        p95 = statistics.quantiles(recoveries, n=20)[-1]
        card["buffer killed to next lease, p95 s"] = round(p95, 2)
    return card


if __name__ == "__main__":
    sys.exit(main())
