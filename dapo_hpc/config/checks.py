"""What bounds on single fields cannot see."""

from __future__ import annotations

from dapo_hpc.config.frozen import Frozen
from dapo_hpc.config.sections import LearnerSection, RunConfig


def cross_checks(config: RunConfig) -> list[str]:
    """What single-field bounds cannot see."""
    rollout, reward, learner = config.rollout, config.reward, config.learner
    found: list[str] = []
    if config.eval.every and config.prompts.eval is None:
        found.append(
            f"eval.every = {config.eval.every} needs held-out prompts, but prompts.eval is not "
            "set. Set prompts.eval to a parquet file, or eval.every to 0."
        )
    if config.model.imported is not None and config.sft is not None:
        found.append(
            f"model.imported = {config.model.imported!r}, but there is an [sft] section: what dapo "
            "sft writes to model.path would not be trained on. Leave one of them out."
        )
    if reward.overlong_punishment and reward.overlong_cache_tokens > rollout.max_response_tokens:
        found.append(
            f"reward.overlong_cache_tokens = {reward.overlong_cache_tokens} is longer than "
            f"rollout.max_response_tokens = {rollout.max_response_tokens}: every response would be "
            "punished. Make it smaller, or set reward.overlong_punishment to false."
        )
    if learner.mini_batches > rollout.prompts_per_step:
        found.append(
            f"learner.mini_batches = {learner.mini_batches} is more than rollout.prompts_per_step "
            f"= {rollout.prompts_per_step}: groups are never torn apart, so a mini-batch would be "
            "empty. Lower learner.mini_batches."
        )
    if learner.sequence_parallel and learner.tensor_parallel == 1:
        found.append(
            "learner.sequence_parallel is true but learner.tensor_parallel is 1: there is nothing "
            "to split. Raise learner.tensor_parallel, or set learner.sequence_parallel to false."
        )
    found += _learning_rate(config) + _learner(learner)
    if config.buffer.heartbeat_s * 3 > config.buffer.lease_s:
        found.append(
            f"buffer.heartbeat_s = {config.buffer.heartbeat_s} is more than a third of "
            f"buffer.lease_s = {config.buffer.lease_s}: one lost heartbeat would end a lease. "
            "Lower buffer.heartbeat_s, or raise buffer.lease_s."
        )
    if 0 < config.loss.dual_clip <= 1:
        found.append(
            f"loss.dual_clip = {config.loss.dual_clip} would bound the loss below -A itself; "
            "expected 0 (off) or more than 1, as in verl's 10.0."
        )
    if config.loss.mismatch_stop < config.loss.mismatch_warn:
        found.append(
            f"loss.mismatch_stop = {config.loss.mismatch_stop} is below loss.mismatch_warn = "
            f"{config.loss.mismatch_warn}: the run would stop before it warns. Raise "
            "loss.mismatch_stop."
        )
    if rollout.max_sequences < rollout.group_size:
        found.append(
            f"rollout.max_sequences = {rollout.max_sequences} is less than rollout.group_size = "
            f"{rollout.group_size}: an engine could not hold one group. Raise "
            "rollout.max_sequences."
        )
    return found


def _learning_rate(config: RunConfig) -> list[str]:
    optimizer, total = config.optimizer, config.run.total_steps
    found: list[str] = []
    if optimizer.schedule == "constant" and optimizer.min_lr_frac:
        found.append(
            f"optimizer.min_lr_frac = {optimizer.min_lr_frac} has no meaning while "
            'optimizer.schedule is "constant". Set optimizer.schedule to "cosine" or "linear", or '
            "leave optimizer.min_lr_frac out."
        )
    highest = optimizer.warmup_steps + 1 - optimizer.first_warmup_step
    if optimizer.schedule != "constant" and optimizer.warmup_steps and highest >= total:
        found.append(
            f'optimizer.schedule = "{optimizer.schedule}" falls from the end of the warm-up, step '
            f"{highest}, to run.total_steps = {total}: nothing is left to fall over. Lower "
            "optimizer.warmup_steps."
        )
    return found


def _learner(learner: LearnerSection) -> list[str]:
    found: list[str] = []
    replicas = learner.data_parallel * learner.context_parallel
    if replicas % learner.expert_parallel:
        found.append(
            f"learner.expert_parallel = {learner.expert_parallel} does not divide "
            f"learner.data_parallel * learner.context_parallel = {replicas}, whose ranks share the "
            "experts. Set it to a divisor."
        )
    try:
        Frozen.of(learner.freeze)
    except ValueError as problem:
        found.append(str(problem))
    return found
