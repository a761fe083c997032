"""The batch script of a job: short, and the same whether `dapo submit` or a person submits it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence

from dapo_hpc.caches import CACHES
from dapo_hpc.launch.jobs import JobSpec, comment
from dapo_hpc.launch.site import Site


def script_text(spec: JobSpec, command: Sequence[str] | None = None) -> str:
    """The whole script.

    Args:
        spec: the job.
        command: words to run in place of `dapo job ...`, as submitit needs it.
    """
    lines = [
        # Only a login shell has `module`, since the function is not in the variables passed on.
        "#!/bin/bash -l" if spec.site.environment.modules else "#!/bin/bash",
        f"# {spec.title}",
        f"# Plain sbatch takes it too: mkdir -p {spec.run}/logs, since Slurm makes no directories.",
        *(f"#SBATCH {option}" for option in _options(spec)),
        "",
        # Without -u: many scripts of modules and conda use variables that are not set.
        "set -eo pipefail",
        # Ignored signals stay so across exec. A job that dies of one has failed, and Slurm requeues
        # no failed job; one that is killed at the end of its grace time comes back.
        f"trap '' {_early_signals(spec.site)}    # until dapo listens: a preemption may be early",
        'cd "$SLURM_SUBMIT_DIR"',
        *_environment(spec.site),
        f"exec {shlex.join(command or spec.words)}",
    ]
    return "\n".join(lines) + "\n"


def _early_signals(site: Site) -> str:
    return " ".join(dict.fromkeys((site.handover.signal, "TERM")))


def file_name(spec: JobSpec) -> str:
    """Of the script, in slurm/ and in RUN/jobs."""
    return f"{spec.kind}.sbatch"


def _options(spec: JobSpec) -> Iterator[str]:
    table, handover = spec.table, spec.site.handover
    yield f"--job-name={spec.name}"
    for name in ("partition", "account", "qos", "constraint", "exclude"):
        if value := getattr(table, name):
            yield f"--{name}={value}"
    yield f"--nodes={spec.nodes}"
    yield f"--ntasks-per-node={spec.tasks_per_node}"
    yield f"--cpus-per-task={spec.cpus_per_task}"
    if spec.gpus_per_node:
        of_type = f"{table.gpu_type}:" if table.gpu_type else ""
        yield f"--gpus-per-node={of_type}{spec.gpus_per_node}"
    yield f"--mem={spec.memory_gib}G" if spec.memory_gib else "--mem=0"
    if table.exclusive:
        yield "--exclusive"
    yield f"--time={table.time_limit}"
    if spec.elements:
        yield f"--array=0-{spec.elements - 1}"
    else:
        # Two learners, or two buffers, of one run never run at the same time.
        yield "--dependency=singleton"
    yield f"--signal=B:{handover.signal}@{handover.before_s}"
    yield "--requeue"
    yield "--open-mode=append"
    yield f"--output={spec.run}/logs/{spec.kind}-{'%A_%a' if spec.elements else '%j'}.log"
    yield f"--export={','.join(spec.site.environment.passed)}"
    yield f"--comment={comment(spec.run)}"
    yield from table.options


def _environment(site: Site) -> Iterator[str]:
    environment, network, storage = site.environment, site.network, site.storage
    if environment.modules:
        yield f"module load {shlex.join(environment.modules)}"
    yield from environment.lines
    for name, value in environment.variables.items():
        yield f"export {name}={shlex.quote(value)}"
    if network.interface:
        yield f"export NCCL_SOCKET_IFNAME={shlex.quote(network.interface)}"
        yield f"export GLOO_SOCKET_IFNAME={shlex.quote(network.interface)}"
    if storage.node_cache:
        for name, directory in CACHES.items():
            # Double quotes: $USER and $SLURM_JOB_ID are known on the node only.
            yield f'export {name}="{storage.node_cache}/{directory}"'
