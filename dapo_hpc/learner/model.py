"""The policy: a Megatron GPTModel built from a Hugging Face config, and its weights in and out.

The only file that knows the names of Megatron's configuration.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from megatron.core import parallel_state as mpu
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
)
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from dapo_hpc.config import Frozen, RunConfig
from dapo_hpc.learner import cpu, freezing, head, spec
from dapo_hpc.learner.attention import RotaryTable
from dapo_hpc.learner.parallel import Layout, Processes
from dapo_hpc.plan import layout_problems
from dapo_hpc.plan.architecture import Architecture
from dapo_hpc.weights import families, names
from dapo_hpc.weights.families import Kind
from dapo_hpc.weights.names import ModelShape
from dapo_hpc.weights.source import TensorSource

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""model.dtype of the config."""
Recompute = Literal["none", "selective", "full"]
"""learner.recompute of the config."""


class Policy:
    """The trained model on this rank: its share of the layers and of each matrix."""

    def __init__(
        self,
        directory: Path,
        processes: Processes,
        *,
        dtype: torch.dtype,
        temperature: float,
        sequence_parallel: bool = False,
        recompute: Recompute = "none",
        distributed_optimizer: bool = False,
        freeze: Sequence[str] = (),
    ) -> None:
        """Build with arbitrary weights; call `load` next.

        Args:
            directory: Hugging Face model; only its config is read here.
            processes: this rank's place.
            dtype: of the parameters; gradients are summed in float32 whatever it is.
            temperature: logits are divided by it, as they were in sampling.
            sequence_parallel: split norms and residuals over the tensor-parallel ranks by token.
            recompute: what the backward pass computes again instead of keeping it.
            distributed_optimizer: each data-parallel rank updates a part of the parameters.
            freeze: patterns of learner.freeze, for what does not train.
        """
        self.hf = families.read_config(directory)
        require_supported(self.hf, processes.layout)
        self.processes, self.dtype = processes, dtype
        self.shape = ModelShape.of(self.hf)
        self.config = megatron_config(
            self.hf, self.shape, processes, dtype, sequence_parallel, recompute
        )
        self.is_fused = spec.uses_transformer_engine(processes.device, dtype)
        with cpu.cuda_calls_on_cpu():
            self.module = build(self.config, self.shape, processes, is_fused=self.is_fused)
        self.head: head.LogprobHead | None = None
        if processes.is_last_stage:
            self.head = head.install(
                self.module, temperature=temperature, valid_vocab=self.shape.vocab
            )
        self.rotary = RotaryTable(*_frequencies(self.hf, self.shape), device=processes.device)
        freezing.freeze(self.module, Frozen.of(freeze), self.shape, self.first_layer)
        if recompute == "full" and self.module.pre_process:
            freezing.let_gradients_start(self.module.embedding)
        self.is_optimizer_distributed = distributed_optimizer
        self.ddp = _data_parallel(self.config, self.module, distributed_optimizer)

    @classmethod
    def of(
        cls, config: RunConfig, directory: Path, processes: Processes, *, temperature: float
    ) -> Policy:
        """Trained as a run's config says.

        Raises ValueError for a model or layout that the learner cannot train, as `dapo check` does.
        """
        learner = config.learner
        problems = layout_problems(Architecture.read(directory), learner)
        if problems:
            raise ValueError(" ".join(problems))
        return cls(
            directory,
            processes,
            dtype=DTYPES[config.model.dtype],
            temperature=temperature,
            sequence_parallel=learner.sequence_parallel,
            recompute=learner.recompute,
            distributed_optimizer=learner.distributed_optimizer,
            freeze=learner.freeze,
        )

    @property
    def first_layer(self) -> int:
        """Global number (from 0) of this stage's layer 0."""
        return int(self.module.decoder.layers[0].layer_number) - 1

    @property
    def row_multiple(self) -> int:
        """The number of tokens of a row on a rank must be one of it."""
        return self.processes.layout.tensor if self.config.sequence_parallel else 1

    @torch.no_grad()
    def load(self, source: TensorSource) -> None:
        """Fill every parameter of this rank; only this rank's parts of the tensors are read.

        Raises ValueError when the source is not a model of this shape.
        """
        source.check(self.shape)
        tp, rank = self.processes.layout.tensor, self.processes.tensor_rank
        for name, parameter in self.module.named_parameters():
            entry = names.entry(self.shape, name, first_layer=self.first_layer)
            wanted = zip(entry.hf_names, names.slices(entry, self.shape, tp, rank), strict=True)
            parts = [source.read(hf_name, index) for hf_name, index in wanted]
            parameter.copy_(names.join(entry, parts, self.shape, tp))

    @torch.no_grad()
    def export(self) -> Iterator[tuple[str, Tensor]]:
        """Full Hugging Face tensors, one parameter at a time; yields them on rank 0 only.

        Collective: every rank must exhaust it. Only one rank for each part of the model works.
        """
        if self.processes.data_rank != 0 or self.processes.context_rank != 0:
            return
        layout = self.processes.layout
        per_stage = self.shape.num_layers // layout.pipeline
        for stage in range(layout.pipeline):
            first = stage * per_stage
            for name in names.megatron_names(self.shape, first, per_stage):
                yield from self._export_one(name, stage, first)

    def _export_one(self, name: str, stage: int, first: int) -> Iterator[tuple[str, Tensor]]:
        here = self.processes
        entry = names.entry(self.shape, name, first_layer=first)
        full: list[Tensor] = []
        if here.pipeline_rank == stage:
            own = names.fused_name(name) if self.is_fused else name
            full = self._gather(self.module.get_parameter(own).detach(), entry.kind)
        if here.tensor_rank != 0:
            return
        for i, (hf_name, shape) in enumerate(entry.hf_shapes.items()):
            tensor = full[i] if full else None
            tensor = self._bring_to_first_stage(tensor, shape, stage)
            if here.rank == 0 and tensor is not None:
                yield hf_name, tensor

    def _gather(self, part: Tensor, kind: Kind) -> list[Tensor]:
        group = self.processes.tensor_group
        if group is None or kind == "replicated":
            return names.merge(kind, [part.clone()], self.shape)
        parts = [torch.empty_like(part) for _ in range(group.size())]
        dist.all_gather(parts, part.contiguous(), group=group)
        return names.merge(kind, parts, self.shape)

    def _bring_to_first_stage(
        self, tensor: Tensor | None, shape: tuple[int, ...], stage: int
    ) -> Tensor | None:
        if stage == 0 or self.processes.pipeline_rank not in (0, stage):
            return tensor
        ranks = mpu.get_pipeline_model_parallel_group()
        source = dist.get_global_rank(ranks, stage)
        if tensor is not None:
            dist.send(tensor.contiguous(), dst=dist.get_global_rank(ranks, 0), group=ranks)
            return None
        received = torch.empty(shape, dtype=self.dtype, device=self.processes.device)
        dist.recv(received, src=source, group=ranks)
        return received


def is_complete(directory: Path) -> bool:
    """True when a directory holds a whole Hugging Face model: config and all its safetensors."""
    index = directory / "model.safetensors.index.json"
    if not (directory / "config.json").exists():
        return False
    if index.exists():
        files = set(json.loads(index.read_text())["weight_map"].values())
        return all((directory / name).exists() for name in files)
    return (directory / "model.safetensors").exists()


def require_supported(hf: Any, layout: Layout) -> None:
    """Raise ValueError naming all that keeps this learner from training a model in a layout."""
    problems = families.problems(hf)
    if hf.num_hidden_layers % layout.pipeline:
        problems.append(
            f"learner.pipeline_parallel = {layout.pipeline} does not divide "
            f"{hf.num_hidden_layers} layers"
        )
    for what in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if getattr(hf, what) % layout.tensor:
            problems.append(
                f"learner.tensor_parallel = {layout.tensor} does not divide {what} = "
                f"{getattr(hf, what)}"
            )
    if problems:
        raise ValueError(f"the model of model.path cannot be trained: {'; '.join(problems)}.")


def megatron_config(
    hf: Any,
    shape: ModelShape,
    processes: Processes,
    dtype: torch.dtype,
    sequence_parallel: bool,
    recompute: Recompute = "none",
) -> TransformerConfig:
    """What Megatron must know to build this model on this rank."""
    layout = processes.layout
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.ffn,
        num_attention_heads=shape.heads,
        num_query_groups=shape.kv_heads,
        kv_channels=shape.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=hf.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=shape.has_qkv_bias,
        qk_layernorm=shape.has_qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=processes.device.type != "cuda",
        # `load` fills every parameter, but Megatron marks the sharded ones while it initialises.
        perform_initialization=True,
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        context_parallel_size=layout.context,
        sequence_parallel=sequence_parallel,
        # Micro-batches differ in length, so stages tell each other shapes; Megatron allows that
        # only with this dispatcher, dense model or not.
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        batch_p2p_comm=True,
        batch_p2p_sync=False,
        deallocate_pipeline_outputs=True,
        recompute_granularity=None if recompute == "none" else recompute,
        recompute_method="uniform" if recompute == "full" else None,
        recompute_num_layers=1 if recompute == "full" else None,
        # Fusions that need Apex or TransformerEngine.
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        # The loss arrives with its denominator in the token weights: with this flag Megatron sums
        # micro-batches and data-parallel ranks, and divides by nothing (see _finalize).
        calculate_per_token_loss=True,
        finalize_model_grads_func=_finalize,
    )


def _leave(weight: Tensor) -> Tensor:
    return weight


def _finalize(models: list[torch.nn.Module], _num_tokens: Tensor | None, **kwargs: Any) -> None:
    """Megatron's gradient reductions without its division by the number of tokens."""
    finalize_model_grads(models, None, **kwargs)


def build(
    config: TransformerConfig, shape: ModelShape, processes: Processes, *, is_fused: bool = False
) -> GPTModel:
    """This rank's share of the model, with arbitrary weights; is_fused: see spec.py."""
    return GPTModel(
        config=config,
        transformer_layer_spec=spec.fused(config) if is_fused else spec.plain(config),
        vocab_size=shape.padded_vocab(processes.layout.tensor),
        max_sequence_length=1,  # only learned position embeddings look at it
        pre_process=mpu.is_pipeline_first_stage(),
        post_process=mpu.is_pipeline_last_stage(),
        parallel_output=True,
        share_embeddings_and_output_weights=shape.is_tied,
        position_embedding_type="none",  # rotated in front of attention
    )


def _data_parallel(
    config: TransformerConfig, module: GPTModel, distributed_optimizer: bool
) -> DistributedDataParallel:
    ddp = DistributedDataParallel(
        config=config,
        ddp_config=DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            average_in_collective=False,
            overlap_grad_reduce=False,
            use_distributed_optimizer=distributed_optimizer,
            check_for_nan_in_grad=False,  # optimizer.py skips and counts them
        ),
        module=module,
    )
    config.no_sync_func = ddp.no_sync
    return ddp


def _frequencies(hf: Any, shape: ModelShape) -> tuple[Tensor, float]:
    """Inverse rotary frequencies [d / 2] and the scale of cos and sin, as in transformers."""
    rope = hf.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind == "default":
        exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
        return 1.0 / rope["rope_theta"] ** exponents, 1.0
    function = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[kind]
    inverse_frequencies, scaling = function(hf, torch.device("cpu"))
    return inverse_frequencies, float(scaling)
