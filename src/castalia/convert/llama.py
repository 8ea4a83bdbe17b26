"""Original Llama weights (params.json, consolidated.XX.pth), of any number of files -> ours.

    consolidated.00.pth ┐ column-parallel wq wk wv w1 w3 output: rows side by side
    consolidated.01.pth ├ row-parallel    wo w2:                 columns side by side
    ...                 ┘ tok_embeddings: columns (Llama 1, 2) or rows (Llama 3), as the shapes say

Their rotary positions turn neighbouring dimensions against each other, ours the halves of a head: the rows of
queries and keys are permuted, which leaves every score as it is. Written from the format of the released files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from castalia.config import ModelConfig
from castalia.convert.huggingface_files import load_tensors
from castalia.convert.huggingface_gpt import halves
from castalia.convert.table import Row, join_qkv, split_qkv
from castalia.errors import UserError

_BY_ROWS = re.compile(r"\.(wq|wk|wv|w1|w3)\.weight$|^output\.weight$")
_BY_COLUMNS = re.compile(r"\.(wo|w2)\.weight$")
_IGNORED = re.compile(r"^rope\.freqs$")
# Positions that a release was trained for are in none of its files: (what tells it, positions).
_LENGTHS = {"llama 3.1": 131072, "llama 3": 8192, "code llama": 16384, "llama 2": 4096, "llama 1": 2048}


class LlamaFiles(Mapping[str, Tensor]):
    """Whole tensors of original Llama weights, merged when they are asked for.

    Args:
        folder: with params.json and consolidated.XX.pth.

    Raises:
        UserError: files are missing, damaged, or do not belong together.
    """

    def __init__(self, folder: Path) -> None:
        try:
            self.params: dict[str, Any] = json.loads((folder / "params.json").read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(f"{folder / 'params.json'}: cannot be read ({error}): fetch it again") from None
        files = sorted(folder.glob("consolidated.*.pth"))
        expected = [f"consolidated.{i:02d}.pth" for i in range(len(files))]
        if not files or [f.name for f in files] != expected:
            raise UserError(
                f"{folder}: holds {', '.join(f.name for f in files) or 'no consolidated.XX.pth'}: all of them, "
                "numbered from 00, are needed"
            )
        self._ranks = [load_tensors(file) for file in files]
        self._names = [name for name in self._ranks[0] if not _IGNORED.search(name)]
        for file, rank in zip(files, self._ranks, strict=True):
            odd = set(self._names) ^ {name for name in rank if not _IGNORED.search(name)}
            if odd:
                raise UserError(f"{file}: {min(odd)} is not in all files: fetch them again")

    def __getitem__(self, name: str) -> Tensor:
        shards = [rank[name] for rank in self._ranks]
        if len(shards) == 1:
            return shards[0]
        if _BY_ROWS.search(name):
            return torch.cat(shards)
        if _BY_COLUMNS.search(name):
            return torch.cat(shards, dim=1)
        if name == "tok_embeddings.weight":
            return torch.cat(shards, dim=0 if shards[0].shape[1] == self.params["dim"] else 1)
        return shards[0]  # norms, which every rank has whole

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def rows_of(self, name: str) -> int:
        """Rows of a whole tensor that is spread by rows, without merging it."""
        return sum(rank[name].shape[0] for rank in self._ranks)


def llama_fields(files: LlamaFiles, length: int | None = None) -> tuple[dict[str, Any], list[str]]:
    """The fields of our model section, and what had to be assumed.

    Args:
        length: positions that the model was trained for; None: as of the release that the settings tell.

    Raises:
        UserError: a setting is missing, or this is a model of another kind.
    """
    params, remarks = files.params, []
    try:
        hidden, layers, heads = params["dim"], params["n_layers"], params["n_heads"]
        base, eps = float(params.get("rope_theta", 10000.0)), float(params["norm_eps"])
    except KeyError as error:
        raise UserError(f"params.json: has no {error.args[0]}: fetch it again") from None
    odd = [key for key in ("moe", "moe_args", "vision_chunk_size", "quantization_args") if params.get(key)]
    if odd:
        raise UserError(f"params.json: {odd[0]} cannot be imported: models of text, dense and not quantised, can")
    scaled = bool(params.get("use_scaled_rope"))
    if length is None:
        older = "llama 1" if eps == 1e-6 else "llama 2"
        which = "llama 3.1" if scaled else {5e5: "llama 3", 1e6: "code llama"}.get(base, older)
        length = _LENGTHS[which]
        remarks.append(
            f"params.json does not say how many positions the model was trained for: {length} taken, as of {which}; "
            "--length says another"
        )
    try:
        vocabulary, width = _vocabulary(files), files.rows_of("layers.0.feed_forward.w1.weight")
        tied = "output.weight" not in files or torch.equal(files["output.weight"], files["tok_embeddings.weight"])
    except KeyError as error:
        raise UserError(f"consolidated.00.pth: does not hold {error.args[0]}: give original Llama weights") from None
    fields: dict[str, Any] = {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_kv_heads": params.get("n_kv_heads"),
        "intermediate_size": width,
        "vocab_size": vocabulary,
        "max_position_embeddings": length,
        "position": "rotary",
        "rotary_fraction": 1.0,
        "rotary_base": base,
        "norm": "rmsnorm",
        "norm_epsilon": eps,
        "activation": "swiglu",
        "residual": "sequential",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_embeddings": tied,
    }
    if scaled:
        factor = params.get("rope_scaling_factor")
        if factor is None:
            factor = 8.0 if hidden >= 4096 else 32.0
            remarks.append(f"params.json does not say by how much positions are scaled: {factor:g} taken, as released")
        fields |= {
            "rotary_scaling": "llama3",
            "rotary_scaling_factor": float(factor),
            "rotary_original_length": 8192,
            "rotary_scaling_low": 1.0,
            "rotary_scaling_high": float(params.get("high_freq_factor") or 4.0),
        }
    return fields, remarks


def _vocabulary(files: LlamaFiles) -> int:
    name = "output.weight" if "output.weight" in files else "tok_embeddings.weight"
    return files.rows_of(name) if name == "output.weight" else int(files[name].shape[0])


def llama_rows(model: ModelConfig, files: Mapping[str, Tensor]) -> list[Row]:
    """The table; of a tied model whose files hold the output matrix as well, that is passed over."""
    heads, kv_heads, size = model.num_attention_heads, model.kv_heads, model.head_size
    to_halves, to_pairs = halves(model)

    def theirs_of(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        q, k, v = split_qkv(tensors[0], heads, kv_heads, size)
        return [to_pairs(q), to_pairs(k), v]

    def ours_of(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return [join_qkv(to_halves(tensors[0]), to_halves(tensors[1]), tensors[2], kv_heads, size)]

    rows = [Row(("embedding.weight",), ("tok_embeddings.weight",)), Row(("final_norm.weight",), ("norm.weight",))]
    for i in range(model.num_layers):
        qkv = tuple(f"layers.{i}.attention.{part}.weight" for part in ("wq", "wk", "wv"))
        rows.append(Row((f"layers.{i}.attention.qkv.weight",), qkv, theirs_of, ours_of))
        for mine, its in (
            ("attention_norm", "attention_norm"), ("mlp_norm", "ffn_norm"), ("attention.out", "attention.wo"),
            ("mlp.gate", "feed_forward.w1"), ("mlp.down", "feed_forward.w2"), ("mlp.up", "feed_forward.w3"),
        ):  # fmt: skip
            rows.append(Row((f"layers.{i}.{mine}.weight",), (f"layers.{i}.{its}.weight",)))
    return rows if model.tie_embeddings else [*rows, Row(("head.weight",), ("output.weight",))]


@torch.no_grad()
def llama_logits(files: Mapping[str, Tensor], model: ModelConfig, tokens: Tensor) -> Tensor:
    """What the original formulas give, layer by layer from the original tensors, fp32.

    Rotary positions are products of complex numbers of neighbouring dimensions, as in the original: nothing
    is shared with the table or with our model, so that the two can be held against each other.

    Args:
        tokens: [b, t].

    Returns:
        [b, t, V].
    """
    b, t = tokens.shape
    n, k, d = model.num_attention_heads, model.kv_heads, model.head_size
    x = files["tok_embeddings.weight"].float()[tokens]
    angles = torch.outer(torch.arange(t).float(), _frequencies(model))
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]  # [t, 1, d/2]

    def normed(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + model.norm_epsilon) * files[name].float()

    def product(x: Tensor, name: str) -> Tensor:
        return x @ files[name].float().T

    def rotated(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2)

    later = torch.full((t, t), float("-inf")).triu(1)
    for i in range(model.num_layers):
        at = f"layers.{i}"
        h = normed(x, f"{at}.attention_norm.weight")
        q, key, value = (
            product(h, f"{at}.attention.{part}.weight").view(b, t, heads, d)
            for part, heads in (("wq", n), ("wk", k), ("wv", k))
        )
        key, value = (s.repeat_interleave(n // k, dim=2).transpose(1, 2) for s in (rotated(key), value))
        scores = rotated(q).transpose(1, 2) @ key.transpose(-1, -2) / d**0.5 + later
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).reshape(b, t, n * d)
        x = x + product(mixed, f"{at}.attention.wo.weight")
        h = normed(x, f"{at}.ffn_norm.weight")
        gate = torch.nn.functional.silu(product(h, f"{at}.feed_forward.w1.weight"))
        x = x + product(gate * product(h, f"{at}.feed_forward.w3.weight"), f"{at}.feed_forward.w2.weight")
    return product(normed(x, "norm.weight"), "output.weight" if "output.weight" in files else "tok_embeddings.weight")


def _frequencies(model: ModelConfig) -> Tensor:
    """Radians per position, [d/2]; with Llama 3.1's scaling of the slow ones."""
    d = model.head_size
    frequencies = model.rotary_base ** (-torch.arange(0, d, 2).float() / d)
    if model.rotary_scaling != "llama3":
        return frequencies
    low, high = model.rotary_turns
    turns = (model.rotary_original_length or 0) * frequencies / (2 * torch.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / model.rotary_scaling_factor)
