"""A run, a number of processes and a device's memory -> the plainest layout that fits. Pure arithmetic, no torch.

    pipeline 1, 2, ... ─> tensor 1, 2, ... within a host ─> ZeRO 0, 1, 2, 3 ─> legal? fits? ─> the first that does

The order is that of growing traffic between ranks. What a layout may not be, `check_layout` says.
Activations are estimated as Korthikanti et al. 2022 count them: 34 bytes for each token, layer and
hidden number in 16 bits, of which tensor parallelism shares 24; without the square of attention.
"""

from __future__ import annotations

from castalia.config import Config
from castalia.config.schema_parallel import ParallelConfig
from castalia.errors import UserError
from castalia.model.size import ModelSize, model_size
from castalia.parallel.layout import Layout, check_layout, layout_of

FILLED = 0.9
"""The share of the memory that may be planned for."""


def choose_layout(config: Config, world: int, local_world: int, memory: int) -> tuple[ParallelConfig, list[str]]:
    """The plainest layout that fits; what `parallel:` says of zero, tensor and pipeline is kept, and all else.

    Args:
        config: complete (derived), with the vocabulary.
        world, local_world: processes in all, and on each host.
        memory: bytes that each process has.

    Returns:
        the settings, and a line that says why.

    Raises:
        UserError: nothing that fits is legal.
    """
    size, given = model_size(config), config.parallel
    least, refused = 0, ""
    for pipeline in _sizes(given, "pipeline", world):
        for tensor in _sizes(given, "tensor", local_world):
            for zero in [given.zero] if given.zero else range(4):
                sizes = {"layout": "given", "pipeline": pipeline, "tensor": tensor, "zero": zero}
                try:
                    chosen = ParallelConfig.model_validate(given.model_dump() | sizes)
                    layout = layout_of(chosen, world)
                    check_layout(config.model_copy(update={"parallel": chosen}), layout)
                except (UserError, ValueError) as error:  # pydantic's are ValueErrors
                    refused = refused or str(error)
                    continue
                need = needed_bytes(config, size, layout)
                if need <= FILLED * memory:
                    return chosen, [
                        f"parallel: {layout}, the plainest that fits: about {need / 1e9:.1f} GB of "
                        f"{memory / 1e9:.1f} GB for each process"
                    ]
                least = min(least or need, need)
    if not least:
        raise UserError(f"no layout of {world} processes is legal for this run: {refused}")
    raise UserError(
        f"no layout of {world} processes fits: the smallest takes about {least / 1e9:.1f} GB of {memory / 1e9:.1f} GB "
        "for each: start more, or lower training.micro_batch_size"
    )


def needed_bytes(config: Config, size: ModelSize, layout: Layout) -> int:
    """About what one process holds: weights, gradients, optimizer state, 16-bit copies and activations."""
    spread = layout.shard * layout.context if layout.zero else 1
    weights, layers = size.weight_bytes + size.working_bytes, config.model.num_layers
    state = size.optimizer_bytes / spread + size.gradient_bytes / (spread if layout.zero > 1 else 1)
    state += weights / spread + weights / layers if layout.zero == 3 and spread > 1 else weights
    tokens = config.micro_batch_size * config.data.seq_length / layout.context
    width = 2 if config.training.precision == "fp32" else 1
    each = 2 if config.performance.recompute == "full" else 10 + 24 / layout.tensor
    # A stage of a pipeline holds fewer layers, of as many more micro-batches.
    layer_bytes = each * width * tokens * config.model.hidden_size * layers
    logits = 8 * tokens * (config.model.vocab_size or 0) / layout.tensor
    return int(state / (layout.tensor * layout.pipeline) + layer_bytes + logits)


def _sizes(given: ParallelConfig, axis: str, ranks: int) -> list[int]:
    """What an axis may have: the size that was given, else every divisor."""
    size: int = getattr(given, axis)
    return [size] if size > 1 else [n for n in range(1, ranks + 1) if not ranks % n]
