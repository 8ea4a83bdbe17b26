"""The `parallel:` section: how a run is spread over processes. None of it changes what is computed."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from castalia.config.section import Section, setting


class ParallelConfig(Section):
    """How a run is spread over processes; what is left of them after these sizes is data parallel."""

    layout: Literal["given", "auto"] = setting(
        "given",
        "auto: zero, tensor and pipeline, where they are not given, become the plainest that fits into the memory",
        "performance",
    )
    zero: Literal[0, 1, 2, 3] = setting(
        0, "ZeRO: 1 spreads optimizer state, 2 gradients too, 3 weights too, over data-parallel ranks", "performance"
    )
    shard: int | None = setting(
        None,
        "ranks that ZeRO spreads over, replicated beyond (HSDP); null: all data-parallel ranks",
        "performance",
        ge=1,
    )
    tensor: int = setting(1, "ranks that share each matrix (tensor parallel)", "performance", ge=1)
    sequence: bool = setting(
        False, "tensor-parallel ranks share the sequence between matrices (sequence parallel)", "performance"
    )
    context: int = setting(1, "ranks that share each sequence (context parallel)", "performance", ge=1)
    context_balance: bool = setting(
        True,
        "context-parallel ranks hold chunks c and 2N-1-c of 2N, so that all have the same work; false, or where the "
        "sequence does not divide by 2N: a stretch each",
        "performance",
    )
    expert: int = setting(
        1, "data-parallel ranks that share the experts of each layer (expert parallel)", "performance", ge=1
    )
    pipeline: int = setting(1, "stages of the pipeline", "performance", ge=1)
    schedule: Literal["gpipe", "1f1b", "interleaved", "zero_bubble"] = setting(
        "1f1b", "order of the micro-batches in the pipeline", "performance"
    )
    virtual_stages: int = setting(
        2, "stages that each rank holds; with schedule interleaved and zero_bubble only", "performance", ge=1
    )
    partition: str = setting(
        "parameters", "how layers go to stages: uniform, parameters, or type:REGEX of what counts", "performance"
    )

    offload: Literal["none", "optimizer", "parameters"] = setting(
        "none",
        "what lives in the host's memory: nothing, optimizer state and its update, or with zero 3 the weights too",
        "performance",
    )

    @model_validator(mode="after")
    def _sensible(self) -> ParallelConfig:
        if self.sequence and self.tensor == 1:
            raise ValueError("parallel.sequence shares sequences among tensor-parallel ranks: raise parallel.tensor")
        if self.shard is not None and self.zero == 0:
            raise ValueError("parallel.shard says over how many ranks ZeRO spreads: set parallel.zero to 1, 2 or 3")
        if self.offload == "parameters" and self.zero != 3:
            raise ValueError(
                "parallel.offload parameters fetches the weights layer by layer, as parallel.zero 3 does: set "
                "parallel.zero=3, or parallel.offload=optimizer"
            )
        if self.expert > 1 and self.zero:
            raise ValueError("parallel.expert does not go with ZeRO so far: leave parallel.zero out")
        if not (self.partition in ("uniform", "parameters") or self.partition.startswith("type:")):
            raise ValueError(f"parallel.partition is {self.partition!r}: give uniform, parameters or type:REGEX")
        return self
