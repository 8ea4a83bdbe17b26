import pytest

from castalia.config.fields import class_of, fields
from castalia.config.load import from_yaml
from castalia.errors import UserError


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "data: {path: a, train_paths: [b]}",
            "f.yml:1: give either data.path with data.split, or data.train_paths",
        ),
        (
            "data: {train_paths: [a, b], train_weights: [1.0]}",
            "data.train_weights needs one weight for each of",
        ),
        (
            "data:\n  valid_weights: [1.0]",
            "f.yml:2: data.valid_weights needs one weight for each of data.valid_paths",
        ),
        ("data: {train_paths: [a, b], train_weights: [1.0, -1.0]}", "data.train_weights must have no negative weight"),
        ("data: {valid_paths: [a], valid_weights: [0.0]}", "data.valid_weights must have no negative weight and one"),
        ("data: {split: '1,x'}", "f.yml:1: data.split is '1,x': give shares such as"),
        ("data: {split: '0/0'}", "data.split is '0/0'"),
        ("data: {split: 'nan,1'}", "data.split is 'nan,1'"),
        ("data: {split: 'inf,1'}", "data.split is 'inf,1'"),
        ("data: {split: '1,1,1,9'}", "f.yml:1: data.split is '1,1,1,9': give at most three shares"),
        ("data: {split: '2,-1'}", "data.split is '2,-1'"),
        ("optimizer: {betas: [0.9, 1.0]}", "f.yml:1: optimizer.betas [0.9, 1.0] must be from 0 on and below 1"),
        ("model: {hidden_size: 10, num_attention_heads: 3}", "model.hidden_size 10 does not divide by"),
        ("model: {num_kv_heads: 3}", "model.num_attention_heads 8 does not divide by model.num_kv_heads 3"),
        ("model: {rotary_fraction: 0.1}", "of a head of 32 rotates 3 dimensions; it must be an even number"),
        ("model: {rotary_fraction: 0.01}", "rotates 0 dimensions"),
        ("training: {steps: 1, tokens: 1}", "f.yml:1: give one of training.steps and training.tokens"),
        ("training: {steps: null}", "give one of training.steps and training.tokens"),
        (
            "training: {steps: 1, batch_size: 9, micro_batch_size: 4}",
            "training.batch_size 9 is not a multiple of",
        ),
        (
            "data: {seq_length: 64}\nmodel:\n  max_position_embeddings: 32",
            "f.yml:1: data.seq_length 64 is beyond model.max_position_embeddings 32",
        ),
        ("schedule: {min_lr: 1}\noptimizer: {lr: 0.1}", "schedule.min_lr 1.0 is above optimizer.lr 0.1"),
        (
            "model: {vocab_size: 4611686018427387904}",
            "f.yml:1: model.vocab_size makes a matrix of 4611686018427387904 x",
        ),
        ("model: {num_layers: 10000000}", "model.num_layers 10000000 is beyond 10000"),
        (
            "model: {position: learned, position_offset: 2, max_position_embeddings: 512}",
            "data.seq_length 512 with model.position_offset 2 is beyond model.max_position_embeddings 512",
        ),
        (
            "schedule: {type: wsd, arithmetic: gptneox_main}",
            "schedule.type wsd is unknown to schedule.arithmetic gptneox_main",
        ),
    ],
)
def test_values_that_contradict_each_other(text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        from_yaml(text, "f.yml")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_every_field_says_what_it_means_and_what_it_changes() -> None:
    for key, info in fields():
        assert info.description, key
        assert class_of(info) in ("numerics", "performance", "cosmetic"), key


def test_no_torch_is_needed() -> None:
    import subprocess
    import sys

    code = (
        "import sys, castalia.config.render, castalia.config.derive, castalia.config.gptneox; "
        "raise SystemExit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
