"""Whatever is written in a file or on the command line, it is loaded or refused with one sentence."""

from hypothesis import given, settings
from hypothesis import strategies as st

from castalia.config.derive import derive
from castalia.config.gptneox_keys import KNOWN, REFUSED, TRANSLATED
from castalia.config.load import check_values, from_yaml, known_keys, load
from castalia.config.render import explain, to_yaml
from castalia.errors import UserError

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 200)
    | st.sampled_from([2**62, 0.5, 1e-5, 1e300, 5e-324, -1.0, 0.25, float("inf"), float("nan")])
    | st.sampled_from(["", "gelu", "swiglu", "rotary", "cosine", "linear", "1,2,3", "yes", "all", "global", "Adam"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "params", "lr", "betas", "enabled"]), inner, max_size=3)
    ),
    max_leaves=4,
)
likely = {
    "model.num_layers": st.integers(1, 4),
    "model.hidden_size": st.sampled_from([16, 32, 48]),
    "model.num_attention_heads": st.sampled_from([1, 2, 4]),
    "model.rotary_fraction": st.sampled_from([0.25, 0.5, 1.0]),
    "training.steps": st.integers(0, 100) | st.none(),
    "training.tokens": st.integers(1, 10**6) | st.none(),
    "training.batch_size": st.integers(1, 8),
    "training.micro_batch_size": st.integers(1, 8),
    "schedule.min_lr": st.floats(0, 1e-2),
    "data.seq_length": st.integers(1, 64),
}


@given(
    st.fixed_dictionaries({}, optional=likely),
    st.dictionaries(st.sampled_from(known_keys()), values, max_size=2),
    st.none() | st.integers(1, 70_000),
)
@settings(max_examples=150)
def test_native_values(good: dict, wild: dict, ids: int | None) -> None:
    nested: dict = {}
    for key, value in (good | wild).items():
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = value
    try:
        config, _ = derive(check_values(nested, "f.yml"), ids)
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert from_yaml(to_yaml(config)).model_dump() == config.model_dump()
    assert all(explain(config, key) for key in wild)


@given(st.lists(st.text(max_size=30), max_size=2))
def test_overrides(overrides: list[str]) -> None:
    try:
        load([], overrides)
    except UserError as error:
        assert str(error)


BASIS = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 64,
    "max_position_embeddings": 64,
    "pos_emb": "rotary",
    "train_iters": 10,
    "train_micro_batch_size_per_gpu": 2,
    "hidden_dropout": 0,
    "attention_dropout": 0,
    "optimizer": {"type": "Adam", "params": {}},
}


@given(
    st.dictionaries(st.sampled_from(sorted(TRANSLATED) + sorted(REFUSED)), values, max_size=3),
    st.sets(st.sampled_from(sorted(BASIS)), max_size=1),
    st.sampled_from([None, "main", "v2.0"]),
)
@settings(max_examples=300)
def test_gptneox_values(wild: dict, without: set[str], compat: str | None) -> None:
    from castalia.config.gptneox import translate
    from castalia.config.load import Tree, check
    from castalia.config.yaml12 import Document

    given_values = {k: v for k, v in BASIS.items() if k not in without} | wild | {"compat": compat}
    assert given_values.keys() <= KNOWN
    try:
        translation = translate([Document("f.yml", given_values, {})])
        config, _ = derive(check(Tree(translation.values, translation.origins, translation.notes)), 100)
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert from_yaml(to_yaml(config)).model_dump() == config.model_dump()
