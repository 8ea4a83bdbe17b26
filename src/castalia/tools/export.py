"""A run -> a folder in Hugging Face format, checked before it is called finished.

    checkpoint ─name table─> model.safetensors ┐
    config     ────────────> config.json       ├─> .writing-NAME ─logits equal?─> NAME
    tokenizer  ────────────> tokenizer.json    ┘          parity.json

The folder gets its name only after `transformers`, loading what was written, has given the
same logits as the run's own model. Without transformers the user has to say that the check
is to be skipped.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from castalia.convert.huggingface import huggingface_config, to_huggingface
from castalia.data.tokenizer import Tokenizer
from castalia.errors import CheckFailed, UserError
from castalia.generate.load import load_run
from castalia.model.transformer import Transformer

# fp32 logits of two implementations of one function differ by rounding only.
TOLERANCE = 1e-4


def export_run(
    run_dir: Path,
    output: Path,
    step: int | None = None,
    check: bool = True,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Write a run's model as a Hugging Face folder.

    Args:
        run_dir: the run.
        output: the folder to make; must not exist.
        step: checkpoint; None: the newest whole one.
        check: compare logits with transformers first.
        say: told what is being done now.

    Returns:
        The figures of parity.json.

    Raises:
        UserError: the output exists, transformers is missing, or no class of transformers fits the model.
        CheckFailed: transformers gives other logits; nothing is left behind.
    """
    from safetensors.torch import save_file

    if output.exists():
        raise UserError(f"{output}: exists already: choose another folder, or remove it")
    if check and importlib.util.find_spec("transformers") is None:
        raise UserError("the export is checked against transformers: pip install 'castalia[export]', or say --no-check")
    say = say or (lambda doing: None)
    say("loading the run")
    model, tokenizer = load_run(run_dir, step)
    settings = huggingface_config(model.cfg, eod=tokenizer.eod)
    weights = {n: t.contiguous() for n, t in to_huggingface(model.state_dict(), model.cfg).items()}
    fresh = output.with_name(f".writing-{output.name}")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        fresh.mkdir(parents=True)
        say("writing the weights")
        save_file(weights, fresh / "model.safetensors", metadata={"format": "pt"})
        _write(fresh / "config.json", settings)
        _write(fresh / "generation_config.json", {"eos_token_id": tokenizer.eod, "do_sample": True})
        _write_tokenizer(fresh, tokenizer, model.cfg.max_position_embeddings)
        if check:
            say("comparing logits with transformers")
        parity = _parity(model, tokenizer.vocab_size, fresh) if check else {"checked": False}
        _write(fresh / "parity.json", parity)
        os.replace(fresh, output)
    except OSError as error:
        raise UserError(f"{output}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return parity


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, longest: int | None) -> None:
    content = tokenizer.file_bytes()
    if content is None:
        return
    (folder / "tokenizer.json").write_bytes(content)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": longest}
    if tokenizer.eod is not None:
        text = tokenizer.decode([tokenizer.eod])
        settings |= {"eos_token": text, "bos_token": text}
    _write(folder / "tokenizer_config.json", settings)


@torch.no_grad()
def _parity(model: Transformer, vocab_size: int, folder: Path) -> dict[str, Any]:
    """Logits of the run's model against those of transformers on the written folder."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    length = min(64, model.cfg.max_position_embeddings or 64)
    tokens = torch.randint(0, vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    mine, theirs = model.logits(model(tokens)), reference(tokens).logits.float()
    difference = ((mine - theirs).abs().max() / theirs.abs().max()).item()
    if not difference <= TOLERANCE:
        raise CheckFailed(
            f"{folder.name.removeprefix('.writing-')}: transformers {transformers.__version__} gives other logits "
            f"(largest relative difference {difference:.2e}, allowed {TOLERANCE:g}): nothing was written"
        )
    return {
        "checked": True,
        "largest_relative_difference": difference,
        "tolerance": TOLERANCE,
        "logit_deviation": theirs.std().item(),
        "tokens": tokens.numel(),
        "transformers": transformers.__version__,
    }
