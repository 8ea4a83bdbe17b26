"""A run, a number of processes and a device's memory -> the plainest layout that fits.

    pipeline 1, 2, ... ─> tensor 1, 2, ... within a host ─> ZeRO 0, 1, 2, 3 ─> legal? fits? ─> the first that does

The order is that of growing traffic between ranks. What a layout may not be, `check_layout` says; what it needs,
`MemoryModel` (memory.py), as for `castalia plan`.
"""

from __future__ import annotations

from castalia.config import Config
from castalia.config.schema_parallel import ParallelConfig
from castalia.errors import UserError
from castalia.parallel.layout import check_layout, layout_of
from castalia.parallel.memory import MemoryModel

FILLED = 0.9
"""The share of the memory that may be planned for."""


def choose_layout(
    config: Config, world: int, local_world: int, memory: int, accelerator: bool = False
) -> tuple[ParallelConfig, list[str]]:
    """The plainest layout that fits; what `parallel:` says of zero, tensor and pipeline is kept, and all else.

    Args:
        config: complete (derived), with the vocabulary.
        world, local_world: processes in all, and on each host.
        memory: bytes that each process has.
        accelerator: the device is one; else a CPU.

    Returns:
        the settings, and a line that says why.

    Raises:
        UserError: nothing that fits is legal.
    """
    model, given = MemoryModel(config, accelerator), config.parallel
    least, refused = 0, ""
    for pipeline in _sizes(given, "pipeline", world):
        for tensor in _sizes(given, "tensor", local_world):
            for zero in [given.zero] if given.zero else range(4):
                sizes = {"layout": "given", "pipeline": pipeline, "tensor": tensor, "zero": zero}
                try:
                    chosen = ParallelConfig.model_validate(given.model_dump() | sizes)
                    layout = layout_of(chosen, world)
                    tried = config.model_copy(update={"parallel": chosen})
                    check_layout(tried, layout)
                except (UserError, ValueError) as error:  # pydantic's are ValueErrors
                    refused = refused or str(error)
                    continue
                need = model.worst(tried, layout).total
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


def _sizes(given: ParallelConfig, axis: str, ranks: int) -> list[int]:
    """What an axis may have: the size that was given, else every divisor."""
    size: int = getattr(given, axis)
    return [size] if size > 1 else [n for n in range(1, ranks + 1) if not ranks % n]
