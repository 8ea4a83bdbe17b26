import pytest

from castalia.config import load, origins
from castalia.config.derive import derive, padded_vocab_size
from castalia.config.load import from_yaml
from castalia.config.render import flat
from castalia.errors import UserError


def test_each_value_that_follows_is_filled_in_and_explained() -> None:
    config, lines = derive(from_yaml("training: {tokens: 1_000_001, batch_size: 10}\ndata: {seq_length: 100}"), 257)
    values = flat(config)
    expected = {
        "training.steps": 1001,
        "training.tokens": None,
        "training.micro_batch_size": 10,
        "schedule.decay_steps": 1001,
        "data.seed": 1234,
        "model.num_kv_heads": 8,
        "model.head_dim": 32,
        "model.intermediate_size": 1024,
        "model.max_position_embeddings": 100,
        "model.vocab_size": 384,
    }
    assert {key: values[key] for key in expected} == expected
    assert lines[0] == (
        "training.steps = 1001: training.tokens 1,000,001 / (10 sequences x 100 tokens = 1,000 a step), rounded up"
    )
    for key in expected.keys() - {"training.tokens"}:
        assert any(line.startswith(f"{key} = {expected[key]}: ") for line in lines), key
        assert str(origins(config)[key]) == "derived"
    assert any(line.startswith("warm-up of 10.01 steps") for line in lines)
    assert values["schedule.warmup_steps"] is None


def test_what_depends_on_the_machine_or_the_place_stays_null() -> None:
    values = flat(derive(load([]), 100)[0])
    for key in (
        "output",
        "performance.device",
        "performance.threads",
        "training.tokens",
        "data.train_weights",
    ):
        assert values[key] is None, key


def test_what_is_given_stays() -> None:
    text = """
        data: {train_paths: [a, b], train_weights: [1.0, 3.0], valid_paths: [c], seed: 7, seq_length: 8}
        model: {num_kv_heads: 2, head_dim: 16, intermediate_size: 99, vocab_size: 1000,
                max_position_embeddings: 9}
        training: {steps: 5, micro_batch_size: 4}
        schedule: {decay_steps: 50, warmup_steps: 3}
    """
    before = from_yaml(text)
    after, lines = derive(before, 1000)
    changed = {key for key, value in flat(after).items() if value != flat(before)[key]}
    assert changed == {"data.valid_weights"}
    assert lines == ["data.valid_weights = [1.0]: equal shares of data.valid_paths"]
    assert str(origins(after)["training.steps"]) == "<text>:5"


def test_deriving_again_changes_nothing() -> None:
    once, _ = derive(from_yaml("model: {activation: swiglu, hidden_size: 768}"), 50257)
    twice, _ = derive(once, 50257)
    assert once.model_dump() == twice.model_dump()
    assert (once.model.intermediate_size, once.model.vocab_size) == (2048, 50304)


def test_a_run_of_no_steps_has_a_schedule() -> None:
    config, _ = derive(from_yaml("training: {steps: 0}"))
    assert (config.training.steps, config.schedule.decay_steps, config.model.vocab_size) == (0, 1, None)


@pytest.mark.parametrize(("ids", "multiple", "padded"), [(1, 128, 128), (128, 128, 128), (129, 128, 256), (7, 1, 7)])
def test_padding(ids: int, multiple: int, padded: int) -> None:
    assert padded_vocab_size(ids, multiple) == padded


def test_a_tokenizer_that_does_not_fit() -> None:
    config = from_yaml("model:\n  vocab_size: 256", "f.yml")
    with pytest.raises(UserError) as error:
        derive(config, 257)
    assert str(error.value) == (
        "f.yml:2: the tokenizer has 257 ids, more than model.vocab_size 256: "
        "raise model.vocab_size to at least 384, or leave it out"
    )
    with pytest.raises(UserError, match="no ids"):
        derive(load([]), 0)
