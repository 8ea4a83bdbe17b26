"""GPT-NeoX's `attention_config`, `sparsity_config`, `sliding_window_width`, `gmlp_attn_dim` -> our keys of attention.

Their kinds are ours, but for `flash`, a kernel, and for a window, which there narrows every layer of
full attention and here is a kind of its own. `local` reaches half as far there as its number of
blocks says; that is arithmetic, and kept. What crashes there is mended: gmlp layers, patterns of
random blocks that are asked for more than there are, lengths that are no multiple of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from castalia.config.attention import BLOCK_SPARSE, GATED_MLPS, KINDS
from castalia.config.gptneox_given import Given, Rule, near
from castalia.config.schema_model import MOST_LAYERS

# All that attention_config may say, of both versions.
_THEIRS = frozenset(("global", "flash", *BLOCK_SPARSE, *GATED_MLPS, "rwkv", "mamba"))
# Entries of sparsity_config, and by which kinds each is read; the last ones have no effect there either.
_ENTRIES: dict[str, tuple[str, ...]] = {
    "block": BLOCK_SPARSE,
    "different_layout_per_head": ("sparse_fixed", "sparse_variable", "bigbird"),
    "num_local_blocks": ("local", "sparse_fixed"),
    "num_global_blocks": ("sparse_fixed", "bigbird"),
    "num_different_global_patterns": ("sparse_fixed",),
    "num_random_blocks": ("sparse_variable", "bigbird"),
    "local_window_blocks": ("sparse_variable",),
    "global_block_indices": ("sparse_variable", "bslongformer"),
    "global_block_end_indices": ("sparse_variable", "bslongformer"),
    "num_sliding_window_blocks": ("bigbird", "bslongformer", "local"),
    "mode": (),
    "attention": (),
    "horizontal_global_attention": (),
}


def expand_attention(given: Given, layers: int) -> list[str]:
    """The kind of each layer. As in GPT-NeoX, an item with "all" stands for every layer and ends the list."""
    config = given["attention_config"]
    if layers > MOST_LAYERS:
        given.fail("num_layers", f"is {layers}, beyond {MOST_LAYERS}: make it smaller")
    if config is None or layers < 1:
        return ["global"] * max(layers, 0)
    kinds: list[str] = []
    for item in config:
        if isinstance(item, str):
            kinds.append(item)
            continue
        if not (isinstance(item, list) and len(item) == 2 and _is_words(item[0])):
            given.fail("attention_config", f"has {str(item)[:60]}, which is neither a kind nor [[kinds], times]")
        pattern, times = item
        if times == "all":
            if layers % len(pattern):
                given.fail(
                    "attention_config",
                    f"repeats {len(pattern)} kinds over {layers} layers, which leaves a rest",
                )
            kinds = pattern * (layers // len(pattern))
            break
        if not isinstance(times, int) or times < 0 or times * len(pattern) > 10 * layers:
            given.fail(
                "attention_config",
                f"repeats {pattern} {str(times)[:20]} times, but there are {layers} layers",
            )
        kinds += pattern * times
    if len(kinds) != layers:
        given.fail("attention_config", f"describes {len(kinds)} layers, but num_layers is {layers}")
    return kinds


def _is_words(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)


def kinds(given: Given) -> list[str]:
    """The kind of each layer in our words."""
    theirs = expand_attention(given, given.required("num_layers"))
    unknown = sorted({kind for kind in theirs if kind not in _THEIRS})
    if unknown:
        given.fail("attention_config", f"has the unknown kind '{unknown[0][:40]}'{near(unknown[0], _THEIRS)}")
    other = sorted({kind for kind in theirs if kind not in (*KINDS, "flash")})
    if other:
        given.unsupported("attention_config", f"layers of kind {', '.join(other)}", f"use some of {', '.join(KINDS)}")
    full = "global" if window(given) is None else "window"
    return [full if kind in ("global", "flash") else kind for kind in theirs]


def window(given: Given) -> int | None:
    """How many keys a token sees, its own included, which theirs does not count; None: all of the sequence."""
    width = given["sliding_window_width"]
    if width is not None and width < 0:
        given.fail("sliding_window_width", f"is {width}: give how many earlier tokens are seen")
    return None if width is None or width + 1 >= given.required("seq_length") else width + 1


def attention(given: Given) -> str | list[Any] | None:
    """One word, or the shortest pattern that repeats; None where every layer is global."""
    all_kinds = kinds(given)
    used = set(all_kinds)
    if used & set(GATED_MLPS):
        given.remark(
            "attention_config: gmlp and amlp have a residual connection here, and keep the biases of their "
            "projections; GPT-NeoX loses both, and its layer fails unless the micro-batch is as large as the sequence"
        )
        if given["intermediate_size"] or given["expansion_factor"]:
            key = "intermediate_size" if "intermediate_size" in given else "expansion_factor"
            given.unsupported(key, "an MLP of another width than gmlp layers have", "leave it out")
    if used & set(BLOCK_SPARSE) and given["attention_dropout"]:
        given.remark("attention_dropout: acts in block-sparse layers too, where GPT-NeoX has none")
    if len(used) < 2:
        return None if used <= {"global"} else all_kinds[0]
    length = len(all_kinds)
    period = next(p for p in range(1, length + 1) if length % p == 0 and all_kinds[:p] * (length // p) == all_kinds)
    return [[all_kinds[:period], length // period]]


def _sparse(entry: str, default: Any = None) -> Callable[[Given], Any]:
    """The value of an entry of sparsity_config; None where no layer reads it."""

    def value(given: Given) -> Any:
        config: dict[str, Any] = given["sparsity_config"] or {}
        unknown = [key for key in config if key not in _ENTRIES]
        if unknown:
            given.fail("sparsity_config", f"has the unknown entry '{unknown[0]}'{near(unknown[0], _ENTRIES)}")
        if not set(kinds(given)) & set(_ENTRIES[entry]):
            return None
        return config.get(entry) if config.get(entry) is not None else default

    return value


def local_blocks(given: Given) -> int | None:
    """sparse_fixed's window; of local half its number and the block itself."""
    used = set(kinds(given))
    number: Any = _sparse("num_local_blocks")(given)
    if "local" not in used:
        return number  # type: ignore[no-any-return]  # its type is checked where all values are
    if number is None:
        number = _sparse("num_sliding_window_blocks", 4)(given)
    if not isinstance(number, int):
        given.fail("sparsity_config", f"has {str(number)[:20]!r} for a number of blocks: give a whole number")
    reach = number // 2 + 1
    fixed = _sparse("num_local_blocks", 4)(given)
    if "sparse_fixed" in used and reach != fixed:
        given.unsupported(
            "attention_config", f"local with {reach} blocks beside sparse_fixed with {fixed}", "use one of the two"
        )
    return reach


_ATTENTION = ("attention_config", "sliding_window_width")
ATTENTION_RULES: tuple[Rule, ...] = (
    Rule("model.attention", _ATTENTION, attention),
    Rule("model.attention_window", ("sliding_window_width",), lambda g: window(g) if "window" in kinds(g) else None),
    Rule("model.attention_local_blocks", ("sparsity_config",), local_blocks),
    Rule(
        "model.amlp_size",
        ("gmlp_attn_dim",),
        lambda g: g.positive("gmlp_attn_dim") if "amlp" in kinds(g) else None,
    ),
    *(
        Rule(f"model.attention_{ours}", ("sparsity_config",), _sparse(theirs))
        for ours, theirs in (
            ("block", "block"),
            ("per_head", "different_layout_per_head"),
            ("global_blocks", "num_global_blocks"),
            ("global_patterns", "num_different_global_patterns"),
            ("random_blocks", "num_random_blocks"),
            ("window_blocks", "local_window_blocks"),
            ("global_starts", "global_block_indices"),
            ("global_ends", "global_block_end_indices"),
        )
    ),
    Rule(
        "model.attention_sliding_blocks",
        ("sparsity_config",),
        lambda g: _sparse("num_sliding_window_blocks")(g) if set(kinds(g)) & {"bigbird", "bslongformer"} else None,
    ),
)
