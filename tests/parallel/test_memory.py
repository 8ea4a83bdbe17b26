"""Memory that is predicted: state to the byte on every rank, activations near what a step really allocates."""

from __future__ import annotations

import pytest
import torch

from castalia.parallel.layout import layout_of
from castalia.parallel.memory import MemoryModel
from castalia.parallel.state_memory import StateRules, sharded_rows
from castalia.parallel.world import World
from castalia.tools.plan_certificate import compare_states, run_watched, small_config

SMALL = {
    "data.seq_length": 64,
    "model.num_layers": 3,
    "model.hidden_size": 64,
    "model.num_attention_heads": 4,
    "model.vocab_size": 512,
    "training.batch_size": 8,
    "training.micro_batch_size": 4,
    "training.steps": 3,
}
LLAMA = ("model.num_kv_heads=2", "model.activation=swiglu", "model.norm=rmsnorm", "training.precision=bf16")


def test_every_rank_holds_the_predicted_bytes():
    found = compare_states(
        [
            "ZeRO 3 over 2 of 4, AdamW of 8 bits",
            "experts 2, tensor 2, Lion",
        ]
    )
    for name, pairs in found.items():
        for rank, (predicted, held) in enumerate(pairs):
            assert predicted == held, f"{name}, rank {rank}"
    # Shares are uneven, or the test would see nothing.
    assert len({held for _, held in found["experts 2, tensor 2, Lion"]}) == 4


@pytest.mark.parametrize("rows", [1, 3, 7, 259])
def test_rows_are_those_of_torchs_chunks(rows):
    for ranks in (1, 2, 4, 8):
        chunks = [len(part) for part in torch.arange(rows).chunk(ranks)]
        expected = chunks + [0] * (ranks - len(chunks))
        assert [sharded_rows(rows, ranks, rank) for rank in range(ranks)] == expected


@pytest.mark.parametrize(
    "overrides",
    [(), LLAMA, ("performance.recompute=full", "model.num_layers=8"), ("performance.recompute=selective", *LLAMA)],
)
def test_a_step_allocates_what_is_predicted(overrides):
    config = small_config(SMALL, {}, overrides)
    threads = torch.get_num_threads()
    measured, _ = run_watched(World(0, 1, torch.device("cpu")), config, threads, 0)
    memory = MemoryModel(config, accelerator=False).worst(config, layout_of(config.parallel, 1))
    assert memory.activations + memory.buffers == pytest.approx(measured, rel=0.1)


def test_more_ranks_hold_less_and_more_micro_batches_in_flight_more():
    def need(processes, **parallel):
        config = small_config(SMALL, parallel)
        return MemoryModel(config, accelerator=True).worst(config, layout_of(config.parallel, processes))

    whole = need(1)
    for spread in (need(4, zero=3), need(4, tensor=4), need(2, pipeline=2, schedule="gpipe")):
        assert spread.parameters < whole.parameters
    micro = SMALL | {"training.micro_batch_size": 1}
    flying = [small_config(micro, {"pipeline": 2, "schedule": schedule}) for schedule in ("1f1b", "gpipe")]
    first, second = (MemoryModel(c, True).worst(c, layout_of(c.parallel, 2)).activations for c in flying)
    assert first < second
    host = need(4, zero=3, offload="parameters")
    assert host.parameters == host.optimizer == 0
    assert host.host > 0


def test_layers_that_are_alike_are_reckoned_once():
    config = small_config(SMALL, {}, ("model.num_layers=12",))
    rules = StateRules(config)
    assert set(rules.alike) == {0}
    state = rules.of_rank(config, layout_of(config.parallel, 1), layout_of(config.parallel, 1).coordinate(0))
    assert state.parameters == 4 * sum(p.numel() for p in rules.model.parameters())
