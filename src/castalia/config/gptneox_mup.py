"""muP of a GPT-NeoX file -> ours: the base widths from its file of base shapes, and the five multipliers.

    BASE_SHAPES_FILE.0 (YAML):   sequential.0.word_embeddings.weight: [null, 256]
                                 a number per dimension that grows with the width, its size in the base model

GPT-NeoX divides scores by d where ours are as without muP at the base width, sqrt(d0) / d: the difference
becomes part of mup_attn_temp. Its attention and output temperatures are read and never used, and its
schedule overwrites muP's learning rates; here all of them act, and a remark says so.
"""

from __future__ import annotations

import math
from typing import Any

from castalia.config.gptneox_given import Given, Rule
from castalia.config.yaml12 import read_yaml
from castalia.errors import UserError

_MULTIPLIERS = ("mup_init_scale", "mup_output_temp", "mup_embedding_mult")
_DEAD = ("mup_attn_temp", "mup_output_temp")


def _used(given: Given) -> bool:
    return bool(given["use_mup"])


def base_shapes(given: Given) -> dict[str, list[int | None]]:
    """What the file of the first rank says, by the name of the parameter."""
    path = f"{given['base_shapes_file']}.0"
    try:
        values: Any = read_yaml(path).values
    except UserError as error:
        given.fail("base_shapes_file", f"cannot be used: {error}")
    for name, shape in values.items():
        if not isinstance(shape, list) or not all(n is None or (isinstance(n, int) and n > 0) for n in shape):
            given.fail("base_shapes_file", f"is {path}, where {name} is no list of sizes and nulls")
    return dict(values)


def _size(given: Given, dimension: int, *suffixes: str) -> int | None:
    """One of a parameter's base sizes; None: it does not grow."""
    for name, shape in base_shapes(given).items():
        if name.endswith(suffixes) and len(shape) > dimension:
            return shape[dimension]
    given.fail("base_shapes_file", f"is {given['base_shapes_file']}.0, which has no {suffixes[0]}")


def base_hidden_size(given: Given) -> int | None:
    """Columns of the base model's embedding; a width that does not grow is the base itself."""
    if not _used(given):
        return None
    _remarks(given)
    return _size(given, 1, "word_embeddings.weight") or int(given.required("hidden_size"))


def base_intermediate_size(given: Given) -> int | None:
    """Columns of the base model's second MLP matrix, over all ranks."""
    if not _used(given) or (given.positive("moe_num_experts") or 1) > 1:
        return None
    columns = _size(given, 1, "dense_4h_to_h.weight", "linear2.weight", "w2.weight")
    return None if columns is None else columns * max(given.values.get("model_parallel_size") or 1, 1)


def attention_temperature(given: Given) -> float | None:
    """Theirs, times the root of the base model's head size."""
    if not _used(given):
        return None
    base = base_hidden_size(given) or 1
    return float(given["mup_attn_temp"]) * math.sqrt(base / int(given.required("num_attention_heads")))


def _remarks(given: Given) -> None:
    given.remark("use_mup: the learning rates of muP act here; GPT-NeoX's schedule overwrites them with one for all")
    for key in _DEAD:
        if given[key] != 1:
            given.remark(f"{key}: acts here; GPT-NeoX reads it and does not use it")
    if any(given[key] in ("small_init", "wang_init") for key in ("init_method", "output_layer_init_method")):
        given.remark("init_method: small_init and wang_init are those of the base width here; GPT-NeoX takes the width")


MUP_RULES: tuple[Rule, ...] = (
    Rule("model.mup", ("use_mup",), lambda g: True if _used(g) else None),
    Rule("model.mup_base_hidden_size", ("base_shapes_file", "use_mup"), base_hidden_size),
    Rule("model.mup_base_intermediate_size", ("base_shapes_file", "use_mup"), base_intermediate_size),
    Rule("model.mup_attn_temp", ("mup_attn_temp", "use_mup"), attention_temperature),
    *(
        Rule(f"model.{key}", (key,), lambda g, key=key: float(g[key]) if _used(g) else None)  # type: ignore[misc]
        for key in _MULTIPLIERS
    ),
    # Unlike the rest, it counts in GPT-NeoX whether or not use_mup is set.
    Rule("model.mup_rp_embedding_mult", ("mup_rp_embedding_mult",), lambda g: float(g["mup_rp_embedding_mult"])),
)
