"""The model of a GPT-NeoX file -> values of our `model` section, by the arithmetic of v2.0 or of main."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from castalia.config.gptneox_attention import ATTENTION_RULES
from castalia.config.gptneox_given import Given, Rule, near
from castalia.config.gptneox_mup import MUP_RULES

_WIDTH = ("intermediate_size", "expansion_factor", "mlp_multiple_of", "hidden_size")
_NORMS = {
    "layernorm": "layernorm",
    "te_layernorm": "layernorm",
    "rmsnorm": "rmsnorm",
    "te_rmsnorm": "rmsnorm",
    "scalenorm": "scalenorm",
    "non_parametric_layernorm": "non_parametric_layernorm",
}
# Which key says the epsilon of which norms.
_EPSILONS = {
    "layernorm_epsilon": ("layernorm", "non_parametric_layernorm"),
    "rms_norm_epsilon": ("rmsnorm", "rmsnorm_eps_outside"),
    "scalenorm_epsilon": ("scalenorm",),
}
_ACTIVATIONS = {
    "swish": "silu",
    **{n: n for n in ("gelu", "relu", "softsign", "mish", "silu", "geglu", "swiglu", "reglu", "bilinear", "glu")},
}
_POSITIONS = {n: n for n in ("learned", "rotary", "sinusoidal", "rpe", "alibi", "none")}
_INITS = {
    n: n
    for n in (
        *("normal", "scaled_normal", "single_residual_scaled_normal", "small_init", "wang_init"),
        *("xavier_uniform", "xavier_normal", "orthogonal", "scaled_orthogonal"),
    )
}


def norm(given: Given) -> str:
    """Which norm. v2.0's RMSNorm adds epsilon outside the root, which is another function."""
    name = given.choose("norm", _NORMS)
    return "rmsnorm_eps_outside" if name == "rmsnorm" and given.compat == "v2.0" else name


def _epsilon(key: str) -> Callable[[Given], float | None]:
    def value(given: Given) -> float | None:
        return float(given[key]) if norm(given) in _EPSILONS[key] else None

    return value


def position(given: Given) -> str:
    """How positions enter."""
    return given.choose("pos_emb", _POSITIONS)


def _with_position(kind: str, key: str) -> Callable[[Given], Any]:
    """The value of a key that counts with one kind of positions only."""
    return lambda given: given[key] if position(given) == kind else None


def stable_embedding(given: Given) -> str | None:
    """bitsandbytes' stable embedding holds learned positions there, and no tokens."""
    if not given["use_bnb_optimizer"] or position(given) != "learned":
        return None
    given.remark(
        "use_bnb_optimizer: the table of positions is drawn by xavier_uniform, and by init_method in GPT-NeoX; the "
        "norm behind it takes out the difference in size"
    )
    return "positions"


def activation(given: Given) -> str:
    """The activation; the fused bias-and-GELU kernel changes erf to the tanh approximation."""
    name = given.choose("activation", _ACTIVATIONS)
    return "gelu_tanh" if name == "gelu" and given["bias_gelu_fusion"] else name


def _gated(activation: str) -> bool:
    return activation.endswith("glu") or activation == "bilinear"


def intermediate_size(given: Given) -> int:
    """The MLP's inner width, by v2.0's or main's arithmetic of widths.

    main computes the rows of the first matrix and the columns of the second apart, which may
    disagree; such a model cannot run there, and is refused.
    """
    hidden, gated = int(given.required("hidden_size")), _gated(activation(given))
    if given.compat == "v2.0" and "intermediate_size" not in given and "expansion_factor" not in given:
        return int(8 / 3 * hidden) if gated else 4 * hidden  # v2.0 has neither of the two keys
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
        given.remark(
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
    if given["gpt_j_residual"] and not given["use_bias_in_mlp"]:
        given.remark("use_bias_in_mlp: false with gpt_j_residual loses the attention in GPT-NeoX; this run keeps it")
    if given["hidden_dropout"] and not given["use_bias_in_mlp"]:
        given.remark("use_bias_in_mlp: false leaves the MLP without dropout in GPT-NeoX; here it has it")
    return "parallel" if given["gpt_j_residual"] else "sequential"


def unique_layers(given: Given) -> int | None:
    """Layers with weights of their own: shared as the key's description promises, which GPT-NeoX does not keep."""
    unique, layers = given.positive("num_unique_layers"), given.required("num_layers")
    if unique is None or unique == layers:
        return None
    if unique > layers or layers % unique:
        given.fail("num_unique_layers", f"is {unique}, which does not divide num_layers {layers}")
    given.remark(
        "num_unique_layers: layers share weights here; GPT-NeoX checks this key and then gives every layer "
        "weights of its own, as a run without it does"
    )
    return unique


def sharing_style(given: Given) -> str | None:
    """In which order shared layers are executed."""
    style = given.choose("param_sharing_style", {"grouped": "grouped", "spaced": "spaced"})
    return style if "num_unique_layers" in given else None


_SOFT_PROMPT = ("enabled", "n_tokens", "num_tokens", "init_range", "init_string")


def soft_prompt(given: Given) -> dict[str, Any]:
    """The block, if it is enabled; its number of vectors goes by either of two names, one of which is documented."""
    block: dict[str, Any] = given["soft_prompt_tuning"] or {}
    unknown = [key for key in block if key not in _SOFT_PROMPT]
    if unknown:
        given.fail("soft_prompt_tuning", f"has the unknown entry '{unknown[0]}'{near(unknown[0], _SOFT_PROMPT)}")
    if not block.get("enabled"):
        return {}
    text = block.get("init_string") or None
    if text is not None and not isinstance(text, str):
        given.fail("soft_prompt_tuning", f"has the init_string {str(text)[:40]!r}, which must be text")
    if block.get("n_tokens") is not None and block.get("num_tokens") is not None:
        given.fail("soft_prompt_tuning", "has n_tokens and num_tokens, which mean the same: keep one")
    said = (block.get("n_tokens"), block.get("num_tokens"), 10)
    tokens = next(n for n in said if n is not None)
    # GPT-NeoX takes the embeddings before a checkpoint's are loaded; here they are those of the trained model.
    return {"tokens": tokens, "range": block.get("init_range") or 0.5, "text": text}


def score_scaling(given: Given) -> None:
    """Dividing scores by the layer's number and multiplying back changes nothing, unless a bias comes in between."""
    if given["apply_query_key_layer_scaling"] and position(given) in ("rpe", "alibi"):
        given.unsupported(
            "apply_query_key_layer_scaling", "a bias of positions that grows with the layer's number", "leave it false"
        )


def vocab_multiple(given: Given) -> int | None:
    """What the vocabulary is padded to a multiple of; GPT-NeoX multiplies by the tensor parallel degree."""
    parallel = given.values.get("model_parallel_size") or 1
    multiple = given.positive("make_vocab_size_divisible_by")
    return None if multiple is None else multiple * max(parallel, 1)


def experts(given: Given) -> int:
    """How many experts a layer has; 0: its MLP is plain, which GPT-NeoX says as 1."""
    count = given.positive("moe_num_experts") or 1
    if count == 1:
        return 0
    if _gated(activation(given)):
        given.fail("activation", f"'{given['activation']}' does not gate GPT-NeoX's experts: give gelu or silu")
    if given["gpt_j_residual"]:
        given.remark("moe_num_experts with gpt_j_residual loses the attention in GPT-NeoX; this run keeps it")
    if given["hidden_dropout"]:
        given.remark("hidden_dropout: GPT-NeoX drops nothing of what experts return; here it does")
    return count


def _of_experts(value: Callable[[Given], Any]) -> Callable[[Given], Any]:
    return lambda given: value(given) if experts(given) else None


def router(given: Given) -> str:
    """The router's kind."""
    return given.choose("moe_router_type", {"sinkhorn": "sinkhorn", "topk": "topk"})


def router_score(given: Given) -> str:
    """GPT-NeoX's Sinkhorn router weighs a single expert by a sigmoid, several by a softmax; the other has softmax."""
    return "sigmoid" if router(given) == "sinkhorn" and given["moe_top_k"] == 1 else "softmax"


def expert_size(given: Given) -> int:
    """The inner width of an expert: as said, or 4 h rounded up to a multiple of 256."""
    return given.positive("intermediate_size") or -(-4 * int(given.required("hidden_size")) // 256) * 256


MODEL_RULES: tuple[Rule, ...] = (
    *ATTENTION_RULES,
    *MUP_RULES,
    Rule("model.norm", ("norm",), norm),
    *(Rule("model.norm_epsilon", (key,), _epsilon(key)) for key in _EPSILONS),
    Rule("model.qk_norm", ("use_qk_layernorm",), lambda g: g["use_qk_layernorm"]),
    Rule("model.activation", ("activation", "bias_gelu_fusion"), activation),
    Rule("model.intermediate_size", _WIDTH, intermediate_size),
    Rule("model.position", ("pos_emb",), position),
    Rule("model.position_offset", ("opt_pos_emb_offset",), _with_position("learned", "opt_pos_emb_offset")),
    Rule("model.stable_embedding", ("use_bnb_optimizer",), stable_embedding),
    Rule("model.rpe_num_buckets", ("rpe_num_buckets",), _with_position("rpe", "rpe_num_buckets")),
    Rule("model.rpe_max_distance", ("rpe_max_distance",), _with_position("rpe", "rpe_max_distance")),
    Rule("model.residual", ("gpt_j_residual",), residual),
    Rule("model.moe_num_experts", ("moe_num_experts",), lambda g: experts(g) or None),
    Rule("model.moe_interval", ("moe_expert_interval",), _of_experts(lambda g: g.positive("moe_expert_interval"))),
    Rule("model.moe_top_k", ("moe_top_k",), _of_experts(lambda g: g.positive("moe_top_k"))),
    Rule("model.moe_router", ("moe_router_type",), _of_experts(router)),
    Rule("model.moe_score", ("moe_router_type", "moe_top_k"), _of_experts(router_score)),
    Rule("model.moe_normalise", ("moe_router_type",), _of_experts(lambda g: False)),
    Rule("model.moe_intermediate_size", ("moe_num_experts",), _of_experts(expert_size)),
    Rule(
        "model.moe_jitter",
        ("moe_jitter_eps",),
        _of_experts(lambda g: g["moe_jitter_eps"] if router(g) == "topk" else None),
    ),
    Rule("model.tie_norms", ("gpt_j_tied",), lambda g: g["gpt_j_tied"] if g["gpt_j_residual"] else None),
    Rule("model.tie_embeddings", ("no_weight_tying",), lambda g: not g["no_weight_tying"]),
    Rule("model.num_unique_layers", ("num_unique_layers",), unique_layers),
    Rule("model.param_sharing_style", ("param_sharing_style",), sharing_style),
    Rule("model.soft_prompt_tokens", ("soft_prompt_tuning",), lambda g: soft_prompt(g).get("tokens")),
    Rule("model.soft_prompt_range", ("soft_prompt_tuning",), lambda g: soft_prompt(g).get("range")),
    Rule("model.soft_prompt_text", ("soft_prompt_tuning",), lambda g: soft_prompt(g).get("text")),
    Rule("model.init_method", ("init_method",), lambda g: g.choose("init_method", _INITS)),
    Rule(
        "model.output_init_method",
        ("output_layer_init_method",),
        lambda g: g.choose("output_layer_init_method", _INITS),
    ),
    Rule("model.vocab_multiple", ("make_vocab_size_divisible_by",), vocab_multiple),
)
