"""Which steps a job consists of, and which part of its nodes each takes. Rules only.

learner   every rank, and the buffer beside them on the first node
actors    one step for each engine
train     the learner on the first nodes, engines on what is left
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dapo_hpc.config import RunConfig
from dapo_hpc.launch.jobs import ranks_per_node, world_size
from dapo_hpc.launch.lives import Kind, Place
from dapo_hpc.launch.site import Site
from dapo_hpc.launch.steps import Share, StepCommand, step_command
from dapo_hpc.run_dir import RunDir

BUFFER, LEARNER, PROMPTS = "buffer", "learner", "prompts"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a job is to run, and where it is."""

    kind: Kind
    run: RunDir
    config: RunConfig
    site: Site
    place: Place

    @property
    def actor_indices(self) -> range:
        """Of this job's actors; every element of the array has as many."""
        if self.kind == "train":
            return range(self.config.rollout.num_actors)
        per_job = self.site.actors.actors_per_job
        first = self.place.task * per_job
        return range(first, first + per_job) if self.kind == "actors" else range(0)

    @property
    def actor_names(self) -> frozenset[str]:
        return frozenset(f"actor-{index}" for index in self.actor_indices)

    @property
    def has_learner(self) -> bool:
        return self.kind in ("train", "learner")

    @property
    def has_buffer(self) -> bool:
        """In a job of its own it is for others."""
        beside_learner = self.kind == "learner" and self.site.buffer is None
        return beside_learner or self.kind in ("train", "buffer")

    def commands(self) -> list[StepCommand]:
        """The steps. Raises ValueError when they do not fit into the allocation."""
        learner, actors = _shares(self)
        commands = list(_buffer_commands(self)) if self.has_buffer else []
        if learner is not None:
            commands.append(_learner_command(self, learner))
        pairs = zip(self.actor_indices, actors, strict=True)
        return [*commands, *(_actor_command(self, index, share) for index, share in pairs)]


# ------------------------------------------------------------------ who gets what


def _shares(job: Job) -> tuple[Share | None, Sequence[Share]]:
    learner = _learner_share(job) if job.has_learner else None
    split = _on_gpus if job.place.gpus_on_node else _on_processors
    return learner, list(split(job, learner))


def _learner_share(job: Job) -> Share:
    world, place = world_size(job.config), job.place
    if job.kind == "learner":
        ranks = world // place.num_nodes
        fits = ranks * place.num_nodes == world
    else:
        ranks = min(place.gpus_on_node or world, ranks_per_node(job.config, job.site))
        fits = world % ranks == 0 and world // ranks <= place.num_nodes
    if not fits or (place.gpus_on_node and ranks > place.gpus_on_node):
        raise ValueError(
            f"the learner has {world} ranks, which cannot be spread evenly over {place.num_nodes} "
            f"nodes with {place.gpus_on_node or 'no'} GPUs each. Change --nodes or --gpus-per-node "
            "in the batch script, or the layout in [learner] of the config."
        )
    cores = place.cpus_on_node
    if place.gpus_on_node and job.kind == "train":
        cores = cores * ranks // place.gpus_on_node
    return Share(
        nodes=world // ranks,
        tasks_per_node=ranks,
        cpus_per_task=max(1, cores // ranks),
        gpus_per_node=ranks if place.gpus_on_node else 0,
        is_alone=bool(place.gpus_on_node),
    )


def _on_gpus(job: Job, learner: Share | None) -> Iterator[Share]:
    """Engines fill what the learner leaves, node by node; none spans two."""
    place, wanted = job.place, job.config.rollout.tensor_parallel
    free = [place.gpus_on_node] * place.num_nodes
    if learner is not None:
        taken = [learner.gpus_per_node] * learner.nodes
        free[: learner.nodes] = [gpus - used for gpus, used in zip(free, taken, strict=False)]
    for index in job.actor_indices:
        node = next((node for node, gpus in enumerate(free) if gpus >= wanted), None)
        if node is None:
            raise ValueError(
                f"there is no place for actor {index}: each engine needs {wanted} GPUs of one node "
                f"(rollout.tensor_parallel), and the job has {place.num_nodes} nodes of "
                f"{place.gpus_on_node} with {free} left. Ask for more nodes in the batch script, "
                "or lower rollout.num_actors."
            )
        free[node] -= wanted
        yield Share(
            first_node=node,
            cpus_per_task=max(1, place.cpus_on_node * wanted // place.gpus_on_node),
            gpus_per_node=wanted,
            is_alone=True,
        )


def _on_processors(job: Job, learner: Share | None) -> Iterator[Share]:
    """Engines go round the nodes without a learner, or share its node when there is no other.
    Steps share cores: the operating system divides them better than we could."""
    first = learner.nodes if learner else 0
    nodes = list(range(first, job.place.num_nodes)) or [0]
    on_each = max(1, -(-len(job.actor_indices) // len(nodes)))
    cores = max(1, job.place.cpus_on_node // on_each)
    for place, _ in enumerate(job.actor_indices):
        yield Share(first_node=nodes[place % len(nodes)], cpus_per_task=cores)


# ------------------------------------------------------------------ their commands


def _buffer_commands(job: Job) -> Iterator[StepCommand]:
    """The buffer; before it, once in a run, the preparation of its prompts."""
    after = ""
    if not job.run.train_prompts.exists():
        after = PROMPTS
        yield _command(job, PROMPTS, PROMPTS, Share(cpus_per_task=1), ())
    network = job.site.network
    words = _interface(job)
    if network.port_range:
        words += (f"--ports={network.port_range[0]}-{network.port_range[1]}",)
    yield _command(job, BUFFER, BUFFER, Share(cpus_per_task=1), words, after=after)


def _learner_command(job: Job, share: Share) -> StepCommand:
    words = ("--from-slurm", *_interface(job))
    return _command(
        job, LEARNER, LEARNER, share, words, log_task="%t", threads=job.config.learner.threads
    )


def _actor_command(job: Job, index: int, share: Share) -> StepCommand:
    words: tuple[str, ...] = (f"--index={index}",)
    if job.kind == "actors":
        words += (f"--idle-exit-s={job.site.actors.idle_exit_s:g}",)
    threads = job.config.rollout.threads
    name = f"actor-{index}"
    return _command(job, name, "actor", share, words, log_task=str(index), threads=threads)


def _interface(job: Job) -> tuple[str, ...]:
    interface = job.site.network.interface
    return (f"--interface={interface}",) if interface else ()


def _command(
    job: Job,
    name: str,
    role: str,
    share: Share,
    words: tuple[str, ...],
    *,
    log_task: str = "0",
    threads: int = 1,
    after: str = "",
) -> StepCommand:
    return step_command(
        name=name,
        role=role,
        share=share,
        run_root=job.run.root,
        arguments=words,
        prefix=job.site.environment.prefix,
        log=f"{role}-{job.place.log_id}_{log_task}.log",
        threads=threads,
        after=after,
    )
