"""A run, a precision and a layout -> the decoder to generate with.

one process        load_run ──────────────────────────> Decoder
tensor, pipeline   make_part on each of the ranks ────> Decoder with links
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from castalia.checkpoint import Piece, load_weights
from castalia.checkpoint.layout import MANIFEST
from castalia.config.schema_parallel import ParallelConfig
from castalia.data.tokenizer import Tokenizer
from castalia.errors import UserError
from castalia.generate.decoder import Decoder
from castalia.generate.load import cast_matrices, load_run, open_run, run_tokenizer
from castalia.model import Transformer
from castalia.model.kernels import choose_fp32_matmul
from castalia.parallel.world import World, enter_world, joined

PRECISIONS = ("fp32", "bf16", "int8")


def parallel_of(overrides: Sequence[str]) -> ParallelConfig:
    """What `parallel.tensor=2` and `parallel.pipeline=2` say; nothing else can be chosen for generation.

    Raises:
        UserError: another setting, or no number.
    """
    sizes = {"tensor": 1, "pipeline": 1}
    for override in overrides:
        key, _, value = override.partition("=")
        name = key.removeprefix("parallel.")
        if name not in sizes or name == key or not value.isdigit() or int(value) < 1:
            raise UserError(
                f"{override}: generation takes parallel.tensor and parallel.pipeline, each a number from 1 on"
            )
        sizes[name] = int(value)
    return ParallelConfig(tensor=sizes["tensor"], pipeline=sizes["pipeline"])


def load_whole(
    run: str | Path, step: int | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Transformer, Tokenizer]:
    """As `load_run`, or of a GPT-NeoX checkpoint, of its newest step.

    Raises:
        UserError: it is neither, or says too little.
    """
    path = Path(run)
    if not foreign(path):
        return load_run(path, step, dtype)
    if step is not None:
        raise UserError(f"--step {step}: {path} is a GPT-NeoX checkpoint: name the step's own folder")
    from castalia.tools.import_model import read_gptneox

    return read_gptneox(path, dtype)


def foreign(path: Path) -> bool:
    """Whether a path is a GPT-NeoX checkpoint."""
    from castalia.tools.import_model import is_gptneox

    return not any((path / name).is_file() for name in ("config.yaml", MANIFEST)) and is_gptneox(path)


@contextmanager
def opened(
    run: str | Path,
    step: int | None = None,
    precision: str = "fp32",
    parallel: ParallelConfig | None = None,
    world: World | None = None,
) -> Iterator[tuple[Decoder, Tokenizer]]:
    """The decoder of a run, and its tokenizer; under a launcher, of this rank's part.

    Args:
        run: its folder, or a checkpoint; in one process also GPT-NeoX's.
        step: None: the newest.
        precision: of the matrices, one of PRECISIONS.
        parallel: the layout; None: one process.
        world: this process among those of the layout; None: as the launcher says.
    """
    from castalia.parallel.layout import layout_of
    from castalia.parallel.mesh import Mesh

    choose_fp32_matmul(torch.device("cpu"))
    dtype, int8 = torch.float32 if precision == "fp32" else torch.bfloat16, precision == "int8"
    if parallel is None or parallel.tensor * parallel.pipeline == 1:
        # Rounding to 8 bits begins at full precision.
        model, tokenizer = load_whole(run, step, torch.float32 if int8 else dtype)
        yield Decoder(model, int8), tokenizer
        return
    if foreign(Path(run)):
        raise UserError(
            f"{run} is a GPT-NeoX checkpoint: `castalia import` makes a run of it, which processes can share"
        )
    world = world or enter_world("cpu")
    with joined(world):
        config, checkpoint = open_run(Path(run), step)
        tokenizer = run_tokenizer(Path(run), checkpoint.state.get("tokenizer"))
        model_config = config.model.model_copy(update={"max_position_embeddings": config.max_positions})
        config = config.model_copy(update={"model": model_config, "parallel": parallel})
        mesh = Mesh(layout_of(parallel, world.size), world)
        if mesh.layout.data > 1:
            raise UserError(
                f"parallel.tensor {parallel.tensor} x parallel.pipeline {parallel.pipeline} is less than {world.size} "
                "processes, and generation shares out nothing else: start as many as that with --procs"
            )
        from castalia.parallel.inference import make_part

        part, links, held = make_part(config, mesh)
        load_weights(checkpoint.path, {f"model.{n}": Piece(*what) for n, what in held.items()})
        if not int8:
            cast_matrices(part, dtype, links.last)
        yield Decoder(part, int8, links), tokenizer
