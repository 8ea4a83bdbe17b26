"""A GPT-NeoX checkpoint, as DeepSpeed wrote it -> our weights and Adam's moments by canonical name.

    sequential layout   mp_rank_RR_model_states.pt         every layer, keys `sequential.I.NAME`
    pipeline layout     layer_II-model_RR-model_states.pt  one layer, bare keys   (+ mp_rank_*: the rest)

The layout is found from the files that are there, since releases differ in which they write. The
weights are read as they are; optimizer states only where DeepSpeed keeps plain torch ones (no ZeRO).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from castalia.config import ModelConfig
from castalia.convert.gptneox_table import Naming, NeoXRow, check_ranks, merge_shards, naming_of, table
from castalia.convert.table import check_names, to_ours
from castalia.convert.torch_file import load_pt
from castalia.errors import UserError

# Buffers that follow from the configuration, and Transformer Engine's bookkeeping.
_IGNORED = re.compile(
    r"\.rotary_emb\.inv_freq$|\.position_embeddings\.inv_freq$|\.alibi_embed\.slopes$|\._extra_state$"
)

# One parameter that stands under every layer.
_SHARED = re.compile(r"\.attention\.rpe\.weight$")


@dataclass(frozen=True)
class GPTNeoXState:
    """What a GPT-NeoX checkpoint holds that matters here.

    Attributes:
        weights: fp32, by canonical name.
        optimizer: canonical name -> exp_avg, exp_avg_sq (fp32, shaped like the weight) and step; None if
            the checkpoint has no plain Adam state (before the first step, ZeRO, another optimizer).
        iteration: optimizer steps done.
        args: what GPT-NeoX noted of its settings (num_layers, hidden_size, ...).
    """

    weights: dict[str, Tensor]
    optimizer: dict[str, dict[str, Tensor]] | None
    iteration: int
    args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class GPTNeoXFiles:
    """An open checkpoint: its tensors are mapped from the files, so that none is read before it is used.

    Attributes:
        folder: `global_stepN`, or the one file.
        ranks: of each tensor-parallel rank the tensors by `I.NAME`, whichever the layout.
        heads: what the mp_rank files hold.
        pipeline: whether each layer has files of its own.
    """

    folder: Path
    ranks: list[dict[str, Tensor]]
    heads: list[Mapping[str, Any]]
    pipeline: bool

    @property
    def naming(self) -> Naming:
        """Which release's names."""
        return naming_of(self.ranks[0])

    @property
    def iteration(self) -> int:
        """Optimizer steps done."""
        head = self.heads[0]
        return int(head.get("iteration", head.get("total_iters", head.get("global_steps", 0))))

    @property
    def args(self) -> dict[str, Any]:
        """What GPT-NeoX noted of its settings."""
        return dict(self.heads[0].get("args") or {})


def open_gptneox(path: Path, step: int | None = None) -> GPTNeoXFiles:
    """Open a GPT-NeoX checkpoint; for `path` and `step` see `load_gptneox_checkpoint`.

    Raises:
        UserError: nothing there, or a file is damaged or could run code.
    """
    path = Path(path)
    folder = path if path.is_file() else _step_folder(path, step)
    heads = [path] if path.is_file() else _files(folder, r"mp_rank_(\d+)_model_states\.pt")
    if not heads:
        if path.is_dir() and list(folder.glob("zero_pp_rank_*_model_states.pt")):
            raise UserError(
                f"{folder}: ZeRO 3 spread the weights over its ranks' files, which are not read: gather them with "
                "DeepSpeed's zero_to_fp32 first"
            )
        raise UserError(f"{folder}: holds no mp_rank_*_model_states.pt: give the folder global_stepN of a checkpoint")
    loaded = [_mapping(load_pt(file), file) for file in heads]
    ranks, pipeline = _rank_modules(folder, heads, loaded)
    return GPTNeoXFiles(folder, ranks, loaded, pipeline)


def merged(files: GPTNeoXFiles, model: ModelConfig) -> Iterator[tuple[NeoXRow, dict[str, Tensor]]]:
    """Our weights, row by row of the table, of whatever dtype they have there (fp32 where ranks were summed).

    Raises:
        UserError: tensors that do not fit the model.
    """
    _check_args(files.args, model, files.folder)
    check_ranks(model, len(files.ranks))
    rows = table(model, files.naming)
    unused = {name for row in rows if not row.ours for name in row.theirs}
    rows = [row for row in rows if row.ours]
    yield from _merged_rows(rows, _without(files.ranks, unused), model, str(files.folder))


def _merged_rows(
    rows: Sequence[NeoXRow],
    ranks: Sequence[Mapping[str, Tensor]],
    model: ModelConfig,
    what: str,
    moment: bool = False,
) -> Iterator[tuple[NeoXRow, dict[str, Tensor]]]:
    """Each row's tensors of ours; no more than one row is whole at a time."""
    for tensors in ranks:
        check_names([name for row in rows for name in row.theirs], tensors, what)
    for row in rows:
        yield row, to_ours([row], merge_row(row, ranks, model, moment), what)


def merge_row(
    row: NeoXRow, ranks: Sequence[Mapping[str, Tensor]], model: ModelConfig, moment: bool = False
) -> dict[str, Tensor]:
    """The whole tensors of one row by their names."""
    parallel = model.residual == "parallel"
    shards = {name: [tensors[name] for tensors in ranks] for name in row.theirs}
    return {name: merge_shards(row, some, parallel, model.hidden_size, moment) for name, some in shards.items()}


def load_gptneox_checkpoint(path: Path, model: ModelConfig, step: int | None = None) -> GPTNeoXState:
    """Read a GPT-NeoX checkpoint, of any tensor-parallel size, in either layout.

    Args:
        path: a run's `save` folder (then `latest` or `step` chooses), one `global_stepN` folder, or the one
            file of a checkpoint without parallelism.
        model: what was trained, for example translated from the run's configuration.
        step: which global_step of a `save` folder.

    Raises:
        UserError: nothing there, tensors that do not fit the model, files that could run code.
    """
    files = open_gptneox(path, step)
    weights = {
        name: tensor.to(torch.float32, copy=True) for _, part in merged(files, model) for name, tensor in part.items()
    }
    rows = table(model, files.naming)
    unused = {name for row in rows if not row.ours for name in row.theirs}
    used = [row for row in rows if row.ours]
    optimizer = _optimizer(used, unused, files.ranks, files.heads, model, files.folder)
    return GPTNeoXState(weights, optimizer, files.iteration, files.args)


def _step_folder(path: Path, step: int | None) -> Path:
    if not path.is_dir():
        raise UserError(f"{path}: there is no such file or folder: check the path")
    if step is not None:
        folder = path / f"global_step{step}"
    elif (path / "latest").is_file():
        folder = path / Path((path / "latest").read_text(encoding="utf-8").strip()).name
    else:
        return path
    if not folder.is_dir():
        there = ", ".join(sorted(p.name for p in path.glob("global_step*"))) or "none"
        raise UserError(f"{path}: there is no {folder.name}: choose one of those there ({there})")
    return folder


def _files(folder: Path, pattern: str) -> list[Path]:
    """Files of a folder by the numbers in their names."""
    found = [(tuple(map(int, m.groups())), p) for p in folder.iterdir() if (m := re.fullmatch(pattern, p.name))]
    return [file for _, file in sorted(found)]


def _mapping(content: Any, file: Path) -> Mapping[str, Any]:
    if not isinstance(content, Mapping):
        raise UserError(f"{file}: is no part of a GPT-NeoX checkpoint (a {type(content).__name__}): check the path")
    return content


def _rank_modules(
    folder: Path, heads: list[Path], loaded: list[Mapping[str, Any]]
) -> tuple[list[dict[str, Tensor]], bool]:
    """Each tensor-parallel rank's tensors by `I.NAME`, and whether layers have files of their own."""
    layers = [] if folder.is_file() else _files(folder, r"layer_(\d+)-model_(\d+)-model_states\.pt")
    if layers:
        numbers = [tuple(map(int, re.findall(r"\d+", f.name)[:2])) for f in layers]
        modules: list[dict[str, Tensor]] = [{} for _ in range(1 + max(rank for _, rank in numbers))]
        for (index, rank), file in zip(numbers, layers, strict=True):
            content = _mapping(load_pt(file), file)
            modules[rank] |= {f"{index}.{name}": tensor for name, tensor in content.items()}
    else:
        modules = []
        for file, content in zip(heads, loaded, strict=True):
            module = _mapping(content.get("module"), file)
            modules.append({name.removeprefix("sequential."): tensor for name, tensor in module.items()})
    return [{n: t for n, t in m.items() if not _IGNORED.search(n)} for m in modules], bool(layers)


def _without(modules: Sequence[dict[str, Tensor]], unused: Collection[str]) -> list[dict[str, Tensor]]:
    return [{name: tensor for name, tensor in module.items() if name not in unused} for module in modules]


def _check_args(args: Mapping[str, Any], model: ModelConfig, folder: Path) -> None:
    for key in ("num_layers", "hidden_size", "num_attention_heads"):
        if key in args and args[key] != getattr(model, key):
            raise UserError(
                f"{folder}: was trained with {key} {args[key]}, but model.{key} is {getattr(model, key)}: "
                "use the configuration that it was trained with"
            )


def _optimizer(
    rows: Sequence[NeoXRow],
    unused: Collection[str],
    modules: Sequence[dict[str, Tensor]],
    loaded: Sequence[Mapping[str, Any]],
    model: ModelConfig,
    folder: Path,
) -> dict[str, dict[str, Tensor]] | None:
    """Adam's moments of each parameter, if they are all here."""
    if len(loaded) != len(modules):  # several pipeline stages, each with an optimizer of its own
        return None
    states = []
    for module, content in zip(modules, loaded, strict=True):
        state = _optimizer_by_name(module, content.get("optimizer"), unused, str(folder))
        if state is None:
            return None
        states.append(state)
    moments = {
        key: {
            name: tensor
            for _, part in _merged_rows(
                rows, [{n: s[key] for n, s in state.items()} for state in states], model, f"{folder} (optimizer)", True
            )
            for name, tensor in part.items()
        }
        for key in ("exp_avg", "exp_avg_sq")
    }
    steps = {our: states[0][row.theirs[0]]["step"] for row in rows for our in row.ours}
    return {
        our: {key: tensors[our].to(torch.float32, copy=True) for key, tensors in moments.items()}
        | {"step": torch.as_tensor(step, dtype=torch.float32).clone()}
        for our, step in steps.items()
    }


def _optimizer_by_name(
    module: Mapping[str, Tensor], optimizer: Any, unused: Collection[str], what: str
) -> dict[str, dict[str, Any]] | None:
    """torch numbers an optimizer's parameters group by group; this finds the name behind each number.

    GPT-NeoX walks its modules in order (as a state dict lists them) and deals their parameters into a group
    with decay and one without: norms and whatever is named `bias`. Without any decay there is one group.
    What is shared by all layers is one parameter, met first in the first of them. Parameters that the model
    does not use have numbers, but usually no state.
    """
    if not isinstance(optimizer, Mapping) or not optimizer.get("state") or "param_groups" not in optimizer:
        return None
    shared = [name for name in module if _SHARED.search(name)]
    parameters = [name for name in module if name not in shared[1:]]
    decayed = [name for name in parameters if not _without_decay(name)]
    others = [name for name in parameters if _without_decay(name)]
    groups = [list(group["params"]) for group in optimizer["param_groups"]]
    names = [parameters] if len(groups) == 1 else [decayed, others]
    if [len(g) for g in groups] != [len(n) for n in names]:
        raise UserError(f"{what}: the optimizer's parameters are not those of the model: import the weights alone")
    found: dict[str, dict[str, Any]] = {}
    for numbers, group in zip(groups, names, strict=True):
        for number, name in zip(numbers, group, strict=True):
            if name in unused:
                continue
            state = optimizer["state"].get(number, {})
            if not {"exp_avg", "exp_avg_sq", "step"} <= state.keys():
                return None
            if state["exp_avg"].shape != module[name].shape:
                raise UserError(
                    f"{what}: the optimizer's state {number} has shape {list(state['exp_avg'].shape)}, "
                    f"but {name} has {list(module[name].shape)}: import the weights alone"
                )
            found[name] = state
    return found | {name: found[shared[0]] for name in shared}


def _without_decay(name: str) -> bool:
    return name.endswith((".bias", ".scale", ".g")) or "norm.weight" in name
