"""`python3 -m slurm.mini VERB`: see `--help`."""

from __future__ import annotations

import argparse
import subprocess
import sys

from slurm.mini import cluster, shape
from slurm.mini.daemons import client
from slurm.mini.processes import stamp
from slurm.mini.shape import MiniRefused, Place, Shape

NODE_VERBS = {
    "crash": "power loss: every process of the node is gone at once",
    "revive": "boot a crashed node and take it back into service",
    "cut": "take the node off the network; its processes stay (root form)",
    "mend": "put it back on the network (root form)",
    "killd": "kill the node's slurmd; its jobs go on",
    "startd": "start the node's slurmd again",
}


def main() -> int:
    args = parser().parse_args()
    try:
        return int(act(args, shape.place(args.name)))
    except MiniRefused as refusal:
        print(f"mini cluster: {refusal}", file=sys.stderr)
        return 1


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python3 -m slurm.mini", description=__doc__)
    top.add_argument("--name", default="mini", help="which cluster, where there are several")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="verb")
    _add_up(verbs.add_parser("up", help="start it; removes what a dead one of this name left"))
    verbs.add_parser("down", help="kill and remove everything of it, also of a dead one")
    verbs.add_parser("env", help='print what a shell needs: eval "$(... env)"')
    verbs.add_parser("status", help="controller, nodes, jobs")
    for verb, text in NODE_VERBS.items():
        verbs.add_parser(verb, help=text).add_argument("node")
    verbs.add_parser("killctld", help="SIGKILL to slurmctld; running jobs go on")
    verbs.add_parser("startctld", help="start slurmctld again")
    run = verbs.add_parser("exec", help="run a command on a node (root form: in its namespaces)")
    run.add_argument("node")
    run.add_argument("words", nargs=argparse.REMAINDER, metavar="command")
    return top


def _add_up(up: argparse.ArgumentParser) -> None:
    up.add_argument("--form", choices=["user", "root"], default="user")
    up.add_argument("--nodes", type=int, default=4)
    up.add_argument("--cpus", type=int, default=64, help="of each node, as Slurm believes")
    up.add_argument("--memory-mib", type=int, default=1_000_000, help="of each node, likewise")
    up.add_argument("--gpus", type=int, default=8, help="fake ones of each node")
    up.add_argument("--gpu-type", default="fake")
    up.add_argument("--grace", type=int, default=2, help="GraceTime of partition rollout, seconds")
    up.add_argument("--preempt-mode", choices=["REQUEUE", "CANCEL"], default="REQUEUE")
    up.add_argument(
        "--user-signal",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="preemption sends the job's own --signal at once (preempt_send_user_signal)",
    )
    up.add_argument(
        "--accounting",
        action=argparse.BooleanOptionalAction,
        help="slurmdbd with MariaDB, so that sacct works (default: in the root form)",
    )
    up.add_argument(
        "--owner", type=int, metavar="PID", help="the cluster may be removed once PID is gone"
    )


def act(args: argparse.Namespace, place: Place) -> int:
    if args.verb == "up":
        cluster.up(place, _shape(args), stamp(args.owner) if args.owner else None)
        print(f"{args.nodes} nodes are idle. Then: export SLURM_CONF={place.conf}")
    elif args.verb == "down":
        cluster.sweep(place)
        cluster.down(place)
    elif args.verb == "env":
        cluster.running(place)
        print(f"export SLURM_CONF={place.conf}")
    elif args.verb == "status":
        cluster.running(place)
        for words in ("scontrol ping", "sinfo --Node --long", "squeue"):
            print(client(place, *words.split()).stdout, end="")
    elif args.verb == "killctld":
        cluster.kill_controller(place)
    elif args.verb == "startctld":
        cluster.revive_controller(place)
    elif args.verb == "exec":
        nodes = cluster.nodes_of(place, cluster.running(place))
        return subprocess.run([*nodes.inside(args.node), *args.words], check=False).returncode
    else:
        cluster.node_event(place, args.verb, args.node)
    return 0


def _shape(args: argparse.Namespace) -> Shape:
    accounting = args.form == "root" if args.accounting is None else args.accounting
    return Shape(
        form=args.form,
        nodes=args.nodes,
        cpus=args.cpus,
        memory_mib=args.memory_mib,
        gpus=args.gpus,
        gpu_type=args.gpu_type,
        grace_s=args.grace,
        preempt_mode=args.preempt_mode,
        user_signal=args.user_signal,
        accounting=accounting,
    )


if __name__ == "__main__":
    sys.exit(main())
