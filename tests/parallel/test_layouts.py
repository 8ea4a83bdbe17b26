"""Pairs of layout and model against one process, by the machinery of `castalia verify layouts`."""

import re

import pytest
import torch

from castalia.errors import UserError
from castalia.model.transformer import Transformer
from castalia.parallel.layout import Layout, held_tokens, layout_of
from castalia.parallel.parallelize import check_model
from castalia.parallel.plans import bounds, entry
from castalia.parallel.stages import layer_stages, partition
from castalia.parallel.testing import run_in_processes
from castalia.tools.verify import layout_named, shrink, train_small, verify_layouts, verify_resume, with_settings
from castalia.tools.verify_compare import compare
from castalia.train.engine import LocalEngine

DROPOUT = ("model.hidden_dropout=0.1", "model.attention_dropout=0.1")
# Each layout with what could go wrong in it; the whole matrix is `castalia.tools.certify layouts`.
PAIRS = {
    "dp2": DROPOUT,
    "zero1": ("model.tie_embeddings=true",),
    "zero2": ("model.norm=rmsnorm", "training.nonfinite=skip"),
    "zero3": ("model.num_unique_layers=3",),
    "hsdp": (),
    "tp2": (*DROPOUT, "model.position=alibi", "model.tie_embeddings=true"),
    "tp2sp": (*DROPOUT, "model.residual=parallel", "model.activation=swiglu"),
    "cp2": (*DROPOUT, "model.position=rpe", "model.num_kv_heads=4"),
    "pp2": (*DROPOUT, "model.tie_embeddings=true"),
    "pp2interleaved": (),
    "pp2zerobubble": DROPOUT,
    "tp2pp2": (*DROPOUT, "model.position=alibi"),
    "zero3pp2": ("model.tie_embeddings=true",),
    "ep2x2": ("model.moe_num_experts=3", "model.moe_bias_rate=0.01", "model.moe_shared_experts=1"),
    "zero3cp2tp2": ("model.position=learned", "model.qk_norm=true", "model.norm=rmsnorm"),
}


EXPERTS = (
    *DROPOUT,
    "model.moe_num_experts=4",
    "model.moe_shared_experts=1",
    "model.moe_bias_rate=0.01",
    "model.moe_jitter=0.1",
    "loss.moe_balance=0.05",
    "loss.moe_z_loss=0.01",
)
APART = (*DROPOUT, "data.document_mask=true")
PRODUCTS = [
    ("tp2", EXPERTS),
    ("tp2sp", EXPERTS),
    ("cp2", EXPERTS),
    ("pp2", EXPERTS),
    ("ep2tp2", EXPERTS),
    ("zero1", (*EXPERTS, "model.mtp_depth=1")),
    ("zero3", (*EXPERTS, "performance.recompute=full")),
    ("zero3pp2", EXPERTS),
    ("cp2", APART),
    ("pp2", APART),
    ("cp2pp2", (*APART, "model.position=alibi")),
    ("cp2contiguous", DROPOUT),
    ("pp2", ("model.position=rpe",)),
]


@pytest.mark.parametrize(("name", "overrides"), PRODUCTS)
def test_layouts_and_parts_of_models_compose(config_of, name, overrides):
    (verdict,) = verify_layouts(config_of(*overrides), [name])
    assert verdict.good, verdict


def experts_used(world, config):
    """What some steps of training noted of the experts, whose biases moved, and what it did."""
    noted, usual = [], LocalEngine.forward_backward

    def watched(self, *given):
        stats = usual(self, *given)
        self.updated()
        noted.append((stats.experts, stats.aux))
        return stats

    LocalEngine.forward_backward = watched
    return noted, train_small(world, config, 3)


@pytest.mark.parametrize("name", ["zero1", "zero3"])
def test_zero_notes_the_experts_of_every_layer(config_of, name):
    """FSDP2 copies dataclasses on their way into a layer: what were noted in a copy would be lost."""
    small = shrink(config_of(*EXPERTS))
    ((expected, trace),) = run_in_processes(1, experts_used, small, joined=False)
    assert all(set(used) == {0, 1, 2, 3} for used, _ in expected)
    processes, settings = layout_named(name)
    results = run_in_processes(processes, experts_used, with_settings(small, settings))
    for found, _ in results:
        for (used, aux), (their_used, their_aux) in zip(found, expected, strict=True):
            assert used == their_used and aux == pytest.approx(their_aux, rel=1e-5)
    assert "layers.3.mlp.router.bias" in trace.weights
    verdict = compare(name, trace, [trace for _, trace in results], 1e-5)
    assert verdict.good, verdict


@pytest.mark.parametrize(("length", "ranks"), [(32, 2), (64, 4), (48, 3)])
def test_context_ranks_hold_every_token_once_and_meet_as_many_pairs(length, ranks):
    held = [held_tokens(length, ranks, rank, True) for rank in range(ranks)]
    assert sorted(i for chunks in held for chunk in chunks for i in chunk) == list(range(length))
    assert len({sum(i + 1 for chunk in chunks for i in chunk) for chunks in held}) == 1


def test_a_sequence_that_does_not_divide_into_pairs_of_chunks_is_cut_in_stretches():
    assert [held_tokens(6, 2, rank, True) for rank in range(2)] == [[range(3)], [range(3, 6)]]


@pytest.mark.parametrize("name", PAIRS)
def test_a_layout_trains_as_one_process(config_of, name):
    (verdict,) = verify_layouts(config_of(*PAIRS[name]), [name])
    assert verdict.good, verdict


def test_zero_in_bf16_rounds_as_one_process(config_of):
    (verdict,) = verify_layouts(config_of("training.precision=bf16"), ["zero3"])
    assert verdict.good, verdict


@pytest.mark.parametrize(
    ("fault", "name", "guilty"),
    [
        ("dropped_all_reduce", "dp2", "the sum of gradients over the ranks"),
        ("dropped_all_reduce", "tp2sp", "final_norm (its gradients, and those of 16 others)"),
        ("averaged_loss", "dp2", "the loss (the gradient that it passes on)"),
        ("wrong_shard", "tp2", "layers.1.mlp (its output)"),
        ("wrong_output", "zero3cp2tp2", "layers.1.attention (its output)"),
        ("wrong_gradient", "tp2sp", "layers.1.mlp (the gradient that it passes on)"),
        ("wrong_gradient", "pp2", "layers.1.mlp (the gradient that it passes on)"),
    ],
)
def test_the_module_with_the_planted_fault_is_named(config_of, fault, name, guilty):
    """Though every parameter's gradient differs, or nearly: the first of them would be the embedding's."""
    (verdict,) = verify_layouts(config_of(), [name], fault=fault)
    assert not verdict.good and verdict.first is not None and verdict.guilty == guilty


def test_a_fault_is_named_in_layers_that_are_computed_again(config_of):
    (verdict,) = verify_layouts(config_of("performance.recompute=full"), ["dp2"], fault="wrong_gradient")
    assert verdict.guilty == "layers.1.mlp (the gradient that it passes on)"


@pytest.mark.parametrize(
    ("settings", "overrides", "text"),
    [
        ({"tensor": 3, "procs": 3}, (), "model.num_attention_heads 8 does not divide by parallel.tensor 3"),
        ({"tensor": 8, "procs": 8}, ("model.num_kv_heads=4",), "model.num_kv_heads 4 does not divide"),
        ({"tensor": 4, "procs": 6}, (), "does not divide 6 processes"),
        ({"procs": 3}, (), "training.batch_size 16 does not divide"),
        ({"zero": 3, "shard": 3, "procs": 4}, (), "parallel.shard 3 does not divide the 4"),
        ({"context": 3, "procs": 3}, (), "data.seq_length 32 does not divide by parallel.context 3"),
        ({"expert": 2, "procs": 2}, (), "parallel.expert 2 is more than model.moe_num_experts 0"),
        (
            {"context": 2, "procs": 2},
            ("model.moe_num_experts=4", "model.moe_router=sinkhorn", "model.moe_top_k=1"),
            "model.moe_router sinkhorn needs whole sequences",
        ),
        ({"tensor": 2, "procs": 2}, ("model.qk_norm=true",), "model.qk_norm with model.norm layernorm"),
        ({"pipeline": 2, "procs": 2, "schedule": "zero_bubble"}, ("model.position=rpe",), "model.position rpe's table"),
        ({"pipeline": 5, "procs": 5}, (), "model.num_layers 4 is less than the 5 stages"),
        ({"pipeline": 2, "procs": 4, "zero": 1, "schedule": "zero_bubble"}, (), "zero_bubble splits the backward pass"),
        ({"tensor": 2, "procs": 2, "performance.compile": True}, (), "performance.compile"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_starts(config_of, settings, overrides, text):
    small = shrink(config_of(*overrides))
    procs = settings.pop("procs")
    spread = with_settings(small, settings)
    with pytest.raises(UserError, match=re.escape(text)):
        check_model(spread, layout_of(spread.parallel, procs))


def test_an_unknown_layout_is_refused(config_of):
    with pytest.raises(UserError, match="layout 'dp' is not known"):
        verify_layouts(config_of(), ["dp"])


def test_a_parameter_without_a_plan_is_refused():
    assert entry("layers.17.attention.qkv.bias") == 0
    with pytest.raises(UserError, match=r"no plan for cutting layers\.3\.other\.weight"):
        entry("layers.3.other.weight")


def test_layers_are_shared_out_so_that_the_dearest_stage_is_cheapest():
    assert partition([1.0] * 7, 3) == [range(3), range(3, 5), range(5, 7)]
    assert partition([5.0, 1, 1, 1, 5], 3) == [range(1), range(1, 4), range(4, 5)]
    assert partition([1.0, 1.0], 2) == [range(1), range(1, 2)]


def test_a_pattern_says_which_layers_count(config_of):
    def stages(method):
        config = shrink(config_of(f"parallel.partition={method}", "parallel.pipeline=2"))
        with torch.device("meta"):
            return layer_stages(Transformer(config.model), config)

    assert stages("type:transformer") == stages("uniform") == [range(2), range(2, 4)]
    with pytest.raises(UserError, match="matches no layer"):
        stages("type:mamba")


def test_ranks_are_numbered_with_tensor_ranks_side_by_side():
    layout = Layout(pipeline=2, replicate=1, shard=3, context=1, tensor=2)
    places = [layout.coordinate(rank) for rank in range(layout.world)]
    assert layout.world == 12 and len({tuple(p.items()) for p in places}) == 12
    assert places[1] == {"tensor": 1, "context": 0, "shard": 0, "replicate": 0, "pipeline": 0}
    assert places[6]["pipeline"] == 1 and places[2]["shard"] == 1


@pytest.mark.parametrize(("size", "ranks"), [(67, 4), (8, 8), (3, 2)])
def test_bounds_cover_everything_once(size, ranks):
    shares = [range(*bounds(size, ranks, rank)) for rank in range(ranks)]
    assert [i for share in shares for i in share] == list(range(size))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(("before", "after"), [("zero3", "tp2"), ("tp2sp", "zero3pp2")])
def test_a_killed_job_goes_on_in_another_layout(config_of, before, after):
    verdict = verify_resume(config_of("model.tie_embeddings=true"), before, after)
    assert verdict.good, verdict
