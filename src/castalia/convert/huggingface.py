"""Our weights and model section <-> those of transformers' classes for causal language models.

    weights      ──rows of the architecture──>  state dict      (names of transformers' classes)
    ModelConfig  ──fields──────────────────────>  config.json

Which class a model is follows from its configuration; one that is none of them is refused with the
fields that stand in the way. The classes are described in huggingface_gpt.py and huggingface_llama.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from castalia.config import ModelConfig
from castalia.convert.huggingface_gpt import GPT_ARCHITECTURES
from castalia.convert.huggingface_llama import LLAMA_ARCHITECTURES
from castalia.convert.huggingface_parts import Architecture
from castalia.convert.table import Row, check_names, row_to_ours, to_theirs
from castalia.errors import UserError

ARCHITECTURES: dict[str, Architecture] = {a.model_type: a for a in (*GPT_ARCHITECTURES, *LLAMA_ARCHITECTURES)}

# Buffers of older releases, which follow from the configuration.
_IGNORED = re.compile(r"\.(attention|attn)\.(bias|masked_bias)$|\.rotary_emb\.inv_freq$")
_NEAREST = 2
_THEIRS = "the Hugging Face weights"


def to_huggingface(weights: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Our weights under transformers' names, dtypes as they are. A tied model's has no output matrix.

    Modules that look further ahead stay behind: a model that generates never runs them.

    Raises:
        UserError: no class of transformers computes this model; a weight is missing or left over.
    """
    own = {name: tensor for name, tensor in weights.items() if not name.startswith("mtp.")}
    return to_theirs(architecture_of(model).rows(model), own, "the weights")


def from_huggingface(state_dict: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """transformers' weights under our names, as fp32; the inverse of `to_huggingface`.

    Raises:
        UserError: a tensor is missing, left over, or does not fit the configuration.
    """
    plan = import_plan(state_dict, model)
    plan.check_tied(state_dict)
    return {
        name: tensor.float()
        for row in plan.rows
        for name, tensor in row_to_ours(row, {n: state_dict[plan.stored[n]] for n in row.theirs}, _THEIRS).items()
    }


@dataclass(frozen=True)
class ImportPlan:
    """How the tensors of a Hugging Face folder become ours, by their names alone.

    Attributes:
        rows: the table.
        stored: name in the table -> name in the files.
        tied: names in the files of an output matrix that should equal the embedding, and of the embedding.
    """

    rows: list[Row]
    stored: dict[str, str]
    tied: tuple[str, str] | None

    def check_tied(self, weights: Mapping[str, Tensor]) -> None:
        """Refuse an output matrix of its own in a model that ties it."""
        if self.tied is not None and not torch.equal(*(weights[name] for name in self.tied)):
            raise UserError(
                f"{self.tied[0]}: differs from {self.tied[1]}, though the configuration ties them: "
                "set model.tie_embeddings=false"
            )


def import_plan(names: Iterable[str], model: ModelConfig) -> ImportPlan:
    """Find each of the table's tensors among the names of a folder's files.

    Buffers of older releases are passed over, and files that were written from the bare model, without
    `transformer.` or its like in front of each name, are read as well (GPT-2's first release is one).

    Raises:
        UserError: a tensor is missing or left over.
    """
    architecture = architecture_of(model)
    rows = architecture.rows(model)
    prefix = rows[0].theirs[0].split(".")[0] + "."
    found = [name for name in names if not _IGNORED.search(name)]
    bare = not any(name.startswith(prefix) for name in found)
    head, *others = architecture.heads
    stored = {}
    for name in found:
        full = head if name in others else name
        stored[prefix + full if bare and full not in architecture.heads else full] = name
    tied = None
    if model.tie_embeddings and head in stored:
        embedding = next(row.theirs[0] for row in rows if row.ours == ("embedding.weight",))
        theirs = stored.pop(head)
        tied = (theirs, stored[embedding]) if embedding in stored else None
    check_names([name for row in rows for name in row.theirs], stored, _THEIRS)
    return ImportPlan(rows, stored, tied)


def huggingface_config(model: ModelConfig, *, eod: int | None = None, dtype: str = "float32") -> dict[str, Any]:
    """config.json of a model.

    Args:
        model: complete: vocab_size and max_position_embeddings are not null.
        eod: the end-of-document id, which is where their texts begin and end.
        dtype: of the weights beside it, in torch's spelling.

    Raises:
        UserError: no class of transformers computes this model, or it is not complete.
    """
    for key in ("vocab_size", "max_position_embeddings"):
        if getattr(model, key) is None:
            raise UserError(f"model.{key}: an export needs it: give the configuration of the run's folder")
    architecture = architecture_of(model)
    return {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "vocab_size": model.vocab_size,
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.init_std,
        "bos_token_id": eod,
        "eos_token_id": eod,
        "use_cache": True,
        "torch_dtype": dtype,
    } | architecture.settings(model)


def model_config_fields(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of our model section that a config.json determines.

    Raises:
        UserError: another architecture, or settings that we have nothing for.
    """
    model_type = hf_config.get("model_type")
    if hf_config.get("quantization_config"):
        method = hf_config["quantization_config"].get("quant_method", "unknown")
        raise UserError(
            f"quantization_config: weights quantised by {method} cannot be imported: take the release they were made of"
        )
    if model_type not in ARCHITECTURES:
        raise UserError(f"model_type: '{model_type}' cannot be imported: known are {', '.join(sorted(ARCHITECTURES))}")
    try:
        common = {
            "vocab_size": hf_config["vocab_size"],
            "tie_embeddings": bool(hf_config.get("tie_word_embeddings", False)),
        }
        return common | ARCHITECTURES[model_type].fields(hf_config)
    except KeyError as error:
        raise UserError(f"config.json: has no {error.args[0]}: fetch it again") from None


def architecture_of(model: ModelConfig) -> Architecture:
    """Which class of transformers computes this model.

    Raises:
        UserError: none does; the message says what stands in the way of the nearest ones.
    """
    obstacles = [(architecture, architecture.obstacles(model)) for architecture in ARCHITECTURES.values()]
    nearest = sorted(obstacles, key=lambda item: len(item[1]))
    if not nearest[0][1]:
        return nearest[0][0]
    reasons = [f"{architecture.class_name} needs {', '.join(texts)}" for architecture, texts in nearest[:_NEAREST]]
    raise UserError(f"model: Hugging Face's classes do not compute it ({'; '.join(reasons)}): export it as GPT-NeoX")
