"""`compat: main` and `compat: v2.0`: every default and formula in which the two versions of GPT-NeoX differ."""

import json
import math
from typing import Any

import pytest

from castalia.config import Config, load
from castalia.config.fields import flat
from castalia.optim.schedule import learning_rate

SMALL: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "seq_length": 64,
    "max_position_embeddings": 64,
    "pos_emb": "rotary",
    "train_iters": 100,
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "Adam", "params": {"lr": 1.0}},
}


@pytest.fixture
def translated(tmp_path):
    def translated(compat: str, **more: Any) -> Config:
        (tmp_path / "small.yml").write_text(json.dumps(SMALL | {"compat": compat} | more))
        return load([tmp_path / "small.yml"])

    return translated


@pytest.mark.parametrize(
    ("given", "main", "v2"),
    [
        ({}, {"model.hidden_dropout": 0.0}, {"model.hidden_dropout": 0.1}),
        ({}, {"model.attention_dropout": 0.0}, {"model.attention_dropout": 0.1}),
        ({"attention_dropout": 0}, {"model.hidden_dropout": 0.0}, {"model.hidden_dropout": 0.1}),
        ({}, {"optimizer.weight_decay": 0.1}, {"optimizer.weight_decay": 0.01}),
        ({}, {"optimizer.clip_grad": 1.0}, {"optimizer.clip_grad": 0.0}),
        ({}, {"schedule.arithmetic": "gptneox_main"}, {"schedule.arithmetic": "gptneox_v2.0"}),
        ({"norm": "rmsnorm"}, {"model.norm": "rmsnorm"}, {"model.norm": "rmsnorm_eps_outside"}),
        # main: a third of 4 x hidden_size; v2.0: 8/3 of hidden_size, rounded down.
        ({"activation": "geglu"}, {"model.intermediate_size": 85}, {"model.intermediate_size": 170}),
        (
            {"checkpoint_factor": 3, "checkpoint_scale": "log"},
            # main saves at step 1 as well, the factor to the power of 0.
            {"checkpoint.scale": "log", "checkpoint.log_factor": 3.0, "checkpoint.extra_steps": []},
            {"checkpoint.scale": "linear", "checkpoint.interval": None, "checkpoint.extra_steps": [3, 9, 27, 81]},
        ),
        # v2.0 takes fp16.type before anything else, main does not know it.
        (
            {"fp16": {"enabled": False, "type": "bfloat16"}},
            {"training.precision": "fp32"},
            {"training.precision": "bf16"},
        ),
        # One pipeline stage: no pipeline in v2.0, a pipeline of one in main; one function.
        ({"pipe_parallel_size": 1}, {"model.num_layers": 2}, {"model.num_layers": 2}),
        # v2.0 has no default, and crashes without one.
        ({}, {"logging.interval": 100}, {"logging.interval": 100}),
    ],
)
def test_where_the_versions_differ(translated, given, main, v2) -> None:
    for compat, expected in (("main", main), ("v2.0", v2)):
        values = flat(translated(compat, **given))
        assert {key: values[key] for key in expected} == expected


def half_cosine(share: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * share))


@pytest.mark.parametrize(
    ("style", "done", "main", "v2"),
    [
        # Warm-up over 10 steps: main's first two updates share a rate, v2.0's first has none.
        ("linear", 0, 0.1, 0.0),
        ("linear", 1, 0.1, 0.1),
        ("linear", 10, 1.0, 1.0),
        # Then main anneals over the 90 steps that are left, v2.0 over all 100.
        ("linear", 55, 45 / 90, 55 / 100),
        ("linear", 95, 5 / 90, 0.2),
        ("cosine", 55, 0.05 + 0.95 * half_cosine(45 / 90), half_cosine(45 / 100)),
        # v2.0 stands still from step 90 on; main's cosine comes back up beyond its end.
        ("cosine", 95, 0.05 + 0.95 * half_cosine(85 / 90), half_cosine(80 / 100)),
        ("cosine", 110, 0.05 + 0.95 * half_cosine(100 / 90), half_cosine(80 / 100)),
        ("exponential", 55, math.exp(-0.693 * 0.5), math.exp(-0.693 * 0.45)),
        ("constant", 55, 1.0, 1.0),
    ],
)
def test_learning_rates(translated, style, done, main, v2) -> None:
    for compat, expected in (("main", main), ("v2.0", v2)):
        config = translated(compat, lr_decay_style=style, warmup=0.1, min_lr=0.05)
        assert learning_rate(done, 1.0, config.schedule, 100) == pytest.approx(expected, abs=1e-12)


def test_an_unknown_version_is_refused(translated) -> None:
    with pytest.raises(Exception, match="must be main or v2.0"):
        translated("v3.0")
