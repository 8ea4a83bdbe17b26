"""Other people's weights -> a run's folder: configuration, one checkpoint of weights, tokenizer, parity.json.

    config.json + safetensors | .bin ─┐ rows of a table, one at a time
    params.json + consolidated.*.pth ─┼──> .writing-NAME ─logits equal the source's?─> NAME
    FILE.gguf, through transformers  ─┤
    global_stepN, of GPT-NeoX        ─┘

What comes out is a run like any other to generate, evaluate, export and start.path. Where the source is in
files that can be read in part, memory holds one row of the table while they are converted.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import castalia
from castalia.checkpoint import save_checkpoint
from castalia.config import Config, ModelConfig
from castalia.config.load import check_values, load
from castalia.config.render import to_yaml
from castalia.convert.huggingface import import_plan, model_config_fields
from castalia.convert.huggingface_files import open_folder
from castalia.convert.huggingface_stream import ours_later
from castalia.convert.llama import LlamaFiles, llama_fields, llama_logits, llama_rows
from castalia.convert.table import check_names
from castalia.data.tokenizer import HFTokenizer, Tokenizer, load_tokenizer
from castalia.errors import UserError
from castalia.generate.load import cast_matrices, load_run
from castalia.model import Transformer
from castalia.tools.export import check_memory, compared, parity_tokens, write_json
from castalia.tools.export_tokenizer import bpe_json
from castalia.train.resume import STATE_VERSION

_LONGEST_SAMPLE = 2048
# Words and special tokens of Llama 3's rank file, as its tokenizer has them.
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_LLAMA3_SPECIAL = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id"}


@dataclass
class _Source:
    """What an import writes.

    Attributes:
        kind, config, tokenizer: of the run.
        tensors: by canonical name; made when they are written where they can be.
        logits: the source's own, of some tokens; None where there is nothing to ask.
        by: what gives them.
        files: further files of the run's folder.
        remarks: what the user should know.
        numbers: parameters that the comparison holds besides our model's own.
    """

    kind: str
    config: Config
    tokenizer: Tokenizer
    tensors: Mapping[str, Any]
    logits: Callable[[Tensor], Tensor] | None
    by: str
    files: dict[str, bytes] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    numbers: int = 0


def import_model(
    source: Path,
    output: Path,
    *,
    check: bool = True,
    say: Callable[[str], None] | None = None,
    tokenizer: str | None = None,
    configs: Sequence[str] = (),
    length: int | None = None,
) -> dict[str, Any]:
    """Make a run of other people's weights.

    Args:
        source: a folder in Hugging Face format, one with original Llama weights, a .gguf file, a GPT-NeoX checkpoint.
        output: the run's folder; must not exist.
        check: compare logits with the source's before the folder gets its name.
        say: told what is being done now.
        tokenizer: in place of the one beside the weights.
        configs: GPT-NeoX's YAML files.
        length: positions, where the source does not say them.

    Returns:
        The figures of parity.json.

    Raises:
        UserError: nothing usable is there, or it has no counterpart here.
        CheckFailed: the source gives other logits; nothing is left behind.
    """
    if output.exists():
        raise UserError(f"{output}: exists already: choose another folder, or remove it")
    say = say or (lambda doing: None)
    say("reading the source")
    reader, transformers_needed = _reader(source, configs, length)
    if check and transformers_needed and importlib.util.find_spec("transformers") is None:
        raise UserError("the import is checked against transformers: pip install 'castalia[export]', or say --no-check")
    found = reader(output.name, tokenizer)
    model = found.config.model
    _check_ids(found)
    if check and found.logits is not None:
        check_memory(found.numbers + sum(prod(t.shape) for t in found.tensors.values()))
    fresh = output.with_name(f".writing-{output.name}")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        fresh.mkdir(parents=True)
        say("writing the weights")
        content = found.tokenizer.file_bytes()
        files = {} if content is None else {"tokenizer.json": content}
        for name, text in {**files, **found.files, "config.yaml": to_yaml(found.config).encode()}.items():
            (fresh / name).write_bytes(text)
        tensors = {f"model.{name}": tensor for name, tensor in found.tensors.items()}
        save_checkpoint(fresh / "checkpoints", 0, tensors, _state(found, source), files=files)
        parity: dict[str, Any] = {"checked": False}
        if check and found.logits is not None:
            say(f"comparing logits with {found.by}")
            mine, _ = load_run(fresh)
            tokens = parity_tokens(found.tokenizer.vocab_size, model.max_position_embeddings)
            with torch.no_grad():
                ours, theirs = mine.logits(mine(tokens)), found.logits(tokens)
            parity = compared(ours, theirs, output.name, found.by, "imported") | {"against": found.by}
        parity |= {"source": str(source), "kind": found.kind, "remarks": found.remarks}
        write_json(fresh / "parity.json", parity)
        os.replace(fresh, output)
    except OSError as error:
        raise UserError(f"{output}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return parity


def _reader(
    source: Path, configs: Sequence[str], length: int | None
) -> tuple[Callable[[str, str | None], _Source], bool]:
    """How to read what is there, and whether transformers is what it is held against."""
    llama, neox = False, False
    if source.suffix == ".gguf" and source.is_file():
        reader: Callable[[str, str | None], _Source] = lambda name, tok: _gguf(source, name, tok)  # noqa: E731
    elif (source / "config.json").is_file():
        reader = lambda name, tok: _huggingface(source, name, tok)  # noqa: E731
    elif (source / "params.json").is_file():
        llama, reader = True, lambda name, tok: _llama(source, name, tok, length)
    elif is_gptneox(source):
        neox, reader = True, lambda name, tok: _gptneox(source, name, tok, configs)
    else:
        if not source.exists():
            raise UserError(f"{source} does not exist: give a folder with weights, or a .gguf file, on this machine")
        raise UserError(
            f"{source}: holds neither config.json (Hugging Face), params.json (Llama) nor a GPT-NeoX checkpoint, and "
            "is no .gguf file: check the path"
        )
    if configs and not neox:
        raise UserError("--config is for GPT-NeoX checkpoints: leave it out, the source has settings of its own")
    if length is not None and not llama:
        raise UserError("--length is for original Llama weights: leave it out, the source says it itself")
    return reader, not (llama or neox)


def is_gptneox(source: Path) -> bool:
    """Whether it is a GPT-NeoX checkpoint."""
    begins = ("global_step", "mp_rank_", "layer_")
    return source.suffix == ".pt" or (source.is_dir() and any(c.name.startswith(begins) for c in source.iterdir()))


def read_gptneox(source: Path, dtype: torch.dtype = torch.float32) -> tuple[Transformer, Tokenizer]:
    """The model and the tokenizer of a GPT-NeoX checkpoint that keeps its settings, without making a run.

    Raises:
        UserError: it says too little, or has no counterpart here.
    """
    try:
        found = _gptneox(source, source.name, None, ())
    except UserError as error:
        raise UserError(f"{error} (`castalia import` makes a run of it, with settings that you name)") from None
    _check_ids(found)
    with torch.device("meta"):
        model = Transformer(found.config.model)
    model.load_state_dict(dict(found.tensors), assign=True)
    cast_matrices(model, dtype)
    return model.eval(), found.tokenizer


def _check_ids(found: _Source) -> None:
    if found.tokenizer.vocab_size > (found.config.model.vocab_size or 0):
        raise UserError(
            f"tokenizer: has {found.tokenizer.vocab_size} ids and the model {found.config.model.vocab_size}: name the "
            "right one to `castalia import`, with --tokenizer"
        )


def _config(name: str, fields: Mapping[str, Any], where: Path) -> Config:
    longest = fields["max_position_embeddings"] - fields.get("position_offset", 0)
    data = {"seq_length": min(longest, _LONGEST_SAMPLE)}
    return check_values({"version": 1, "name": name, "model": dict(fields), "data": data}, str(where))


def _shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(t.shape) for name, t in Transformer(model).state_dict().items()}


def _json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError):
        raise UserError(f"{path}: cannot be read: fetch it again") from None
    return content


def _huggingface(source: Path, name: str, tokenizer: str | None) -> _Source:
    config = _config(name, model_config_fields(_json(source / "config.json")), source / "config.json")
    files = open_folder(source)
    plan = import_plan(files, config.model)
    plan.check_tied(files)
    by_row = _Renamed(files, plan.stored)
    tensors = ours_later(plan.rows, by_row, _shapes(config.model), str(source))

    def logits(tokens: Tensor) -> Tensor:
        import transformers

        transformers.utils.logging.disable_progress_bar()
        theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        answer: Tensor = theirs.eval()(tokens).logits.float()
        return answer

    kept = source / "generation_config.json"
    return _Source(
        "Hugging Face", config, _found_tokenizer(source, tokenizer), tensors, logits, "transformers",
        {kept.name: kept.read_bytes()} if kept.is_file() else {}, numbers=sum(prod(t.shape) for t in tensors.values()),
    )  # fmt: skip


class _Renamed(dict[str, Tensor]):
    """Tensors of files, by the names of the table."""

    def __init__(self, files: Mapping[str, Tensor], stored: Mapping[str, str]) -> None:
        super().__init__()
        self._files, self._stored = files, stored

    def __missing__(self, name: str) -> Tensor:
        return self._files[self._stored[name]]


def _llama(source: Path, name: str, tokenizer: str | None, length: int | None) -> _Source:
    files = LlamaFiles(source)
    fields, remarks = llama_fields(files, length)
    config = _config(name, fields, source / "params.json")
    rows = llama_rows(config.model, files)
    passed_over = {"output.weight"} if config.model.tie_embeddings else set()
    check_names([n for row in rows for n in row.theirs], [n for n in files if n not in passed_over], str(source))
    tensors = ours_later(rows, files, _shapes(config.model), str(source))
    return _Source(
        "original Llama", config, _llama_tokenizer(source, tokenizer), tensors,
        lambda tokens: llama_logits(files, config.model, tokens), "the original formulas", remarks=remarks,
    )  # fmt: skip


def _llama_tokenizer(source: Path, given: str | None) -> Tokenizer:
    path = source / "tokenizer.model"
    if given is None and path.is_file() and path.read_bytes()[:1] not in (b"\n", b""):  # lines of ranks: Llama 3's
        import base64

        try:
            lines = [line.split() for line in path.read_bytes().splitlines() if line]
            ranks = {base64.b64decode(entry, validate=True): int(rank) for entry, rank in lines}
        except ValueError:
            raise UserError(
                f"{path}: is neither a SentencePiece model nor ranks: name another with --tokenizer"
            ) from None
        special = {f"<|{_LLAMA3_SPECIAL.get(i, f'reserved_{i}')}|>": len(ranks) + i for i in range(256)}
        return HFTokenizer(bpe_json(ranks, special, _LLAMA3_WORDS), str(path))
    return _found_tokenizer(source, given)


def _found_tokenizer(folder: Path, given: str | None) -> Tokenizer:
    try:
        return load_tokenizer(given if given is not None else folder.resolve())  # a folder may be called `hf`
    except UserError as error:
        if given is not None:
            raise
        raise UserError(f"{error}; or name another with --tokenizer") from None


def _gguf(source: Path, name: str, tokenizer: str | None) -> _Source:
    for package in ("transformers", "gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{source}: reading a .gguf file needs packages: pip install transformers gguf accelerate")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    where: dict[str, Any] = {"gguf_file": source.name}
    try:
        theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **where)
        spoken: Any = None if tokenizer else transformers.AutoTokenizer.from_pretrained(source.parent, **where)
    except Exception as error:  # of a reader that knows some kinds and layouts of files
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{source}: transformers cannot read it ({said}): take the release that it was made of"
        ) from None
    settings = theirs.config.to_dict()
    settings.pop("quantization_config", None)  # what was quantised is whole numbers of fp32 by now
    config = _config(name, model_config_fields(settings), source)
    state = theirs.state_dict()
    plan = import_plan(state, config.model)
    plan.check_tied(state)
    tensors = ours_later(plan.rows, _Renamed(state, plan.stored), _shapes(config.model), str(source))
    if spoken is None:
        kept = load_tokenizer(str(tokenizer))
    else:
        with tempfile.TemporaryDirectory() as folder:
            spoken.save_pretrained(folder)
            kept = load_tokenizer(folder)
    return _Source(
        "GGUF", config, kept, tensors, lambda tokens: theirs.eval()(tokens).logits.float(), "transformers",
        numbers=sum(prod(t.shape) for t in tensors.values()),
    )  # fmt: skip


def _gptneox(source: Path, name: str, tokenizer: str | None, configs: Sequence[str]) -> _Source:
    from castalia.convert.gptneox import load_gptneox_checkpoint

    paths = list(configs) or _kept_configs(source)
    if not paths:
        raise UserError(f"{source}: keeps no configs/*.yml: name the files it was trained with in --config")
    given = load(paths)
    state = load_gptneox_checkpoint(source, given.model)
    weights = state.weights
    model = given.model.model_copy(
        update={"vocab_size": weights["embedding.weight"].shape[0], "max_position_embeddings": given.max_positions}
    )
    values = given.model_dump() | {"name": name, "output": None, "model": model.model_dump()}
    values["tokenizer"]["path"] = None
    config = check_values(values, str(paths[0]))
    shapes = _shapes(config.model)
    check_names(shapes, weights, str(source))
    spec = tokenizer or given.tokenizer.path
    if spec is None:
        raise UserError(f"{source}: its settings name no tokenizer: name one with --tokenizer")
    remark = f"weights of iteration {state.iteration:,}; there is no implementation of GPT-NeoX to compare logits with"
    return _Source("GPT-NeoX", config, load_tokenizer(spec), weights, None, "", remarks=[remark])


def _kept_configs(source: Path) -> list[str]:
    """The YAML files that GPT-NeoX writes into each of its checkpoints."""
    folder = source.parent if source.is_file() else source
    if (folder / "latest").is_file():
        folder = folder / Path((folder / "latest").read_text(encoding="utf-8").strip()).name
    return sorted(str(path) for path in (folder / "configs").glob("*.y*ml"))


def _state(found: _Source, source: Path) -> dict[str, Any]:
    """state.json of weights that nobody trained here (docs/contracts.md, section 4)."""
    return {
        "version": STATE_VERSION,
        "step": 0,
        "updates": 0,
        "tokens": 0,
        "seconds": 0.0,
        "config": found.config.model_dump(),
        "journal": [],
        "data": {},
        "train_data": [],
        "epochs": [],
        "tokenizer": found.tokenizer.identity(),
        "import": f"weights alone from {source} ({found.kind})",
        "versions": {
            "castalia": castalia.__version__, "torch": torch.__version__, "python": platform.python_version(),
        },
        "git": None,
        "command": None,
        "slim": True,
    }  # fmt: skip
