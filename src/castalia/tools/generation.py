"""GPT-NeoX's settings of text generation -> records as its generate.py writes them.

    text_gen_type unconditional     num_samples empty prompts        -> sample_output_file, if given
                  input-file        prompts split at prompt_end      -> sample_output_file or INPUT.output.jsonl
                  interactive       prompts read from the terminal   -> the terminal
                  precompute        documents of the data sets       -> PATH_NAME.bin, .idx of log-probabilities

A record is one JSON object on a line: context, text, length, finished, message, duration_seconds, and with
return_logits the logits that each token was chosen from. Prompts share batches, so the duration is the mean.

Under a launcher, the processes share the model as model_parallel_size and pipe_parallel_size say, or for precompute
the documents; the first one writes.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from castalia.config.files import write_text
from castalia.config.gptneox_given import Given
from castalia.errors import UserError

if TYPE_CHECKING:
    from castalia.data.tokenizer import Tokenizer
    from castalia.generate.decoder import Decoder

DEFAULTS: dict[str, Any] = {
    "maximum_tokens": 64,
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 0.0,
    "num_samples": 1,
    "prompt_end": "\n",
    "seed": 1234,
}
_NOT_STARTED = "WARNING: text generation did not start; try different batching or adjust parameters"


def generate_as_gptneox(folder: str, given: Given) -> Iterator[str]:
    """Generate as the merged settings say; yields lines for the terminal.

    Args:
        folder: a run of ours.
        given: GPT-NeoX's settings, merged and not translated.

    Raises:
        UserError: a setting is wrong, or there is nothing to generate from.
    """
    values = {key: _number(given, key, default) for key, default in DEFAULTS.items()}
    source = given.values.get("sample_input_file")
    kind = given.values.get("text_gen_type") or ("input-file" if source else "unconditional")
    if kind not in ("unconditional", "input-file", "interactive", "precompute"):
        given.fail("text_gen_type", f"is {str(kind)!r}: use unconditional, input-file, interactive or precompute")
    values["return_logits"] = bool(given.values.get("return_logits"))
    if kind == "input-file" and not source:
        raise UserError("text_gen_type input-file needs 'sample_input_file', a file of prompts: add it")
    if source and kind != "input-file":
        print(f"castalia: sample_input_file {source} is not read, since text_gen_type is {kind}", file=sys.stderr)
    prompts = (
        read_prompts("sample_input_file", str(source), values["prompt_end"])
        if kind == "input-file"
        else [""] * values["num_samples"]
    )

    step = given.values.get("iteration")
    if step is not None and not isinstance(step, int):
        given.fail("iteration", f"must be a whole number, got {step!r}")
    with ExitStack() as stack:
        if kind == "precompute":
            yield from _precompute(folder, step, given, stack)
            return
        decoder, tokenizer, first = _opened(folder, step, given, stack)
        if kind == "interactive":
            if not first or decoder.links is not None:
                raise UserError("text_gen_type interactive asks one process: start it without a launcher")
            yield from _interactive(decoder, tokenizer, values)
            return
        records = [json.dumps(r, ensure_ascii=False) for r in _records(decoder, tokenizer, prompts, values)]
        if not first:
            return
    target = given.values.get("sample_output_file")
    target = target or (f"{source}.output.jsonl" if kind == "input-file" else None)
    if target is None:
        yield from records
        return
    write_text(str(target), "".join(f"{record}\n" for record in records))
    yield f"{len(records)} continuations: {target}"


def _opened(folder: str, step: int | None, given: Given, stack: ExitStack) -> tuple[Decoder, Tokenizer, bool]:
    """The decoder, the tokenizer, and whether this process speaks; under a launcher, of the settings' layout."""
    from castalia.config.schema_parallel import ParallelConfig
    from castalia.parallel.world import launched
    from castalia.tools.decoding import opened

    layout = None
    if launched():
        sizes = {k: given.values.get(k) or 1 for k in ("model_parallel_size", "pipe_parallel_size")}
        for key, value in sizes.items():
            if not isinstance(value, int):
                given.fail(key, f"must be a whole number, got {value!r}")
        layout = ParallelConfig(tensor=sizes["model_parallel_size"], pipeline=sizes["pipe_parallel_size"])
    decoder, tokenizer = stack.enter_context(opened(folder, step, "fp32", layout))
    return decoder, tokenizer, os.environ.get("RANK", "0") == "0"


def _number(given: Given, key: str, default: Any) -> Any:
    value = given.values.get(key)
    if value is None:
        return default
    number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = isinstance(value, str) if isinstance(default, str) else number and value >= 0
    if not fits or (isinstance(default, int) and not isinstance(value, int)):
        given.fail(key, f"is {value!r}: give {'text' if isinstance(default, str) else 'a number from 0 on'}")
    return value


def read_prompts(name: str, path: str, end: str) -> list[str]:
    """The prompts of a file, stripped; `name` is the setting that named it."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{name}: {path} cannot be read as text: {error}") from None
    prompts = [part.strip() for part in text.split(end or "\n")]
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise UserError(f"{name}: {path} has no prompts")
    return prompts


def _records(
    decoder: Decoder, tokenizer: Tokenizer, prompts: list[str], values: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    from castalia.generate.engine import generate

    # Temperature 0 is greedy, but with top-k or top-p it samples at 1, as in GPT-NeoX.
    temperature = values["temperature"] or (1.0 if values["top_k"] or values["top_p"] else 0.0)
    # As GPT-NeoX: up to the end of the context, however many tokens were asked for.
    longest = decoder.cfg.max_position_embeddings or 0
    rooms = [longest - max(len(tokenizer.encode(prompt)), 1) for prompt in prompts]
    began = time.perf_counter()
    results = generate(
        decoder,
        tokenizer,
        prompts,
        [max(min(values["maximum_tokens"], room), 1) for room in rooms],
        temperature=float(temperature),
        top_k=values["top_k"] or None,
        top_p=values["top_p"] or None,
        seed=values["seed"],
        keep_logits=values["return_logits"],
    )
    seconds = (time.perf_counter() - began) / len(prompts)
    for result in results:
        finished = result.finish_reason == "stop"
        length = len(result.tokens) - finished
        logits = {} if result.logits is None else {"logits": result.logits.tolist()}
        yield {
            "context": result.prompt,
            "text": result.text if length else None,
            "length": length,
            "finished": finished,
            "message": None if length else _NOT_STARTED,
            "duration_seconds": seconds,
            **logits,
        }


def _interactive(decoder: Decoder, tokenizer: Tokenizer, values: dict[str, Any]) -> Iterator[str]:
    """Prompts from standard input, up to its end, or to a line that holds prompt_end."""
    end, number = values["prompt_end"], 0
    while True:
        print("Context prompt >>> ", end="", flush=True)
        lines = []
        for line in sys.stdin:
            before, found, _ = line.rstrip("\n").partition(end)
            lines.append(before)
            if end == "\n" or found:
                break
        if not lines:
            return
        (record,) = _records(decoder, tokenizer, ["\n".join(lines)], values | {"seed": values["seed"] + number})
        number += 1
        yield f"Generated Text: {record['text'] or ''}"


def _precompute(folder: str, step: int | None, given: Given, stack: ExitStack) -> Iterator[str]:
    """A data set of log-probabilities beside each that the settings name; what is there already stays."""
    from castalia.data.store import is_finished
    from castalia.evaluate.team import Ranks
    from castalia.generate.load import load_run
    from castalia.parallel.world import enter_world, joined, launched
    from castalia.tools.logprobs import write_logprobs

    paths: list[str] = []
    for key in ("train_data_paths", "valid_data_paths", "test_data_paths"):
        value = given.values.get(key) or []
        paths += [value] if isinstance(value, str) else list(value)
    if not paths:
        raise UserError("text_gen_type precompute needs train_data_paths, valid_data_paths or test_data_paths: add one")
    team = None
    if launched():
        world = enter_world("cpu")
        stack.enter_context(joined(world))
        team = Ranks.of(world)
    model, _ = load_run(folder, step=step)
    name = given.values.get("precompute_model_name") or Path(folder).name
    length = given.values.get("seq_length") or model.cfg.max_position_embeddings
    targets = {path: f"{path}_{name}" for path in dict.fromkeys(paths)}
    there = {target for target in targets.values() if is_finished(target)}
    if team is not None:  # nobody begins to write before all have looked
        import torch

        team.total(torch.zeros(1))
    for path, target in targets.items():
        if target in there:
            lines = f"{target} is there already"
        else:
            number = write_logprobs(model, path, target, int(length or 2048), padded=True, team=team)
            lines = f"log-probabilities of {number} documents: {target}"
        if team is None or team.rank == 0:
            yield lines
