"""GPT-NeoX's keys of parallelism become the `parallel:` section."""

import pytest

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
        ({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "none"}}}, {"zero": 1}),
    ],
)
def test_what_they_become(translated, given, expected):
    values = flat(translated(**given))
    assert {key: values[f"parallel.{key}"] for key in expected} == expected


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, "cpu_offload"),
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
