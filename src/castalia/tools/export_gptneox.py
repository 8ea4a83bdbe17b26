"""A run, or a GPT-NeoX checkpoint of any layout -> a folder that GPT-NeoX loads, at any tensor-parallel degree.

    run, checkpoint, global_stepN ─a row of the table at a time─> shards ─> FOLDER/latest
                                                                            FOLDER/global_stepN/configs/NAME.yml
        sequential: mp_rank_RR_model_states.pt      (all layers, `sequential.I.NAME`)
        pipeline:   layer_II-model_RR-model_states.pt  and mp_rank files without weights

Per layer, memory is bounded by the largest one. The weights of a sequential file wait in scratch files until
it can be written. The folder gets its name after what was written has been read again and is what it was
made from.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from castalia.checkpoint import find_checkpoint, load_weights, read_state, tensor_shapes, verify_checkpoint
from castalia.checkpoint.layout import MANIFEST
from castalia.config import ModelConfig
from castalia.config.load import check_values
from castalia.convert.gptneox import GPTNeoXFiles, merge_row, merged, open_gptneox
from castalia.convert.gptneox_settings import Layout, model_of, read_settings, settings_of
from castalia.convert.gptneox_table import Naming, NeoXRow, check_ranks, split_shards, table
from castalia.convert.table import to_ours, to_theirs
from castalia.errors import CheckFailed, UserError
from castalia.model.positions import alibi_slopes
from castalia.train.start import kind_of

_NAMING: dict[Layout, Naming] = {"v1.0": "v2.0", "v2.0": "v2.0", "main": "main"}


@dataclass(frozen=True)
class _Source:
    """Where weights come from: `read` gives tensors of ours by name."""

    model: ModelConfig
    iteration: int
    read: Callable[[Sequence[str]], dict[str, Tensor]]
    keys: Mapping[str, Any]
    name: str
    tokenizer: Path | None = None


def export_gptneox(
    source: Path,
    output: Path,
    *,
    tensor: int = 1,
    pipeline: int = 0,
    layout: Layout = "main",
    step: int | None = None,
    configs: Sequence[Path] = (),
    say: Callable[[str], None] | None = None,
) -> Path:
    """Write a checkpoint for GPT-NeoX: weights, iteration and the model's configuration, no optimizer.

    Args:
        source: a run or checkpoint of ours, or GPT-NeoX's (save folder, global_stepN, one file).
        output: the folder to make; must not exist.
        tensor: tensor-parallel degree.
        pipeline: 0: the sequential layout; else the per-layer one, for so many stages.
        layout: for which release.
        step: of the run's or save folder's checkpoints; None: the newest.
        configs: a GPT-NeoX source's configuration, where its folder has no `configs`.
        say: told what is being done now.

    Returns:
        The folder global_stepN.

    Raises:
        UserError: the output exists, GPT-NeoX has no such model, the degree does not divide it.
        CheckFailed: what was written is not what was read; nothing is left behind.
    """
    if output.exists():
        raise UserError(f"{output}: exists already: choose another folder, or remove it")
    if tensor < 1 or pipeline < 0:
        raise UserError("--tensor is at least 1, and --pipeline at least 0")
    if layout == "v2.0" and pipeline == 1:
        raise UserError("--pipeline 1: GPT-NeoX v2.0 reads one file per rank then: leave it out, or give 2 or more")
    theirs = source.is_file() or kind_of(source) == "gptneox"
    if configs and not theirs:
        raise UserError(f"--config: {source} is a run of Castalia, which knows its configuration: leave it out")
    opened = _from_gptneox(source, step, configs, layout) if theirs else _from_castalia(source, step, layout)
    model = opened.model
    sizes = {"num_attention_heads": model.num_attention_heads, "num_kv_heads": model.kv_heads}
    sizes |= {"intermediate_size": model.mlp_size, "hidden_size": model.hidden_size}
    odd = next((name for name, size in sizes.items() if size % tensor), None)
    if odd is not None:
        raise UserError(f"--tensor {tensor}: does not divide model.{odd}, which is {sizes[odd]}: choose one that does")
    check_ranks(model, tensor)
    writing = output.with_name(f".writing-{output.name}")
    shutil.rmtree(writing, ignore_errors=True)
    folder = writing / f"global_step{opened.iteration}"
    try:
        (folder / "configs").mkdir(parents=True)
        if say is not None:
            say("writing the weights")
        vocabulary = _write(opened, folder, writing / "scratch", tensor, pipeline, layout)
        _write_settings(opened, output, writing, folder, tensor, pipeline, layout, vocabulary)
        if say is not None:
            say("reading them again")
        _check(opened, folder, layout)
        shutil.rmtree(writing / "scratch", ignore_errors=True)
        os.replace(writing, output)
    finally:
        shutil.rmtree(writing, ignore_errors=True)
    return output / folder.name


def _from_castalia(source: Path, step: int | None, layout: Layout) -> _Source:
    if (source / MANIFEST).is_file():
        if step is not None:
            raise UserError(f"{source} is one checkpoint: leave --step out, or give the run's folder")
        problems = verify_checkpoint(source)
        if problems:
            raise UserError(f"{problems[0]}: choose another checkpoint")
        path = source
    else:
        found = find_checkpoint(source / "checkpoints" if (source / "checkpoints").is_dir() else source, step)
        if found is None:
            raise UserError(f"{source} has no checkpoint yet: let that run save one, or name another")
        path = found.path
    state = read_state(path)
    config = check_values(state["config"], str(path))
    model = config.model.model_copy(update={"max_position_embeddings": config.max_positions})
    shapes = tensor_shapes(path)

    def read(names: Sequence[str]) -> dict[str, Tensor]:
        tensors = {f"model.{n}": torch.empty(shapes.get(f"model.{n}", ())) for n in names}
        load_weights(path, tensors, only="\0")  # no name begins so: these tensors alone
        return {n: tensors[f"model.{n}"] for n in names}

    tokenizer = next((f for f in (path / "tokenizer.json", path.parents[1] / "tokenizer.json") if f.is_file()), None)
    return _Source(model, state["step"], read, settings_of(model, layout), config.name, tokenizer)


def _from_gptneox(source: Path, step: int | None, configs: Sequence[Path], layout: Layout) -> _Source:
    files = open_gptneox(source, step)
    folder = files.folder if files.folder.is_dir() else files.folder.parent
    found = list(configs) or sorted(f for f in (folder / "configs").glob("*") if f.suffix in (".yml", ".yaml", ".json"))
    if not found:
        raise UserError(f"{folder}: has no folder configs, so its model is not known: give its files with --config")
    given = read_settings(found, files.naming == "v2.0")
    model = model_of(given, str(found[0]))
    keys = given.values | settings_of(model, layout) | {"seq_length": given.required("seq_length")}
    if "num_kv_heads" in keys and layout != "main":
        keys.pop("num_kv_heads")
    return _Source(model, files.iteration, _reader(files, model), keys, found[0].stem)


def _reader(files: GPTNeoXFiles, model: ModelConfig) -> Callable[[Sequence[str]], dict[str, Tensor]]:
    """Reads by our names, a row at a time, in the order in which the rows come or over again."""
    rows = {name: row for row in table(model, files.naming) for name in row.ours}
    next(merged(files, model))  # refuses what does not fit, before anything is written

    def read(names: Sequence[str]) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name in names:
            if name not in tensors:
                row = rows[name]
                kinds = {n: files.ranks[0][n].dtype for n in row.theirs}
                part = merge_row(row, files.ranks, model)
                whole = {n: tensor.to(kinds[n]) for n, tensor in part.items()}
                tensors |= to_ours([row], whole, str(files.folder))
        return {name: tensors[name] for name in names}

    return read


def _write(source: _Source, folder: Path, scratch: Path, tensor: int, pipeline: int, layout: Layout) -> int:
    """All tensors; returns the rows of the embedding."""
    model = source.model
    rows = table(model, _NAMING[layout])
    waiting: dict[int, int] = {}  # module -> names that are still to come
    for row in rows:
        for name in row.theirs:
            waiting[_module(name)] = waiting.get(_module(name), 0) + 1
    ranks: list[dict[str, Tensor]] = [{} for _ in range(tensor)]
    vocabulary = 0
    for row in rows:
        whole = to_theirs([row], source.read(row.ours), "the weights")
        for name in row.theirs:
            if row.ours == ("embedding.weight",):
                vocabulary = len(whole[name])
                if vocabulary % tensor:
                    raise UserError(f"--tensor {tensor}: does not divide the vocabulary of {vocabulary} rows")
            for rank, part in enumerate(split_shards(row, whole[name], tensor, model.residual == "parallel")):
                kept = part.clone() if pipeline else _spooled(scratch / str(rank), name, part)
                ranks[rank][name] = kept
            waiting[_module(name)] -= 1
        if pipeline:
            for index in [index for index, left in waiting.items() if not left]:
                del waiting[index]
                _write_layer(folder, index, ranks, model, layout)
    for rank in range(max(pipeline, 1) * tensor):
        module = None
        if not pipeline:
            ranks[rank] |= {
                n: b for i in range(model.num_layers + 2) for n, b in _buffers(model, layout, i, rank, tensor)
            }
            module = {f"sequential.{name}": held for name, held in _ordered(ranks[rank]).items()}
        head = _head(source, tensor, vocabulary, layout) | {"module": module}
        _save(head, folder / f"mp_rank_{rank:02d}_model_states.pt")
    return vocabulary


def _ordered(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As modules list their parameters: module by module, a bias after its weight."""
    places: dict[str, int] = {}
    for name in state:
        places.setdefault(name.rpartition(".")[0], len(places))
    return dict(sorted(state.items(), key=lambda item: (_module(item[0]), places[item[0].rpartition(".")[0]])))


def _module(name: str) -> int:
    return int(name.split(".", 1)[0])


def _write_layer(folder: Path, index: int, ranks: list[dict[str, Tensor]], model: ModelConfig, layout: Layout) -> None:
    for rank, state in enumerate(ranks):
        names = [name for name in _ordered(state) if _module(name) == index]
        content = {name.split(".", 1)[1]: state.pop(name) for name in names}
        content |= {name.split(".", 1)[1]: b for name, b in _buffers(model, layout, index, rank, len(ranks))}
        _save(content, folder / f"layer_{index:02d}-model_{rank:02d}-model_states.pt")


def _buffers(model: ModelConfig, layout: Layout, index: int, rank: int, ranks: int) -> list[tuple[str, Tensor]]:
    """What follows from the configuration, and stands in their files all the same."""
    found: list[tuple[str, Tensor]] = []
    if index == 0 and model.position == "sinusoidal":
        found.append(("0.position_embeddings.inv_freq", _frequencies(model.hidden_size, 10000.0)))
    if 2 <= index < model.num_layers + 2:
        if model.position == "rotary" and layout != "main":
            size = int(model.head_size * model.rotary_fraction)
            found.append((f"{index}.attention.rotary_emb.inv_freq", _frequencies(size, model.rotary_base)))
        if model.position == "alibi":
            slopes = torch.tensor(alibi_slopes(model.num_attention_heads)).chunk(ranks)[rank]
            found.append((f"{index}.attention.alibi_embed.slopes", slopes.clone()))
    return found


def _frequencies(size: int, base: float) -> Tensor:
    return 1.0 / base ** (torch.arange(0, size, 2).float() / size)


def _spooled(folder: Path, name: str, tensor: Tensor) -> Tensor:
    """The same tensor in a file, from which its pages come and go."""
    folder.mkdir(parents=True, exist_ok=True)
    if not tensor.numel():
        return tensor.clone()
    kept = torch.from_file(str(folder / name), shared=True, size=tensor.numel(), dtype=tensor.dtype)
    return kept.view(tensor.shape).copy_(tensor)


def _head(source: _Source, tensor: int, vocabulary: int, layout: Layout) -> dict[str, Any]:
    """What GPT-NeoX looks for beside the weights, and holds against its configuration."""
    step, keys = source.iteration, source.keys
    args = {
        name: keys[name] for name in ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings")
    }
    args |= {
        "make_vocab_size_divisible_by": vocabulary // tensor,
        "padded_vocab_size": vocabulary,
        "tokenizer_type": keys.get("tokenizer_type", "HFTokenizer"),
        "model_parallel_size": tensor,
    }
    none = ("optimizer", "lr_scheduler", "param_shapes", "data_sampler", "random_ltd")
    modules = "csr_tensor_module_names" if layout == "v1.0" else "sparse_tensor_module_names"
    return {
        **dict.fromkeys(none),
        **{"buffer_names": [], modules: [], "skipped_steps": 0, "global_steps": step, "global_samples": 0},
        **{"dp_world_size": 1, "mp_world_size": tensor, "iteration": step, "args": args},
    }


def _write_settings(
    source: _Source,
    output: Path,
    writing: Path,
    folder: Path,
    tensor: int,
    pipeline: int,
    layout: Layout,
    vocabulary: int,
) -> None:
    keys = dict(source.keys) | {
        "model_parallel_size": tensor,
        # v2.0 takes 0 and 1 for the sequential layout, the others 0 alone.
        "pipe_parallel_size": pipeline,
        "make_vocab_size_divisible_by": vocabulary // tensor,
        "load": str(output),
        "save": str(output),
    }
    keys.pop("padded_vocab_size", None)
    keys.setdefault("tokenizer_type", "HFTokenizer")
    if source.tokenizer is not None:
        shutil.copyfile(source.tokenizer, writing / "tokenizer.json")
        keys["vocab_file"] = str(output / "tokenizer.json")
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in keys.items() if value is not None]
    text = f"# for GPT-NeoX {layout}; JSON values are YAML too\n" + "\n".join(lines) + "\n"
    (folder / "configs" / f"{source.name}.yml").write_text(text, encoding="utf-8")
    (writing / "latest").write_text(folder.name, encoding="utf-8")


def _save(content: Any, path: Path) -> None:
    with path.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def _check(source: _Source, folder: Path, layout: Layout) -> None:
    """Hold what was written against what it was made from, row by row."""
    for row, part in merged(open_gptneox(folder), source.model):
        for name, mine in source.read(row.ours).items():
            same = torch.equal(part[name].float(), mine.float())
            if not same and _halved(row):  # shares of the smallest numbers cannot be halved exactly
                same = torch.allclose(part[name].float(), mine.float(), rtol=1e-3, atol=1e-6)
            if not same:
                raise CheckFailed(f"{name}: is not what it was made from when it is read again: nothing was written")


def _halved(row: NeoXRow) -> bool:
    return row.sharding == "row_bias"
