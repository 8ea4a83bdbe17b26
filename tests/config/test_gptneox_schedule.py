"""DeepSpeed's schedulers and GPT-NeoX's OneBitAdam, translated: settings, and the rates that come of them."""

import json
import math
from typing import Any

import pytest

from castalia.config import Config, load, notes
from castalia.config.fields import flat
from castalia.errors import UserError
from castalia.optim import learning_rate

SMALL: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 64,
    "max_position_embeddings": 64,
    "pos_emb": "rotary",
    "train_iters": 100,
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "Adam", "params": {"lr": 0.5}},
}


@pytest.fixture
def translated(tmp_path):
    def translated(**more: Any) -> Config:
        (tmp_path / "small.yml").write_text(json.dumps(SMALL | more))
        return load([tmp_path / "small.yml"])

    return translated


def scheduler(kind: str, **params: Any) -> dict[str, Any]:
    return {"scheduler": {"type": kind, "params": params}}


def iteration(update: int) -> int:
    """DeepSpeed's schedulers count from -1 on, and set the rate of the next update."""
    return max(update - 1, 0)


def warmup(update: int, total: int | None) -> float:
    at = iteration(update)
    if at < 10:
        return 0.1 + 0.2 * math.log(at + 1) / math.log(10)
    return 0.3 if total is None else 0.1 + 0.2 * max(0.0, (total - at) / (total - 10))


def cosine(update: int) -> float:
    if update == 0:
        return 0.0
    at = iteration(update)
    if at < 10:
        return 0.5 * (0.2 + 0.8 * at / 10)
    return 0.5 * (0.01 + 0.99 * (1 + math.cos(math.pi * min(1.0, (at - 9) / 40))) / 2)


def one_cycle(update: int) -> float:
    if update <= 20:
        return 0.1 + 0.3 * update / 20
    return max(0.1, 0.4 - 0.3 * (update - 20) / 30)


RATES = {"warmup_min_lr": 0.1, "warmup_max_lr": 0.3, "warmup_num_steps": 10}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (scheduler("WarmupLR", **RATES), lambda n: warmup(n, None)),
        (scheduler("WarmupDecayLR", **RATES, total_num_steps=60), lambda n: warmup(n, 60)),
        (
            scheduler(
                "WarmupCosineLR",
                **{"total_num_steps": 50, "warmup_min_ratio": 0.2, "warmup_num_steps": 10},
                **{"cos_min_ratio": 0.01, "warmup_type": "linear"},
            ),
            cosine,
        ),
        (
            scheduler(
                "OneCycle",
                **{"cycle_min_lr": 0.1, "cycle_max_lr": 0.4, "cycle_first_step_size": 20},
                **{"cycle_second_step_size": 30, "cycle_momentum": False},
            ),
            one_cycle,
        ),
        (
            scheduler("LRRangeTest", lr_range_test_min_lr=0.01, lr_range_test_step_size=25, lr_range_test_step_rate=4),
            lambda n: 0.01 * (1 + 4 * n / 25),
        ),
    ],
)
def test_rates_are_those_of_deepspeed(translated, given, expected):
    config = translated(**given, lr_decay_style="cosine", min_lr=0.2, warmup=0.5, lr_decay_fraction=0.9)
    found = [learning_rate(n, config.optimizer.lr, config.schedule, 100) for n in range(100)]
    assert found == pytest.approx([expected(n) for n in range(100)])


def test_a_scheduler_counts_before_the_keys_of_gptneox(translated):
    config = translated(**scheduler("WarmupLR"), lr_decay_style="cosine", warmup=0.5)
    assert (config.schedule.type, config.schedule.warmup_steps, config.optimizer.lr) == ("constant", 1000, 0.5)
    said = "\n".join(notes(config))
    assert "scheduler: DeepSpeed takes it in place of GPT-NeoX's schedule" in said
    assert "warmup: DeepSpeed's scheduler sets the rate in its place" in said
    config = translated(**scheduler("WarmupLR"), compat="v2.0")
    assert config.optimizer.lr == 0.001


def test_one_bit_adam_brings_its_schedule(translated):
    params = {"lr": 0.4, "betas": [0.9, 0.99], "cuda_aware": True, "comm_backend_name": "nccl"}
    block = {"optimizer": {"type": "OneBitAdam", "params": params}, "warmup": 0.1, "lr_decay_iters": 80}
    config = translated(**block)
    values = flat(config)
    expected = {
        "optimizer.type": "onebit_adam",
        "optimizer.lr": 0.4,
        "optimizer.betas": [0.9, 0.99],
        "optimizer.freeze_step": 400,
        "optimizer.weight_decay": 0.0,
        "schedule.type": "linear",
        "schedule.arithmetic": "deepspeed",
        "schedule.warmup_steps": 10,
        "schedule.warmup_shape": "log",
        "schedule.decay_steps": 80,
        "schedule.min_lr": 0.0,
    }
    assert {key: values[key] for key in expected} == expected
    said = "\n".join(notes(config))
    assert "weight_decay: does not reach GPT-NeoX's onebit_adam" in said and "warmup: became schedule.warmup_s" in said
    params |= {"weight_decay": 0.02, "freeze_step": 30}
    config = translated(**block, **scheduler("WarmupLR"))
    assert (config.optimizer.weight_decay, config.optimizer.freeze_step) == (0.02, 30)
    assert config.schedule.type == "linear"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (scheduler("WarmUp"), "needs a 'type' \\(one of WarmupLR"),
        (scheduler("WarmupLR", warmup_step=3), "unknown parameter 'warmup_step' for WarmupLR; did you mean"),
        (scheduler("WarmupLR", warmup_max_lr=[0.1, 0.2]), "give one number"),
        (scheduler("WarmupLR", warmup_type="square"), "give log or linear"),
        (scheduler("WarmupDecayLR"), "WarmupDecayLR needs total_num_steps"),
        (scheduler("OneCycle", cycle_min_lr=0.1, cycle_max_lr=0.2), "add cycle_momentum: false"),
        (
            scheduler(
                "OneCycle",
                **{"cycle_min_lr": 0.1, "cycle_max_lr": 0.2, "cycle_momentum": False},
                **{"decay_step_size": 5, "decay_lr_rate": 0.1},
            ),
            "set decay_lr_rate to 0",
        ),
        (scheduler("LRRangeTest", lr_range_test_staircase=True), "set lr_range_test_staircase to false"),
        ({"optimizer": {"type": "OneBitAdam", "params": {"amsgrad": True}}}, "amsgrad True"),
    ],
)
def test_what_cannot_be_followed_is_refused(translated, given, said):
    with pytest.raises(UserError, match=said):
        translated(**given)


def test_bitsandbytes_norms_learned_positions(translated):
    values = flat(translated(use_bnb_optimizer=True, pos_emb="learned"))
    assert (values["optimizer.type"], values["model.stable_embedding"]) == ("adamw_8bit", "positions")
    assert flat(translated(use_bnb_optimizer=True))["model.stable_embedding"] == "none"
