"""Every knob of a run, its bounds, its default and where the default comes from.

One class for each table of the TOML file, in the order of the flow.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A frozen table of the TOML file; keys it does not know are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class RunSection(Section):
    """Which run this is, and how long it lasts."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    """Names the run directory `<dir>/<name>`."""
    dir: str = "runs"
    """Where run directories lie; on a cluster, a file system that all nodes see."""
    total_steps: Positive
    """Trained rollout steps."""
    seed: NonNegative = 0
    """Seeds prompt order, mini-batch order and the engines."""
    deterministic: bool = False
    """Derive the seed of each response from (seed, prompt, index, attempt). Disables the engine's
    fast sampler on GPU."""


class ModelSection(Section):
    """The policy before the first step."""

    path: str
    """Hugging Face directory: config.json, tokenizer, safetensors."""
    imported: str | None = None
    """What `dapo import` made of it: the learner starts from these weights, and reads each rank's
    part in one piece. None: it reads model.path, as actors do."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of parameters and engine. The optimizer's state and main gradients are always float32."""


class PromptsSection(Section):
    """Data sets: parquet in the schema of DAPO-Math-17K (data_source, prompt, ability,
    reward_model.ground_truth, extra_info)."""

    train: str
    """Parquet file of the training prompts; duplicates are dropped and counted."""
    eval: str | None = None
    """Parquet file of held-out prompts; required when eval.every > 0."""
    max_tokens: Positive = 2048
    """Longer prompts are filtered, with a count. Source: verl's DAPO recipe."""
    chat_template: Literal["tokenizer", "none"] = "tokenizer"
    """'tokenizer': the tokenizer's own template. 'none': the contents of the messages, joined."""
    on_exhausted: Literal["next_pass", "smaller_batch", "wait"] = "next_pass"
    """What to do when every prompt of a pass is used: shuffle anew and go on; train what there is
    with the exact normaliser, then go on; or wait for a person."""


class RolloutSection(Section):
    """How responses are sampled."""

    prompts_per_step: Positive = 512
    """Informative groups in one train batch. Source: DAPO, section 4.1."""
    group_size: Annotated[int, Field(ge=2)] = 16
    """G, responses for each prompt. Source: DAPO, section 4.1."""
    max_response_tokens: Positive = 20480
    """Source: DAPO, section 4.1."""
    temperature: PositiveFloat = 1.0
    """Training divides its logits by the same value."""
    num_actors: Positive = 1
    """Actors the launcher starts; any number may join or leave."""
    tensor_parallel: Positive = 1
    """GPUs for each engine."""
    max_sequences: Positive = 256
    """Responses in one engine at a time."""
    max_batched_tokens: Positive | None = None
    """Tokens in one engine step; None: vLLM's own choice."""
    gpu_memory_frac: Fraction = 0.85
    """Share of GPU memory for one engine."""
    cpu_cache_gib: Positive = 1
    """Key-value cache of an engine on CPU."""
    threads: Positive = 1
    """OpenMP threads of an engine on CPU."""
    eager: bool = True
    """No CUDA graphs. verl reports possible harm from CUDA graphs in DAPO runs."""


class RewardSection(Section):
    """From a response to a number."""

    scorer: str = "math_dapo"
    """'math_dapo' (the paper's `Answer:` rule), or 'package.module:function' with the signature of
    dapo_hpc.reward.protocol.Scorer."""
    boxed_fallback: bool = False
    """math_dapo: accept \\boxed{} when there is no `Answer:`. Source: verl since 2025-06."""
    workers: Positive = 1
    """Scoring processes for each actor."""
    timeout_s: PositiveFloat = 10.0
    """A scorer that takes longer counts as wrong, and is counted."""
    overlong_punishment: bool = True
    """Soft punishment, added to the correctness reward. Source: DAPO, Eq. 13."""
    overlong_cache_tokens: Positive = 4096
    """Length of the linear slope before max_response_tokens. Source: DAPO, section 4.1."""


class BufferSection(Section):
    """The dynamic-sampling buffer."""

    dynamic_sampling: bool = True
    """Keep only groups with 0 < correct < G and refill. Source: DAPO, Eq. 11."""
    max_staleness: NonNegative = 0
    """Policy versions between sampling and training; 0 is the paper's synchronous run."""
    closing: Literal["dispatch_order", "first_finished"] = "dispatch_order"
    """Which informative groups make a batch: the first that were dispatched, or the first that
    finished. The latter saves up to 7 % of the time and trains responses that are up to 3 %
    shorter than those dispatched (`make bench-dispatch`; docs/buffer.md, "Dispatch")."""
    lease_s: PositiveFloat = 120.0
    """An actor silent for this long loses its leases."""
    heartbeat_s: PositiveFloat = 10.0
    """Between an actor's heartbeats; each carries the tokens sampled since the last."""
    max_attempts: Positive = 5
    """A prompt that fails this often is parked, counted and reported."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """0: any free port; the address is published in the run directory."""
    request_timeout_s: PositiveFloat = 10.0
    """Of every client request; a successor of a dead buffer waits longer than this."""


class AdvantageSection(Section):
    """Group-relative advantage. Source: DAPO, Eq. 9."""

    scale: Literal["std", "none"] = "std"
    """'none' leaves R - mean (Dr. GRPO, arXiv 2503.20783)."""
    ddof: Literal[0, 1] = 1
    """Source: verl (torch.std is unbiased). The paper does not say."""
    eps: NonNegativeFloat = 1e-6
    """Added to the standard deviation. Source: verl."""


class LossSection(Section):
    """The objective. Source: DAPO, Eq. 8."""

    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """epsilon_low."""
    clip_high: PositiveFloat = 0.28
    """epsilon_high."""
    dual_clip: NonNegativeFloat = 0.0
    """Bound on the loss of a token with negative advantage, -A * dual_clip; 0: none, else above 1.
    Source: verl."""
    normalization: Literal["global_tokens", "per_prompt", "per_sequence", "per_sequence_const"] = (
        "global_tokens"
    )
    """The denominator, written out in dapo_hpc.learner.packing.token_weights."""
    importance_sampling: Literal["token", "off"] = "token"
    """Truncated weight min(exp(old - rollout), cap) for each token; corrects for the difference
    between engine and learner. Source: Yao et al., truncated importance sampling."""
    importance_cap: PositiveFloat = 2.0
    """Source: verl and slime."""
    overlong_filtering: bool = False
    """Mask the responses that were cut at the limit. The paper's best run is without it."""
    kl_coef: NonNegativeFloat = 0.0
    """Weight of the KL to the starting model (k3 estimator); DAPO has none."""
    mismatch_warn: PositiveFloat = 0.05
    """Mean |learner - engine| log-prob (nats) from which each step warns."""
    mismatch_stop: PositiveFloat = 1.0
    """The same, from which the run stops: engine and learner no longer hold the same policy."""


class OptimizerSection(Section):
    """AdamW."""

    lr: PositiveFloat = 1e-6
    """Source: DAPO, section 4.1."""
    warmup_steps: NonNegative = 20
    """Rollout steps; step k (from 1) trains at lr * min(1, (k - 1 + first) / warmup_steps) with
    first = first_warmup_step."""
    first_warmup_step: Literal[0, 1] = 1
    """0: the first step of a warm-up has learning rate 0. Source: verl's scheduler."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """After the warm-up: stay, or fall to lr * min_lr_frac at run.total_steps, along half a cosine
    or a straight line. Source: DAPO, section 4.1 (constant)."""
    min_lr_frac: Fraction = 0.0
    """Share of lr that the last step trains at; of a schedule that falls."""
    weight_decay: NonNegativeFloat = 0.1
    """Not applied to norms and biases. Source: verl's DAPO recipe."""
    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    eps: PositiveFloat = 1e-8
    grad_clip: PositiveFloat = 1.0
    """Global norm. Source: verl's DAPO recipe."""
    max_skipped_updates: Positive = 5
    """An update whose gradient is not finite is skipped and counted; after so many in a row the
    learner stops. Every one sees other responses, so one bad batch cannot reach it."""


class LearnerSection(Section):
    """How the train batch is worked through, and on how many processes."""

    mini_batches: Positive = 16
    """Optimizer steps for each rollout step. Source: DAPO, section 4.1."""
    micro_batch_tokens: Positive = 22528
    """Token budget of one forward pass, over the context-parallel ranks together; a longer single
    sequence still passes alone."""
    tensor_parallel: Positive = 1
    """Ranks that share every matrix; best inside one node."""
    pipeline_parallel: Positive = 1
    """Stages that share the layers; divides their number."""
    data_parallel: Positive = 1
    """Replicas that share the responses of a mini-batch."""
    context_parallel: Positive = 1
    """Ranks that share the tokens of each sequence."""
    expert_parallel: Positive = 1
    """Ranks, of the data-parallel ones, that share the experts of a layer; more than 1 needs a
    model with experts, and none of the families has any."""
    sequence_parallel: bool = False
    """Split norms and residuals over the tensor-parallel ranks by token: less memory, same
    traffic."""
    distributed_optimizer: bool = False
    """Share main parameters and optimizer state out over the data-parallel ranks (ZeRO-1)."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again instead of keeping it: nothing; the core of attention,
    which saves little where its kernel keeps no scores; or every layer, at a third more compute."""
    freeze: tuple[str, ...] = ()
    """Parameters that do not train: "embedding", "output_layer", "final_norm", "layers.7",
    "layers.0-3" (both included, from 0). See dapo_hpc.config.frozen."""
    threads: Positive = 1
    """OpenMP threads of a learner process on CPU."""
    checkpoint_every: Positive = 5
    """Rollout steps between checkpoints; the last step always has one."""
    keep_checkpoints: Positive = 2
    """Older ones are deleted."""
    async_checkpoint: bool = False
    """Write a checkpoint while the next step is under way."""


class WeightsSection(Section):
    """Learner to actors."""

    keep_versions: Annotated[int, Field(ge=2)] = 3
    """Older versions are deleted unless an actor still names them."""
    probe_tolerance: PositiveFloat = 0.1
    """Largest mean |learner - engine| log-prob (nats) on the probe sequences after a load; beyond
    it the actor refuses to sample."""
    save_shard_bytes: Positive = 4 * 2**30
    """Size of one safetensors file."""


class EvalSection(Section):
    """Held-out accuracy, by the same actors."""

    every: NonNegative = 5
    """Rollout steps between evaluations; the start and the end always have one. 0: never."""
    samples: Positive = 32
    """k of avg@k. Source: DAPO, section 4.1."""
    temperature: NonNegativeFloat = 1.0
    """Source: DAPO, section 4.1."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.7
    """Source: DAPO, section 4.1."""


class SftSection(Section):
    """Supervised fine-tuning of prompt/response pairs, before reinforcement learning."""

    init: str
    """Hugging Face directory to start from; without safetensors its weights are drawn at random."""
    pairs: str
    """Parquet file with columns prompt, response: text, in training order."""
    batch_size: Positive = 64
    """Pairs for each optimizer step."""
    lr: PositiveFloat = 1e-5
    warmup_steps: NonNegative = 50
    """Optimizer steps of linear warm-up."""
    final_lr_frac: Fraction = 0.1
    """The second half of the run decays linearly to this share of lr."""
    weight_decay: NonNegativeFloat = 0.0
    checkpoint_every: Positive = 500
    """Optimizer steps between checkpoints."""


class HardwareSection(Section):
    """What `dapo check` compares its plan with; nothing else reads it."""

    gpus_per_node: NonNegative = 8
    """0: learner and actors run on processors."""
    gpu_memory_gib: PositiveFloat = 80.0
    """Of one GPU, whole."""


class LaunchSection(Section):
    """The launchers: on this machine, and inside a Slurm job."""

    max_restarts: NonNegative = 3
    """A process that dies is restarted in place; after so many deaths without a further step of the
    run, the run stops."""
    stop_s: PositiveFloat = 8.0
    """Processes that are asked to stop are killed after this long."""
    max_job_starts: Positive = 5
    """Slurm: so many starts of the learner's job without a further step of the run; then it stops.
    The same of each job of actors that fails."""


Profile = Literal["paper", "verl", "default"]


class RunConfig(Section):
    """One run, section by section in the order of the flow."""

    profile: Profile = "default"
    """Which recipe fills the gaps: the paper's text, verl's scripts, or our own choice."""
    run: RunSection
    model: ModelSection
    prompts: PromptsSection
    rollout: RolloutSection = RolloutSection()
    reward: RewardSection = RewardSection()
    buffer: BufferSection = BufferSection()
    advantage: AdvantageSection = AdvantageSection()
    loss: LossSection = LossSection()
    optimizer: OptimizerSection = OptimizerSection()
    learner: LearnerSection = LearnerSection()
    weights: WeightsSection = WeightsSection()
    eval: EvalSection = EvalSection()
    sft: SftSection | None = None
    hardware: HardwareSection = HardwareSection()
    launch: LaunchSection = LaunchSection()

    @property
    def run_dir(self) -> Path:
        return Path(self.run.dir) / self.run.name

    @property
    def max_sequence_tokens(self) -> int:
        """Longest prompt plus longest response."""
        return self.prompts.max_tokens + self.rollout.max_response_tokens
