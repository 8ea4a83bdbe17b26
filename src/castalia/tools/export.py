"""A run -> a folder in Hugging Face format, checked before it is called finished.

    checkpoint ─a row at a time─> model*.safetensors ┐
    config     ─────────────────> config.json        ├─> .writing-NAME ─logits equal?─> NAME
    tokenizer  ─────────────────> tokenizer.json     ┘    parity.json, README.md

The folder gets its name only after `transformers`, loading what was written, has given the
same logits as the run's own model. Without transformers, or with a model that does not fit into
memory twice, the user has to say that the check is to be skipped; the writing alone needs
memory for one row of the table, whatever the size of the model.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from castalia.checkpoint import tensor_shapes
from castalia.convert.huggingface import architecture_of, huggingface_config
from castalia.convert.huggingface_files import write_folder
from castalia.convert.huggingface_stream import theirs_later
from castalia.convert.table import check_names
from castalia.errors import CheckFailed, UserError
from castalia.generate.load import load_run, open_run, run_tokenizer
from castalia.tools.export_card import model_card
from castalia.tools.export_tokenizer import write_tokenizer

# fp32 logits of two implementations of one function differ by rounding only.
TOLERANCE = 1e-4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHARD_SIZE = 5_000_000_000


def export_run(
    run_dir: Path,
    output: Path,
    step: int | None = None,
    check: bool = True,
    say: Callable[[str], None] | None = None,
    dtype: str = "float32",
    shard_size: int = SHARD_SIZE,
) -> dict[str, Any]:
    """Write a run's model as a Hugging Face folder.

    Args:
        run_dir: the run, or one checkpoint.
        output: the folder to make; must not exist.
        step: checkpoint; None: the newest whole one.
        check: compare logits with transformers first.
        say: told what is being done now.
        dtype: of the weights: float32, bfloat16 or float16.
        shard_size: bytes of a file of weights at most; a row of the table is never divided.

    Returns:
        The figures of parity.json.

    Raises:
        UserError: the output exists, transformers is missing, or no class of transformers fits the model.
        CheckFailed: transformers gives other logits; nothing is left behind.
    """
    if output.exists():
        raise UserError(f"{output}: exists already: choose another folder, or remove it")
    if check and importlib.util.find_spec("transformers") is None:
        raise UserError("the export is checked against transformers: pip install 'castalia[export]', or say --no-check")
    say = say or (lambda doing: None)
    say("loading the run")
    config, checkpoint = open_run(run_dir, step)
    state = checkpoint.state
    tokenizer = run_tokenizer(run_dir, state.get("tokenizer"))
    model = config.model.model_copy(update={"max_position_embeddings": config.max_positions})
    settings = huggingface_config(model, eod=tokenizer.eod, dtype=dtype)
    held = {n.removeprefix("model."): s for n, s in tensor_shapes(checkpoint.path).items() if n.startswith("model.")}
    shapes = {name: shape for name, shape in held.items() if not name.startswith("mtp.")}
    rows = architecture_of(model).rows(model)
    check_names([name for row in rows for name in row.ours], shapes, "the weights")
    if check:
        check_memory(2 * sum(map(prod, shapes.values())))
    fresh = output.with_name(f".writing-{output.name}")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        fresh.mkdir(parents=True)
        say("writing the weights")
        write_folder(fresh, theirs_later(rows, checkpoint.path, shapes), DTYPES[dtype], shard_size)
        write_json(fresh / "config.json", settings)
        kept = run_dir / "generation_config.json"  # as an import brought it
        if kept.is_file():
            shutil.copyfile(kept, fresh / kept.name)
        else:
            write_json(fresh / "generation_config.json", {"eos_token_id": tokenizer.eod, "do_sample": True})
        spoken = write_tokenizer(fresh, tokenizer, config.max_positions, check)
        parity: dict[str, Any] = {"checked": False}
        if check:
            say("comparing logits with transformers")
            parity = _parity(run_dir, checkpoint.step, tokenizer.vocab_size, fresh, DTYPES[dtype])
        parity |= {"dtype": dtype, "tokenizer": spoken}
        write_json(fresh / "parity.json", parity)
        (fresh / "README.md").write_text(
            model_card(run_dir, output.name, config, state, settings, parity), encoding="utf-8"
        )
        os.replace(fresh, output)
    except OSError as error:
        raise UserError(f"{output}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return parity


def write_json(path: Path, values: dict[str, Any]) -> None:
    """A JSON file."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def check_memory(numbers: int) -> None:
    """Refuse a comparison for which so many fp32 numbers do not fit into what memory is free.

    Raises:
        UserError: with the two figures.
    """
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:  # another system: let it try
        return
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    if free is not None and 4 * numbers > free:
        raise UserError(
            f"comparing logits needs {4 * numbers / 1e9:.1f} GB for the model in both libraries, and {free / 1e9:.1f} "
            "GB are free: say --no-check, which the folder's parity.json will tell, or use a larger machine"
        )


def _parity(run_dir: Path, step: int, vocab_size: int, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Logits of the run's model, its weights rounded as the files', against transformers' on the written folder."""
    import transformers

    model, _ = load_run(run_dir, None if (run_dir / "manifest.json").is_file() else step)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).float()
    transformers.utils.logging.disable_progress_bar()
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    reference, report = loaded
    name = folder.name.removeprefix(".writing-")
    odd = sorted([*report["missing_keys"], *report["unexpected_keys"], *map(str, report["mismatched_keys"])])
    if odd:
        raise CheckFailed(
            f"{name}: transformers {transformers.__version__} does not take {odd[0]}: nothing was written"
        )
    tokens = parity_tokens(vocab_size, model.cfg.max_position_embeddings)
    with torch.no_grad():
        mine, theirs = model.logits(model(tokens)), reference.eval()(tokens).logits.float()
    return compared(mine, theirs, name, f"transformers {transformers.__version__}", "written") | {
        "transformers": transformers.__version__
    }


def parity_tokens(vocab_size: int, longest: int | None) -> Tensor:
    """Two rows of random ids."""
    length = min(64, (longest or 64) - 2)  # OPT counts two positions of its own
    return torch.randint(0, vocab_size, (2, length), generator=torch.Generator().manual_seed(0))


def compared(mine: Tensor, theirs: Tensor, name: str, source: str, done: str) -> dict[str, Any]:
    """The figures of a comparison of logits.

    Raises:
        CheckFailed: they differ by more than rounding.
    """
    difference = ((mine.view_as(theirs) - theirs).abs().max() / theirs.abs().max()).item()
    if not difference <= TOLERANCE:
        raise CheckFailed(
            f"{name}: {source} gives other logits "
            f"(largest relative difference {difference:.2e}, allowed {TOLERANCE:g}): nothing was {done}"
        )
    return {
        "checked": True,
        "largest_relative_difference": difference,
        "tolerance": TOLERANCE,
        "logit_deviation": theirs.std().item(),
        "tokens": theirs[..., 0].numel(),
    }
