"""How long does it take to fill a batch of informative groups, and what does it cost?

    python perf/sim_dispatch.py                # 4 to 1,000 engines, about 15 minutes
    python perf/sim_dispatch.py --small        # 4 engines, seconds

A simulation on a virtual clock: nothing here depends on the machine. Ours is the buffer's own core,
called as its actors and its learner call it; beside it what verl's and slime's scripts do, and two
oracles. Prints a table for each fleet and writes one JSON file. See perf/PROTOCOL.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench_demo import commit
from dispatch_sim import engines, workload
from dispatch_sim.policies import POLICIES, run
from dispatch_sim.report import rows_of, table


@dataclass(frozen=True)
class Size:
    """A fleet, the batch its user would ask for, and how much of it is simulated."""

    num_engines: int
    num_groups: int
    num_seeds: int
    num_steps: int
    """The first one has learned nothing yet and is reported apart."""


SIZES = (
    Size(4, 64, 6, 7),
    Size(16, 256, 4, 6),
    Size(64, 512, 3, 6),
    Size(1000, 512, 3, 4),
    Size(1000, 8192, 1, 4),
)
SMALL = (Size(4, 64, 2, 4),)


def measure(size: Size, policies: tuple[str, ...]) -> list[dict[str, Any]]:
    """The rows of one fleet."""
    results = {}
    for policy in policies:
        started_s = time.monotonic()
        results[policy] = [
            run(
                policy,
                num_engines=size.num_engines,
                num_groups=size.num_groups,
                seed=seed,
                num_steps=size.num_steps,
            )
            for seed in range(size.num_seeds)
        ]
        print(f"  {policy}: {time.monotonic() - started_s:.0f} s", file=sys.stderr, flush=True)
    return rows_of(results)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="one small fleet")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(words)
    sections = []
    for size in SMALL if options.small else SIZES:
        rows = measure(size, POLICIES)
        print(
            f"\n{size.num_engines} engines, {size.num_groups} groups\n\n{table(rows)}", flush=True
        )
        sections.append({"size": asdict(size), "rows": rows})
    path = options.output / f"{time.strftime('%Y-%m-%d')}_dispatch_{commit()}.json"
    options.output.mkdir(parents=True, exist_ok=True)
    assumed = {
        name: getattr(module, name)
        for module in (engines, workload)
        for name in vars(module)
        if name.isupper()
    }
    path.write_text(json.dumps({"assumed": assumed, "sizes": sections}, indent=1) + "\n")
    print(f"\n{path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
