"""The arithmetic of GPT-NeoX files: widths, batches, steps of checkpoints, kinds of attention."""

from typing import Any

import pytest

from castalia.config import notes
from castalia.config.gptneox_attention import expand_attention
from castalia.config.gptneox_model import mlp_widths
from castalia.errors import UserError


@pytest.mark.parametrize(
    ("given", "width"),
    [
        ({}, 192),
        ({"intermediate_size": 100}, 100),
        ({"expansion_factor": 2.5}, 120),
        # main gates a third of the width: 192 -> rows 128, columns 64.
        ({"activation": "swiglu"}, 64),
        ({"activation": "swiglu", "intermediate_size": 150}, 50),
        ({"activation": "swiglu", "intermediate_size": 100}, 33),
        # LLaMA-7B's, a checked pair.
        ({"activation": "swiglu", "intermediate_size": 32768, "mlp_multiple_of": 256}, 11008),
        # The trick of GPT-NeoX's Llama 3 files.
        ({"activation": "swiglu", "intermediate_size": 14336, "mlp_multiple_of": 14336}, 14336),
        ({"activation": "geglu", "compat": "v2.0"}, 128),
        ({"activation": "geglu", "compat": "v2.0", "hidden_size": 64}, 170),
    ],
)
def test_width_of_the_mlp(translated, given: dict[str, Any], width: int) -> None:
    assert translated(**given).model.intermediate_size == width


@pytest.mark.parametrize(
    ("given", "rows"),
    [
        ({"intermediate_size": 99}, "100 rows"),
        ({"intermediate_size": 100, "mlp_multiple_of": 100}, "200 rows"),
        ({"activation": "swiglu", "intermediate_size": 1}, "0 rows"),
    ],
)
def test_widths_that_do_not_fit(translated, given: dict[str, Any], rows: str) -> None:
    with pytest.raises(UserError, match=f"matrices do not fit: {rows}"):
        translated(**given)


def test_both_widths_of_a_gated_mlp() -> None:
    assert mlp_widths(32768, 256, gated=True) == (22016, 11008)


@pytest.mark.parametrize(
    ("given", "batch"),
    [
        ({}, (2, 2)),
        ({"gradient_accumulation_steps": 3}, (6, 2)),
        ({"global_num_gpus": 4}, (8, 2)),
        ({"gradient_accumulation_steps": 3, "global_num_gpus": 4}, (24, 2)),
        # GPT-NeoX stops here, since it takes one accumulation step unless told.
        ({"train_batch_size": 16, "global_num_gpus": 2}, (16, 2)),
        ({"train_batch_size": 16, "train_micro_batch_size_per_gpu": None}, (16, 16)),
        (
            {
                "train_batch_size": 16,
                "train_micro_batch_size_per_gpu": None,
                "gradient_accumulation_steps": 4,
            },
            (16, 4),
        ),
        ({"train_batch_size": 12, "gradient_accumulation_steps": 3, "world_size": 2}, (12, 2)),
    ],
)
def test_batch_triangle(translated, given: dict[str, Any], batch: tuple[int, int]) -> None:
    training = translated(**given).training
    assert (training.batch_size, training.micro_batch_size) == batch


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train_batch_size": 15}, "a step of 15 sequences is not train_micro_batch_size_per_gpu 2 x"),
        (
            {"train_batch_size": 16, "gradient_accumulation_steps": 3},
            "gradient_accumulation_steps 3 x 1 devices",
        ),
        ({"train_micro_batch_size_per_gpu": None}, "no file gives 'train_micro_batch_size_per_gpu'"),
        (
            {"train_batch_size": 2, "train_micro_batch_size_per_gpu": None, "global_num_gpus": 4},
            "does not fit",
        ),
        ({"gradient_accumulation_steps": 0}, "'gradient_accumulation_steps' must be at least 1"),
    ],
)
def test_batches_that_do_not_fit(translated, given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        translated(**given)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("given", "interval", "extra"),
    [
        ({"checkpoint_factor": 20}, 20, []),
        ({"checkpoint_factor": 20, "extra_save_iters": [0, 5]}, 20, [0, 5]),
        ({"checkpoint_factor": 2, "checkpoint_scale": "log"}, None, []),
        ({"checkpoint_factor": 2, "checkpoint_scale": "log", "compat": "v2.0"}, None, [2, 4, 8, 16, 32, 64]),
        ({"extra_save_iters": [3]}, None, [3]),
    ],
)
def test_steps_of_checkpoints(translated, given: dict[str, Any], interval: int | None, extra: list[int]) -> None:
    checkpoint = translated(**given).checkpoint
    assert (checkpoint.interval, checkpoint.extra_steps) == (interval, extra)


@pytest.mark.parametrize(
    ("config", "layers", "kinds"),
    [
        (None, 3, ["global"] * 3),
        (["flash", "global"], 2, ["flash", "global"]),
        ([[["global"], "all"]], 3, ["global"] * 3),
        ([[["local", "global"], 2]], 4, ["local", "global"] * 2),
        # "all" discards what came before it, as in GPT-NeoX.
        ([[["local"], 1], [["global"], "all"]], 3, ["global"] * 3),
    ],
)
def test_kinds_of_attention(config: Any, layers: int, kinds: list[str]) -> None:
    from castalia.config.gptneox_given import Given

    assert expand_attention(Given({"attention_config": config}, {}), layers) == kinds


def test_where_gptneox_loses_something_it_is_said(translated) -> None:
    remarks = "\n".join(notes(translated(gpt_j_residual=True, use_bias_in_mlp=False, activation="swiglu")))
    assert "loses the attention" in remarks
    assert "inner width of a third" in remarks
    assert "batch is that of one device" in remarks
