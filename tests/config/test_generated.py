"""Generated configurations, native and GPT-NeoX's: the model is built, or one sentence names the key at fault.

Values come from the schema and from the table of keys: mostly right ones, some at or beyond
their limits. A few hundred by default; CASTALIA_CERTIFY=1 makes ten thousand of each kind.
"""

import os
import re
from typing import Any, Literal, get_args, get_origin

import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from castalia.config import Config
from castalia.config.derive import derive
from castalia.config.fields import fields
from castalia.config.gptneox import translate
from castalia.config.gptneox_keys import KNOWN, REFUSED, REPORTED, TRANSLATED
from castalia.config.json_schema import NAMES
from castalia.config.load import Tree, check, check_values
from castalia.config.section import Section
from castalia.config.yaml12 import Document
from castalia.data.order import split_documents
from castalia.errors import UserError
from castalia.model.size import model_size
from castalia.model.transformer import Transformer
from castalia.optim.optimizers import optimizer_kind
from castalia.optim.schedule import learning_rate

COUNT = 10_000 if os.environ.get("CASTALIA_CERTIFY") == "1" else 250
OPTIONS = settings(max_examples=COUNT, deadline=None, suppress_health_check=list(HealthCheck))
WRONG = st.sampled_from([None, True, -1, 0, 0.5, 1e300, 2**62, "", "elbow", [], [3], {}, {"enabled": True}, {"x": 1}])
FIELDS = dict(fields())
# Sizes that make sense together more often than not, and build at once.
SIZES: dict[str, list[Any]] = {
    "num_layers": [1, 2, 4, 6],
    "hidden_size": [32, 48, 64, 96],
    "num_attention_heads": [1, 2, 4, 8],
    "num_kv_heads": [1, 2, 4, 8],
    "intermediate_size": [32, 96, 192, 256],
    "seq_length": [8, 16, 32],
    "max_position_embeddings": [32, 64],
    "vocab_size": [300, 512],
    "vocab_multiple": [1, 64, 128],
    "rotary_fraction": [0.25, 0.5, 1.0],
    "rotary_pct": [0.25, 0.5, 1.0],
    "num_unique_layers": [1, 2, 3],
    "head_dim": [8, 16],
    "min_lr": [0.0, 1e-5],
    "steps": [0, 3, 100],
    "train_iters": [1, 100],
    "tokens": [1, 10_000],
    "batch_size": [4, 8, 32],
    "micro_batch_size": [1, 2, 4],
    "train_batch_size": [4, 8],
    "train_micro_batch_size_per_gpu": [1, 2, 4],
    "gradient_accumulation_steps": [1, 2],
    "global_num_gpus": [1, 2],
    "checkpoint_factor": [1, 2, 50],
    "position_offset": [0, 2],
    "rpe_num_buckets": [4, 32],
    "rpe_max_distance": [64, 128],
    "soft_prompt_range": [0.1, 1.0],
    "rotary_base": [500.0, 10000.0],
    "rotary_emb_base": [500, 10000],
    "split": ["1,2,3", "100,0,0", "9/1"],
    "betas": [[0.9, 0.95], [0.0, 0.999]],
    "decay_steps": [1, 50],
    "lr_decay_iters": [1, 50],
    "opt_pos_emb_offset": [0, 2],
    "attention": ["window", ["global", "local"], [[["gmlp", "global"], "all"]]],
    "attention_window": [1, 8],
}


def mostly(usual: st.SearchStrategy[Any], times: int, other: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """The one, `times` as often as the other; `one_of` would take equal branches for one."""
    return st.sampled_from([usual] * times + [other]).flatmap(lambda chosen: chosen)


def of_type(kind: Any) -> st.SearchStrategy[Any]:
    """Values of a field's type."""
    if get_origin(kind) is Literal:
        return st.sampled_from(get_args(kind))
    if get_origin(kind) is list:
        return st.lists(of_type(get_args(kind)[0]), max_size=3)
    if isinstance(kind, type) and issubclass(kind, Section):
        return st.fixed_dictionaries({}, optional={n: of_type(f.annotation) for n, f in kind.model_fields.items()})
    if get_args(kind):
        return st.one_of([of_type(part) for part in get_args(kind)])
    return {
        bool: st.booleans(),
        int: st.sampled_from([0, 1, 2, 3, 4, 8, 100]),
        float: st.sampled_from([0.0, 1e-8, 0.1, 0.25, 0.5, 1.0, 2.5, 1e4]),
        str: st.sampled_from(["a", "b/c", "1,2,3", "100,0,0"]),
        type(None): st.none(),
        Any: st.sampled_from(["global", 3, [["window"], 2]]),
    }[kind]


def native_value(key: str) -> st.SearchStrategy[Any]:
    """Values of one of our keys."""
    word = key.rpartition(".")[2]
    if key in NAMES:
        return st.sampled_from(NAMES[key])
    right = st.sampled_from(SIZES[word]) if word in SIZES else of_type(FIELDS[key].annotation)
    return mostly(right, 20, of_type(FIELDS[key].annotation) | WRONG)


@st.composite
def native(draw: st.DrawFn) -> dict[str, Any]:
    """Nested values of a native configuration."""
    keys = draw(st.lists(st.sampled_from(sorted(FIELDS)), max_size=8, unique=True))
    nested: dict[str, Any] = {}
    for key in keys:
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = draw(native_value(key))
    return nested


BASIS: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "seq_length": 16,
    "max_position_embeddings": 64,
    "pos_emb": "rotary",
    "train_iters": 10,
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "Adam", "params": {"lr": 0.001}},
}
THEIR_WORDS = {
    "norm": ["layernorm", "rmsnorm", "scalenorm", "non_parametric_layernorm", "te_rmsnorm", "te_layernorm"],
    "pos_emb": ["learned", "rotary", "sinusoidal", "rpe", "alibi", "none"],
    "activation": [n for n in NAMES["model.activation"] if n != "gelu_tanh"],
    "init_method": list(NAMES["model.init_method"]),
    "output_layer_init_method": list(NAMES["model.init_method"]),
    "param_sharing_style": ["grouped", "spaced"],
    "lr_decay_style": ["constant", "linear", "cosine", "exponential"],
    "checkpoint_scale": ["linear", "log"],
    "precision": ["fp32", "bfloat16", "fp16"],
    "tokenizer_type": ["HFTokenizer", "GPT2BPETokenizer", "CharLevelTokenizer"],
    "attention_config": [[[["global"], "all"]], [[["flash", "global"], 1]], [[["local"], "all"]], ["flash", "flash"]],
    "soft_prompt_tuning": [{"enabled": False}, {"enabled": True, "n_tokens": 3}, {"enabled": True, "init_range": 0.1}],
    "curriculum_learning": [
        {"enabled": False},
        {
            "enabled": True,
            "curriculum_type": "seqlen",
            "min_difficulty": 8,
            "max_difficulty": 16,
            "schedule_type": "fixed_linear",
            "schedule_config": {"total_curriculum_step": 5, "difficulty_step": 8},
        },
    ],
    "fp16": [
        {"enabled": False},
        {"enabled": True},
        {"enabled": True, "type": "bfloat16"},
        {"enabled": True, "loss_scale": 0, "initial_scale_power": 12, "hysteresis": 2, "min_loss_scale": 1},
        {"enabled": True, "loss_scale": 128},
    ],
    "bf16": [{"enabled": False}, {"enabled": True}],
    "optimizer": [
        {"type": "Adam", "params": {"lr": 1e-3, "betas": [0.9, 0.99], "eps": 1e-8}},
        {"type": "Adam", "params": {}},
        {"type": "sgd", "params": {"lr": 0.1}},
        {"type": "Adam", "params": {"lr": "1.0e_8"}},
    ],
}
OF_KIND = {
    "int": st.sampled_from([0, 1, 2, 4, 8, 64]),
    "number": st.sampled_from([0, 1e-8, 0.01, 0.1, 0.5, 1, 2.5, 10000]),
    "bool": st.sampled_from([True, False, "yes", "off"]),
    "text": st.sampled_from(["a", "b/c"]),
    "list": st.sampled_from([["a"], ["b", "c"], [1.0], [1, 2]]),
    "mapping": st.sampled_from([{}, {"enabled": False}]),
    "any": st.sampled_from(["969,30,1", [1, 2], 3]),
}


def their_value(key: str) -> st.SearchStrategy[Any]:
    """Values of one of GPT-NeoX's keys."""
    if key in THEIR_WORDS:
        right: st.SearchStrategy[Any] = st.sampled_from(THEIR_WORDS[key])
    elif key in SIZES:
        right = st.sampled_from(SIZES[key])
    elif key in TRANSLATED:
        right = OF_KIND[TRANSLATED[key].kind]
    elif key in REFUSED and REFUSED[key].harmless:
        right = st.sampled_from(REFUSED[key].harmless)
    else:
        right = st.sampled_from([False, {"enabled": False}, 1]) if key in REPORTED else st.none()
    return mostly(right, 20, WRONG)


@st.composite
def gptneox(draw: st.DrawFn) -> dict[str, Any]:
    """Values of a GPT-NeoX file."""
    weighted = st.sampled_from([TRANSLATED] * 6 + [REPORTED, REFUSED]).flatmap(lambda t: st.sampled_from(sorted(t)))
    keys = draw(st.lists(weighted, max_size=6, unique=True))
    values = BASIS | {key: draw(their_value(key)) for key in keys}
    without = draw(st.sampled_from([None] * 60 + sorted(BASIS)))
    values.pop(without, None)
    return values | {"compat": draw(st.sampled_from([None, "main", "v2.0"]))}


def build(config: Config) -> None:
    """Everything that follows from a configuration, up to the model on the meta device."""
    config, _ = derive(config, 300)
    with torch.device("meta"):
        model = Transformer(config.model)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == model_size(config).total_parameters
    optimizer = optimizer_kind(config.optimizer)
    optimizer.make([{"params": [torch.zeros(2, requires_grad=True)], "weight_decay": 0.0}], config.optimizer)
    split_documents(100, config.data.split, ())
    steps = config.training.steps or 0
    for step in {0, 1, steps // 2, steps}:
        rate = learning_rate(step, config.optimizer.lr, config.schedule, steps)
        assert isinstance(rate, float) and rate >= 0


def names_a_key(message: str, keys: set[str]) -> bool:
    """Whether a sentence holds one of the keys as a word."""
    words = re.findall(r"[A-Za-z_][A-Za-z0-9_.]*[A-Za-z0-9_]", message)
    # An item of a list is named by its place: data.train_paths.0.
    return any(word in keys or re.sub(r"\.\d+$", "", word) in keys for word in words)


def judge(load: Any, keys: set[str]) -> str:
    """Load and build; `accepted` or `refused`, and anything else is an error."""
    try:
        build(load())
    except UserError as error:
        message = str(error)
        assert "\n" not in message
        assert names_a_key(message, keys), message
        return "refused"
    return "accepted"


@given(native())
@OPTIONS
def test_native_configurations(values: dict[str, Any]) -> None:
    event(judge(lambda: check_values(values, "f.yml"), set(FIELDS)))


@given(gptneox())
@OPTIONS
def test_gptneox_configurations(values: dict[str, Any]) -> None:
    assert values.keys() <= KNOWN

    def load() -> Config:
        translation = translate([Document("f.yml", values, {})])
        return check(Tree(translation.values, translation.origins, translation.notes))

    event(judge(load, set(FIELDS) | KNOWN))
