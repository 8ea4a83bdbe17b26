"""How many processes do what: world size and `parallel:` -> a checked layout. Pure arithmetic, no torch.

    rank = (((pipeline · replicate + r) · shard + s) · context + c) · tensor + t

Tensor-parallel ranks are neighbours, since they speak most; stages of the pipeline lie
furthest apart. `replicate` and `shard` together are the data-parallel ranks: without ZeRO all
of them replicate. Whatever does not fit is refused here, before any process waits for another.
"""

from __future__ import annotations

from dataclasses import dataclass

from castalia.config import Config, ModelConfig
from castalia.config.schema_parallel import ParallelConfig
from castalia.errors import UserError

AXES = ("pipeline", "replicate", "shard", "context", "tensor")


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes of the mesh of processes.

    Attributes:
        pipeline, replicate, shard, context, tensor: ranks along each axis.
        zero: ZeRO's stage.
        sequence: sequence parallelism among the tensor ranks.
        expert: ranks that share experts: those along `shard`.
        balanced: context ranks hold chunks of which all have the same work, where the sequence divides so.
    """

    pipeline: int = 1
    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1
    zero: int = 0
    sequence: bool = False
    expert: int = 1
    balanced: bool = True

    @property
    def world(self) -> int:
        """Processes in all."""
        return self.pipeline * self.data * self.context * self.tensor

    @property
    def data(self) -> int:
        """Replicas that see different samples."""
        return self.replicate * self.shard

    @property
    def sizes(self) -> tuple[int, ...]:
        """By axis, in the order of AXES."""
        return tuple(getattr(self, axis) for axis in AXES)

    def coordinate(self, rank: int) -> dict[str, int]:
        """Where a rank is along each axis."""
        where = {}
        for axis in reversed(AXES):
            rank, where[axis] = divmod(rank, getattr(self, axis))
        return where

    def __str__(self) -> str:
        names = {"pipeline": "pipeline stages", "context": "context ranks", "tensor": "tensor ranks"}
        parts = [
            f"{self.data} data-parallel ranks"
            + (f" in groups of {self.shard}" if self.replicate > 1 < self.shard else "")
        ]
        parts += [f"{getattr(self, axis)} {name}" for axis, name in names.items() if getattr(self, axis) > 1]
        return (
            " x ".join(parts) + (f", ZeRO {self.zero}" if self.zero else "") + (", sequence" if self.sequence else "")
        )


def layout_of(cfg: ParallelConfig, world: int) -> Layout:
    """The layout that `parallel:` describes on so many processes.

    Raises:
        UserError: they do not come out even.
    """
    fixed = cfg.pipeline * cfg.context * cfg.tensor
    if world % fixed:
        raise UserError(
            f"parallel.pipeline {cfg.pipeline} x parallel.context {cfg.context} x parallel.tensor {cfg.tensor} "
            f"= {fixed} does not divide {world} {'process' if world == 1 else 'processes'}: change these, or start "
            f"a multiple of {fixed} with `castalia train --procs`"
        )
    data = world // fixed
    shard = (cfg.shard or data) if cfg.zero else cfg.expert
    if data % shard:
        key = "shard" if cfg.zero else "expert"
        raise UserError(f"parallel.{key} {shard} does not divide the {data} data-parallel ranks: change it")
    # Spreading over one rank is not spreading.
    zero = cfg.zero if shard * cfg.context > 1 else 0
    return Layout(
        cfg.pipeline, data // shard, shard, cfg.context, cfg.tensor, zero, cfg.sequence, cfg.expert, cfg.context_balance
    )


def held_tokens(length: int, ranks: int, rank: int, balanced: bool) -> list[range]:
    """The tokens of a sequence that one of the context-parallel ranks holds, in chunks of one size.

    A causal query sees the keys before it, so with `balanced` a rank takes one chunk of 2N from the front and its
    mirror image from the end: every rank then meets (2N + 1) chunks of keys in all. Where the length does not divide
    by 2N, and otherwise, it is a single stretch.
    """
    if balanced and ranks > 1 and length % (2 * ranks) == 0:
        size = length // (2 * ranks)
        return [range(i * size, (i + 1) * size) for i in (rank, 2 * ranks - 1 - rank)]
    size = length // ranks
    return [range(rank * size, (rank + 1) * size)]


def check_layout(config: Config, layout: Layout) -> None:
    """Refuse what a model or a run cannot have in this layout.

    Args:
        config: complete (derived).

    Raises:
        UserError: one sentence about the first thing that does not fit.
    """
    _check_batch(config, layout)
    if (layout.context > 1 or layout.sequence) and config.data.curriculum != "none":
        raise UserError(
            "data.curriculum changes the length of sequences, which parallel.context and parallel.sequence share out "
            "evenly: leave one of them out"
        )
    if layout.expert > max(config.model.moe_num_experts, 1):
        raise UserError(
            f"parallel.expert {layout.expert} is more than model.moe_num_experts {config.model.moe_num_experts}: "
            "lower it"
        )
    if config.optimizer.type == "onebit_adam":
        _check_one_bit(config, layout)
    if layout.tensor > 1:
        _check_tensor(config.model, layout, config.data.seq_length)
    if layout.context > 1:
        _check_context(config, layout)
    if layout.pipeline > 1:
        _check_pipeline(config, layout)
    if config.parallel.offload == "parameters" and layout.zero != 3:
        raise UserError(
            "parallel.offload parameters fetches the weights layer by layer from several ranks, and ZeRO spreads over "
            "one here: set parallel.offload=optimizer, or start more processes"
        )
    if layout.world > 1 and config.model.soft_prompt_text is not None and (layout.zero or layout.tensor > 1):
        raise UserError("model.soft_prompt_text needs whole tables: set parallel.zero=0 and parallel.tensor=1")
    if config.training.precision == "fp8" and (config.performance.compile or config.parallel.schedule == "zero_bubble"):
        what = "performance.compile" if config.performance.compile else "parallel.schedule zero_bubble"
        raise UserError(f"training.precision fp8 and {what} do not go together: set training.precision=bf16")
    if config.performance.compile and config.performance.recompute != "none":
        raise UserError("performance.recompute and performance.compile do not go together: leave one out")
    if config.performance.compile and (layout.zero or layout.tensor > 1 or layout.pipeline > 1 or layout.context > 1):
        raise UserError(
            "performance.compile works on one device and with plain data parallelism so far: "
            "set performance.compile=false"
        )


def _check_batch(config: Config, layout: Layout) -> None:
    training, together = config.training, layout.data * config.micro_batch_size
    if training.batch_size % together:
        fits = training.batch_size // layout.data
        mend = (
            f"set training.micro_batch_size to a divisor of {fits}"
            if fits * layout.data == training.batch_size
            else (f"make training.batch_size a multiple of {together}")
        )
        raise UserError(
            f"training.batch_size {training.batch_size} does not divide into micro-batches of "
            f"{config.micro_batch_size} on {layout.data} data-parallel ranks: {mend}"
        )


def _check_one_bit(config: Config, layout: Layout) -> None:
    if layout.world != layout.data or layout.zero or layout.expert > 1 or config.parallel.offload != "none":
        raise UserError(
            "optimizer.type onebit_adam exchanges the momenta of whole weights among data-parallel ranks: set "
            "parallel.zero=0, offload=none and all other sizes of parallel: to 1, or choose adamw"
        )
    logging = config.logging
    watched = [
        *(["logging.norms gradient"] if "gradient" in logging.norms else []),
        *(["logging.zero_gradients"] if logging.zero_gradients else []),
        *(["logging.noise_scale"] if logging.noise_scale else []),
    ]
    if layout.data > 1 and watched:
        raise UserError(
            f"{watched[0]} looks at whole gradients, which no rank has once optimizer.type onebit_adam compresses: "
            "leave it out"
        )


def _check_tensor(model: ModelConfig, layout: Layout, seq_length: int) -> None:
    t = layout.tensor
    for key, size in (("num_attention_heads", model.num_attention_heads), ("num_kv_heads", model.kv_heads)):
        if size % t:
            raise UserError(
                f"model.{key} {size} does not divide by parallel.tensor {t}: heads are not cut; change one of them"
            )
    widths = [("intermediate_size", model.mlp_size), ("vocab_size", model.vocab_size or t)]
    if model.moe_num_experts:
        widths.append(("moe_intermediate_size", model.expert_size))
    for key, size in widths:
        if size < t:
            raise UserError(f"model.{key} {size} is less than parallel.tensor {t}: some rank would have none")
    if model.block != "transformer":
        raise UserError(f"model.block '{model.block}' has no plan for tensor parallelism: set parallel.tensor=1")
    if layout.sequence and seq_length % (t * layout.context):
        raise UserError(
            f"data.seq_length {seq_length} does not divide by parallel.tensor {t}"
            + (f" x parallel.context {layout.context}" if layout.context > 1 else "")
            + ": change one, or set parallel.sequence=false"
        )


def _check_context(config: Config, layout: Layout) -> None:
    if config.data.seq_length % layout.context:
        raise UserError(
            f"data.seq_length {config.data.seq_length} does not divide by parallel.context {layout.context}: change one"
        )
    model = config.model
    for key, there in (
        ("model.soft_prompt_tokens", model.soft_prompt_tokens),
        ("model.mtp_depth", model.mtp_depth),
        ("model.moe_router sinkhorn", model.moe_num_experts and model.moe_router == "sinkhorn"),
    ):
        if there:
            raise UserError(f"{key} needs whole sequences on each rank: set parallel.context=1")
    if config.loss.normalisation != "tokens":
        raise UserError("loss.normalisation micro_batch_mean needs whole sequences: set parallel.context=1")


def _check_pipeline(config: Config, layout: Layout) -> None:
    model, stages = config.model, stages_of(config)
    if model.num_layers < stages:
        raise UserError(
            f"model.num_layers {model.num_layers} is less than the {stages} stages of the pipeline: "
            "lower parallel.pipeline or parallel.virtual_stages"
        )
    if model.num_unique_layers and model.num_unique_layers != model.num_layers:
        raise UserError("model.num_unique_layers shares layers between stages of a pipeline: set parallel.pipeline=1")
    if model.soft_prompt_tokens:
        raise UserError("model.soft_prompt_tokens cannot be trained through a pipeline: set parallel.pipeline=1")
    if model.mtp_depth:
        raise UserError("model.mtp_depth does not go through a pipeline yet: set parallel.pipeline=1")
    if model.moe_num_experts and config.parallel.schedule == "zero_bubble":
        raise UserError(
            "parallel.schedule zero_bubble splits the backward pass, the losses of experts do not: use another schedule"
        )
    if config.performance.recompute != "none" and config.parallel.schedule == "zero_bubble":
        raise UserError("parallel.schedule zero_bubble goes back twice: set performance.recompute=none")
    if model.position == "rpe" and config.parallel.schedule == "zero_bubble":
        raise UserError(
            "parallel.schedule zero_bubble leaves out the gradient of model.position rpe's table, which all layers "
            "share: use another schedule"
        )
    if layout.zero and config.parallel.schedule == "zero_bubble":
        raise UserError("parallel.schedule zero_bubble splits the backward pass, ZeRO does not: set parallel.zero=0")
    micro = config.training.batch_size // (config.micro_batch_size * layout.data)
    if config.parallel.schedule in ("interleaved", "zero_bubble") and micro % layout.pipeline:
        raise UserError(
            f"parallel.schedule {config.parallel.schedule} needs a multiple of parallel.pipeline {layout.pipeline} "
            f"micro-batches, and there are {micro}: change training.micro_batch_size"
        )


def stages_of(config: Config) -> int:
    """Stages of the whole pipeline: several to a rank with the schedules that interleave."""
    cfg = config.parallel
    return cfg.pipeline * (cfg.virtual_stages if cfg.schedule in ("interleaved", "zero_bubble") else 1)
