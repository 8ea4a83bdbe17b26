"""`model.attention` -> the kind of each layer: one word for all of them, or a list with repeats.

    global                              every layer
    [global, local, local, gmlp]        one word per layer
    [[[global, local], 12]]             24 layers, alternating
    [[[global], 2], [[window], all]]    two global layers, and window in those that are left

The words and the brackets are those of GPT-NeoX's `attention_config`; there, "all" forgets what
stands before it, here it fills what is left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from castalia.config.section import Section, setting

if TYPE_CHECKING:
    from castalia.config.schema_model import ModelConfig

BLOCK_SPARSE = ("local", "sparse_fixed", "sparse_variable", "bigbird", "bslongformer")
WITH_SCORES = ("global", "window", *BLOCK_SPARSE)
GATED_MLPS = ("gmlp", "amlp")
KINDS = (*WITH_SCORES, *GATED_MLPS)


def layer_kinds(said: str | list[Any], layers: int) -> tuple[str, ...]:
    """The kind of each executed layer.

    Raises:
        ValueError: a word is not known, or the list does not describe so many layers.
    """
    if isinstance(said, str):
        kinds = [said] * layers
    else:
        kinds = []
        for item in said:
            kinds += [item] if isinstance(item, str) else _repeated(item, layers - len(kinds))
            if len(kinds) > layers:
                break
    unknown = next((kind for kind in kinds if kind not in KINDS), None)
    if unknown is not None:
        raise ValueError(f"model.attention has the unknown kind '{unknown[:40]}'; known: {', '.join(KINDS)}")
    if len(kinds) != layers:
        more = "at least " if len(kinds) > layers else ""
        raise ValueError(f"model.attention describes {more}{len(kinds)} layers, but model.num_layers is {layers}")
    return tuple(kinds)


def _repeated(item: Any, left: int) -> list[str]:
    words = item[0] if isinstance(item, list) and len(item) == 2 else None
    if not (isinstance(words, list) and words and all(isinstance(word, str) for word in words)):
        raise ValueError(f"model.attention has {str(item)[:60]}, which is neither a kind nor [[kinds], times]")
    times = item[1]
    if times == "all":
        if left % len(words):
            raise ValueError(f"model.attention repeats {len(words)} kinds over {left} layers, which leaves a rest")
        times = left // len(words)
    if not isinstance(times, int) or isinstance(times, bool) or times < 0:
        raise ValueError(f"model.attention repeats {words} {str(times)[:20]} times; give a number, or all")
    # One more than fits is enough to be refused.
    return (words * min(times, left // len(words) + 1)) if left >= 0 else words


class AttentionSettings(Section):
    """The part of the `model` section that says what tokens see of each other."""

    attention: str | list[Any] = setting(
        "global",
        "the kind of every layer, or a list of kinds with repeats such as [[[global, window], 12]]: global, window, "
        "local, sparse_fixed, sparse_variable, bigbird, bslongformer, gmlp, amlp",
    )
    attention_core: str = setting(
        "sdpa",
        "what computes attention from queries, keys and values: a registered name, module:attribute or "
        "file.py:attribute",
    )
    attention_window: int | None = setting(
        None, "window: how many keys a token sees, its own included", unit="tokens", ge=1
    )
    attention_block: int = setting(16, "block-sparse kinds: size of a block", unit="tokens", ge=1)
    attention_local_blocks: int = setting(
        4, "local: blocks that a block sees, its own included; sparse_fixed: blocks of a window", unit="blocks", ge=1
    )
    attention_global_blocks: int = setting(
        1, "sparse_fixed: last blocks of a window that all later ones see; bigbird: first blocks", unit="blocks", ge=1
    )
    attention_global_patterns: int = setting(
        1, "sparse_fixed: so many places of the global blocks, taken by the heads in turn", ge=1
    )
    attention_sliding_blocks: int = setting(
        3, "bigbird, bslongformer: width of the window, later blocks counted too", unit="blocks", ge=1
    )
    attention_random_blocks: int | None = setting(
        None, "blocks drawn for each row of blocks; null: 1 for bigbird, 0 for sparse_variable", unit="blocks", ge=0
    )
    attention_window_blocks: list[int] = setting(
        [4], "sparse_variable: sizes of the windows; the last one repeats", unit="blocks", min_length=1
    )
    attention_global_starts: list[int] = setting([0], "sparse_variable, bslongformer: blocks that all later ones see")
    attention_global_ends: list[int] | None = setting(
        None, "sparse_variable, bslongformer: the global blocks go from each start up to this; null: one block each"
    )
    attention_per_head: bool = setting(False, "sparse_fixed, sparse_variable, bigbird: heads differ in their blocks")
    attention_seed: int = setting(1234, "seed of the blocks that are drawn", ge=0)
    amlp_size: int = setting(64, "amlp: width of the small attention", ge=1)


def check_attention(model: ModelConfig) -> None:
    """Raise ValueError where settings of attention make no sense together."""
    kinds = set(model.attention_kinds)
    if "window" in kinds and model.attention_window is None:
        raise ValueError("model.attention has the kind window: give model.attention_window")
    if model.position in ("rotary", "alibi", "rpe") and not kinds & set(WITH_SCORES):
        raise ValueError(
            f"model.position {model.position} acts on attention, and model.attention has gmlp and amlp alone: "
            "set model.position to none or learned"
        )
    if kinds & set(GATED_MLPS):
        for key, value in (("activation", model.gated), ("moe_num_experts", model.moe_num_experts)):
            if value:
                raise ValueError(
                    f"model.{key} {getattr(model, key)} and gmlp or amlp in model.attention do not go together: "
                    "these have a gate of their own in place of the MLP"
                )
    if "sparse_fixed" in kinds:
        patterns, share = model.attention_global_patterns, model.attention_global_blocks
        if model.attention_local_blocks % share or patterns * share > model.attention_local_blocks:
            raise ValueError(
                f"sparse_fixed: model.attention_local_blocks {model.attention_local_blocks} must be a multiple of "
                f"model.attention_global_blocks {share} and hold model.attention_global_patterns {patterns} of them"
            )
        if patterns > 1 and not model.attention_per_head:
            raise ValueError("model.attention_global_patterns above 1 needs model.attention_per_head true")
    starts, ends = model.attention_global_starts, model.attention_global_ends
    if ends is not None and (len(ends) != len(starts) or any(a >= b for a, b in zip(starts, ends, strict=True))):
        raise ValueError("model.attention_global_ends needs one end behind each of model.attention_global_starts")
    if min(starts, default=0) < 0:
        raise ValueError(f"model.attention_global_starts {starts} must not be negative")
    if min(model.attention_window_blocks) < 1:
        raise ValueError(f"model.attention_window_blocks {model.attention_window_blocks} must be at least 1 each")
    owners: dict[int, str] = {}
    for layer, kind in zip(model.layer_order, model.attention_kinds, strict=True):
        if owners.setdefault(layer, kind) != kind:
            raise ValueError(
                f"model.attention gives {owners[layer]} and {kind} to layers that share their weights: "
                "let its pattern follow model.num_unique_layers"
            )
