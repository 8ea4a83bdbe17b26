"""The model of a GPT-NeoX file -> values of our `model` section, by the arithmetic of v2.0 or of main."""

from __future__ import annotations

from typing import Any

from castalia.config.gptneox_given import Given, Rule

_WIDTH = ("intermediate_size", "expansion_factor", "mlp_multiple_of", "hidden_size")
_NORMS = {
    "layernorm": "layernorm",
    "te_layernorm": "layernorm",
    "rmsnorm": "rmsnorm",
    "te_rmsnorm": "rmsnorm",
}
_ACTIVATIONS = {
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "geglu": "geglu",
    "swiglu": "swiglu",
    "reglu": "reglu",
}
_POSITIONS = {"rotary": "rotary", "none": "none"}
_INITS = {n: n for n in ("normal", "scaled_normal", "small_init", "wang_init", "single_residual_scaled_normal")}


def norm(given: Given) -> str:
    """Which norm. v2.0's RMSNorm adds epsilon outside the root, which is another function."""
    name = given.choose("norm", _NORMS)
    if name == "rmsnorm" and given.compat == "v2.0":
        given.unsupported("norm", "v2.0's RMSNorm, with its epsilon outside the root", "use layernorm or compat: main")
    return name


def norm_epsilon(given: Given) -> float:
    """The epsilon of the norm in use."""
    return float(given["layernorm_epsilon" if norm(given) == "layernorm" else "rms_norm_epsilon"])


def activation(given: Given) -> str:
    """The activation; the fused bias-and-GELU kernel changes erf to the tanh approximation."""
    name = given.choose("activation", _ACTIVATIONS)
    return "gelu_tanh" if name == "gelu" and given["bias_gelu_fusion"] else name


def intermediate_size(given: Given) -> int:
    """The MLP's inner width, by v2.0's or main's arithmetic of widths.

    main computes the rows of the first matrix and the columns of the second apart, which may
    disagree; such a model cannot run there, and is refused.
    """
    hidden, gated = int(given.required("hidden_size")), activation(given).endswith("glu")
    if given.compat == "v2.0" and "intermediate_size" not in given and "expansion_factor" not in given:
        return int(8 / 3 * hidden) if gated else 4 * hidden
    if "intermediate_size" in given and "expansion_factor" in given:
        given.fail("expansion_factor", "and 'intermediate_size' both say the width of the MLP: keep one")
    width = given.positive("intermediate_size") or int((given["expansion_factor"] or 4) * hidden)
    rows, columns = mlp_widths(width, given.positive("mlp_multiple_of") or 1, gated)
    expected = 2 * columns if gated else columns
    if rows != expected or columns < 1:
        given.fail(
            next((key for key in _WIDTH[:-1] if key in given), "hidden_size"),
            f"gives an MLP whose matrices do not fit: {rows} rows in the first, where the {columns} columns "
            f"of the second need {expected}; change intermediate_size or mlp_multiple_of",
        )
    if gated and "intermediate_size" not in given and "expansion_factor" not in given and given["mlp_multiple_of"] == 1:
        given.remarks.append(
            f"activation: main's gated MLP has an inner width of a third of 4 x hidden_size, here {columns}, "
            f"so half the parameters of a plain one; intermediate_size = 3 x the wanted width changes it"
        )
    return columns


def mlp_widths(width: int, multiple: int, gated: bool) -> tuple[int, int]:
    """main's rows of the first MLP matrix (value and gate together) and columns of the second."""
    rows = int(width * 2 / 3) if gated else width
    columns = rows // 2 if gated else width
    return 2 * multiple * -(-rows // (2 * multiple)), multiple * -(-columns // multiple)


def residual(given: Given) -> str:
    """Parallel or sequential branches."""
    if given["gpt_j_tied"] and given["gpt_j_residual"]:
        given.unsupported("gpt_j_tied", "one norm for both branches", "leave it false")
    if given["gpt_j_residual"] and not given["use_bias_in_mlp"]:
        given.remarks.append(
            "use_bias_in_mlp: false with gpt_j_residual loses the attention in GPT-NeoX; this run keeps it"
        )
    return "parallel" if given["gpt_j_residual"] else "sequential"


def attention(given: Given) -> None:
    """Check that every layer is global, or flash, which is the same function: full causal attention."""
    layers = given.required("num_layers")
    kinds = expand_attention(given, layers)
    other = sorted({kind for kind in kinds if kind not in ("global", "flash")})
    if other:
        given.unsupported("attention_config", f"layers of kind {', '.join(other)}", "use global or flash in all")
    window = given["sliding_window_width"]
    if window is not None and window + 1 < given.required("seq_length"):
        given.unsupported("sliding_window_width", "a sliding window", "remove it")


def expand_attention(given: Given, layers: int) -> list[str]:
    """The kind of each layer. As in GPT-NeoX, an item with "all" stands for every layer and ends the list."""
    config = given["attention_config"]
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


def vocab_multiple(given: Given) -> int | None:
    """What the vocabulary is padded to a multiple of; GPT-NeoX multiplies by the tensor parallel degree."""
    parallel = given.values.get("model_parallel_size") or 1
    multiple = given.positive("make_vocab_size_divisible_by")
    return None if multiple is None else multiple * max(parallel, 1)


MODEL_RULES: tuple[Rule, ...] = (
    Rule("model.norm", ("norm",), norm),
    Rule("model.norm_epsilon", ("layernorm_epsilon", "rms_norm_epsilon", "norm"), norm_epsilon),
    Rule("model.activation", ("activation", "bias_gelu_fusion"), activation),
    Rule("model.intermediate_size", _WIDTH, intermediate_size),
    Rule("model.position", ("pos_emb",), lambda g: g.choose("pos_emb", _POSITIONS)),
    Rule("model.residual", ("gpt_j_residual", "gpt_j_tied"), residual),
    Rule("model.tie_embeddings", ("no_weight_tying",), lambda g: not g["no_weight_tying"]),
    Rule("model.init_method", ("init_method",), lambda g: g.choose("init_method", _INITS)),
    Rule(
        "model.output_init_method",
        ("output_layer_init_method",),
        lambda g: g.choose("output_layer_init_method", _INITS),
    ),
    Rule("model.vocab_multiple", ("make_vocab_size_divisible_by",), vocab_multiple),
)
