"""GPT-NeoX's keys of parallelism become the `parallel:` section."""

import pytest

from castalia.config import notes
from castalia.config.fields import flat
from castalia.errors import UserError


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"pipeline": 1, "tensor": 1, "zero": 0, "sequence": False}),
        ({"pipe_parallel_size": 0, "model_parallel_size": 1}, {"pipeline": 1, "tensor": 1}),
        ({"pipe_parallel_size": 2, "global_num_gpus": 4}, {"pipeline": 2, "partition": "type:transformer"}),
        (
            {"pipe_parallel_size": 2, "global_num_gpus": 4, "pipe_partition_method": "parameters"},
            {"partition": "parameters"},
        ),
        (
            {"model_parallel_size": 2, "sequence_parallel": True, "global_num_gpus": 2},
            {"tensor": 2, "sequence": True},
        ),
        ({"sequence_parallel": True}, {"sequence": False}),
        ({"zero_optimization": {"stage": 3, "overlap_comm": True, "cpu_offload": False}}, {"zero": 3}),
        ({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "none"}}}, {"zero": 1, "offload": "none"}),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, {"offload": "optimizer"}),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}, {"offload": "optimizer"}),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, {"offload": "parameters"}),
        ({"zero_optimization": {"stage": 0, "cpu_offload": True}}, {"offload": "none"}),
    ],
)
def test_what_they_become(translated, given, expected):
    values = flat(translated(**given))
    assert {key: values[f"parallel.{key}"] for key in expected} == expected


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "offloads parameters with stage 2"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, "offload_optimizer to nvme"),
        ({"zero_optimization": {"stage": 4}}, "stage 4"),
        (
            {"pipe_parallel_size": 2, "global_num_gpus": 2, "pipe_partition_method": "type:mamba"},
            "pipe_partition_method",
        ),
        ({"pipe_parallel_size": 2, "global_num_gpus": 2, "pipe_partition_method": "best"}, "pipe_partition_method"),
        ({"model_parallel_size": -1}, "model_parallel_size"),
    ],
)
def test_what_is_refused(translated, given, text):
    with pytest.raises(UserError, match=text):
        translated(**given)


def test_inputs_go_to_the_host_where_layers_are_recomputed(translated):
    assert flat(translated(checkpoint_activations=True, checkpoint_in_cpu=True))["performance.offload_activations"]
    assert not flat(translated(checkpoint_in_cpu=True))["performance.offload_activations"]


TUNED = {"autotuning": {"enabled": True, "fast": False}, "train_micro_batch_size_per_gpu": "auto"}


def test_what_autotuning_leaves_open_waits_for_tune(translated):
    config = translated(**TUNED, train_batch_size=16, zero_optimization={"stage": [1, 2, 3]}, global_num_gpus=2)
    assert (config.training.batch_size, config.training.micro_batch_size, config.parallel.zero) == (16, 1, 1)
    said = "\n".join(notes(config))
    assert "castalia tune searches" in said
    assert "micro-batches of 1 until" in said
    assert "tries those that may be quicker" in said
    assert translated(**TUNED, train_batch_size=16, gradient_accumulation_steps=4).training.micro_batch_size == 4


def test_a_batch_that_autotuning_leaves_open_is_refused(translated):
    with pytest.raises(UserError, match="a search for the batch size, which changes what is learnt"):
        translated(**TUNED)
    with pytest.raises(UserError, match="must be a whole number"):  # nobody fills it in
        translated(train_micro_batch_size_per_gpu="auto", autotuning={"enabled": False})
