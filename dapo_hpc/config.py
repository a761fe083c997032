"""One TOML file is one run: every knob, its bounds, its default and where the default comes from.

`load` reads a file, applies the profile beneath it and `--set` overrides above it, and returns a
frozen RunConfig, or raises ConfigProblems with every problem of the file at once.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class ConfigProblems(ValueError):
    """Everything that is wrong with a config, one sentence each."""

    def __init__(self, source: str, problems: list[str]) -> None:
        self.source = source
        self.problems = problems
        super().__init__("\n".join(f"{source}: {problem}" for problem in problems))


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

    clip_low: PositiveFloat = 0.2
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
    weight_decay: NonNegativeFloat = 0.1
    """Not applied to norms and biases. Source: verl's DAPO recipe."""
    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    eps: PositiveFloat = 1e-8
    grad_clip: PositiveFloat = 1.0
    """Global norm. Source: verl's DAPO recipe."""


class LearnerSection(Section):
    """How the train batch is worked through, and on how many processes."""

    mini_batches: Positive = 16
    """Optimizer steps for each rollout step. Source: DAPO, section 4.1."""
    micro_batch_tokens: Positive = 22528
    """Token budget of one forward pass; a longer single sequence still passes alone."""
    tensor_parallel: Positive = 1
    pipeline_parallel: Positive = 1
    data_parallel: Positive = 1
    sequence_parallel: bool = False
    threads: Positive = 1
    """OpenMP threads of a learner process on CPU."""
    checkpoint_every: Positive = 5
    """Rollout steps between checkpoints; the last step always has one."""
    keep_checkpoints: Positive = 2


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


class LaunchSection(Section):
    """The local launcher."""

    max_restarts: NonNegative = 3
    """A process that dies is restarted in place this often, then the run stops."""
    stop_s: PositiveFloat = 8.0
    """Processes that are asked to stop are killed after this long."""


Profile = Literal["paper", "verl", "default"]

PROFILES: dict[Profile, dict[str, Any]] = {
    "paper": {
        "optimizer.warmup_steps": 20,
        "optimizer.first_warmup_step": 1,
        "loss.dual_clip": 0.0,
        "loss.normalization": "per_prompt",
        "loss.importance_sampling": "off",
        "reward.boxed_fallback": False,
        "eval.top_p": 0.7,
    },
    "verl": {
        "optimizer.warmup_steps": 10,
        "optimizer.first_warmup_step": 0,
        "loss.dual_clip": 10.0,
        "loss.normalization": "global_tokens",
        "loss.importance_sampling": "off",
        "reward.boxed_fallback": True,
        "eval.top_p": 0.7,
    },
    "default": {
        "optimizer.warmup_steps": 20,
        "optimizer.first_warmup_step": 1,
        "loss.dual_clip": 0.0,
        "loss.normalization": "global_tokens",
        "loss.importance_sampling": "token",
        "reward.boxed_fallback": True,
        "eval.top_p": 0.7,
    },
}
"""What each profile sets beneath the TOML file. Everything else is the class default, which the
three share."""


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
    launch: LaunchSection = LaunchSection()

    @property
    def run_dir(self) -> Path:
        return Path(self.run.dir) / self.run.name

    @property
    def max_sequence_tokens(self) -> int:
        """Longest prompt plus longest response."""
        return self.prompts.max_tokens + self.rollout.max_response_tokens


def load(path: str | os.PathLike[str], overrides: list[str] | None = None) -> RunConfig:
    """Read a TOML file. Raises ConfigProblems with every problem found."""
    source = Path(path)
    try:
        table = tomllib.loads(source.read_text())
    except FileNotFoundError:
        raise ConfigProblems(str(path), ["there is no such file."]) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigProblems(str(path), [f"not TOML: {error}."]) from None
    problems: list[str] = []
    for text in overrides or []:
        _apply_override(table, text, problems)
    return parse(table, source=source.name, problems=problems)


def parse(
    table: dict[str, Any], *, source: str = "config", problems: list[str] | None = None
) -> RunConfig:
    """Validate a table of a TOML file, profile applied. Raises ConfigProblems."""
    problems = list(problems or [])
    profile = table.get("profile", "default")
    if profile in get_args(Profile):
        table = _with_profile(table, PROFILES[profile])
    try:
        config = RunConfig.model_validate(table)
    except ValidationError as error:
        problems += [_sentence(dict(item)) for item in error.errors()]
        problems += _cross_checks_of_the_rest(table, error)
        raise ConfigProblems(source, problems) from None
    problems += cross_checks(config)
    if problems:
        raise ConfigProblems(source, problems)
    return config


def dump(config: RunConfig) -> str:
    """The resolved config as TOML text; `parse` of it gives the same config."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def cross_checks(config: RunConfig) -> list[str]:
    """What single-field bounds cannot see."""
    rollout, reward, learner = config.rollout, config.reward, config.learner
    found: list[str] = []
    if config.eval.every and config.prompts.eval is None:
        found.append(
            f"eval.every = {config.eval.every} needs held-out prompts, but prompts.eval is not "
            "set. Set prompts.eval to a parquet file, or eval.every to 0."
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


def known_keys() -> list[str]:
    """Every dotted key a TOML file may set."""
    keys: list[str] = []
    for name, field in RunConfig.model_fields.items():
        section = _section_class(field.annotation)
        keys += [f"{name}.{key}" for key in section.model_fields] if section else [name]
    return keys


_REQUIRED: dict[str, dict[str, Any]] = {
    "run": {"name": "unset", "total_steps": 1},
    "model": {"path": "unset"},
    "prompts": {"train": "unset"},
    "sft": {"init": "unset", "pairs": "unset"},
}
"""Stand-ins for required keys that are missing, so that the cross-checks still run."""


def _cross_checks_of_the_rest(table: dict[str, Any], error: ValidationError) -> list[str]:
    """Cross-checks with the faulty keys at their defaults, so that all are seen at once."""
    rest = {k: dict(v) if isinstance(v, dict) else v for k, v in table.items()}
    for item in error.errors():
        target: Any = rest
        for part in item["loc"][:-1]:
            target = target.get(part) if isinstance(target, dict) else None
        if isinstance(target, dict):
            target.pop(item["loc"][-1], None)
    for section, required in _REQUIRED.items():
        if section in rest or section != "sft":
            rest[section] = {**required, **rest.get(section, {})}
    try:
        return cross_checks(RunConfig.model_validate(rest))
    except ValidationError:
        return []


def _section_class(annotation: Any) -> type[Section] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def _with_profile(table: dict[str, Any], profile: dict[str, Any]) -> dict[str, Any]:
    merged = {k: dict(v) if isinstance(v, dict) else v for k, v in table.items()}
    for dotted, value in profile.items():
        section, key = dotted.split(".")
        target = merged.setdefault(section, {})
        if isinstance(target, dict):
            target.setdefault(key, value)
    return merged


def _apply_override(table: dict[str, Any], text: str, problems: list[str]) -> None:
    dotted, separator, value = text.partition("=")
    section, dot, key = dotted.strip().partition(".")
    if not (separator and dot):
        problems.append(f"--set {text}: expected section.key=value, as in loss.clip_high=0.28.")
        return
    try:
        parsed = tomllib.loads(f"value = {value.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    table.setdefault(section, {})[key] = parsed


def _sentence(error: dict[str, Any]) -> str:
    """One problem in the house form: what, the value, what was expected."""
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"unknown key {key}{_suggestion(key)}"
    if error["type"] == "missing":
        return f"{key} is missing; it has no default, set it."
    reason = error["msg"][0].lower() + error["msg"][1:]
    return f"{key} = {error['input']!r}: {reason}."


def _suggestion(key: str) -> str:
    """The closest spelling of the last part, of the same section if there is a choice."""
    known = known_keys() if "." in key else list(RunConfig.model_fields)
    section, _, leaf = key.rpartition(".")
    leaves = [k.rpartition(".")[2] for k in known]
    near = difflib.get_close_matches(leaf, leaves, n=1)
    found = [k for k, its_leaf in zip(known, leaves, strict=True) if its_leaf in near]
    found.sort(key=lambda k: not k.startswith(section))
    return f"; did you mean {found[0]}?" if found else "; no known key is close to it."
