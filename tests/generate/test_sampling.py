"""Sampling against brute force: the sets kept, the distribution drawn, the seeds."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from castalia.errors import UserError
from castalia.generate.sampling import (
    SamplingSettings,
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    largest,
    logprobs_of,
    make_generator,
    next_token_probabilities,
    penalise,
    sample,
)

ROW = torch.tensor([[1.0, 3.0, -2.0, 3.0, 0.5, 2.0]])
numbers = st.lists(st.integers(-6, 6), min_size=1, max_size=7).map(lambda xs: [x / 2 for x in xs])


def brute_force(logits: list[float], temperature: float, k: int, p: float) -> list[float]:
    """Top-k then nucleus in plain Python: the smallest prefix of the ranking that reaches p."""
    ranking = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: k or None]
    weights = {i: 2.718281828459045 ** (logits[i] / temperature) for i in ranking}
    total = sum(weights.values())
    for size in range(1, len(ranking) + 1):
        if sum(weights[i] for i in ranking[:size]) >= p * total * (1 - 1e-12):
            break
    kept = ranking[:size]
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(logits))]


@settings(max_examples=200, deadline=None)
@given(
    numbers,
    st.sampled_from([0.3, 1.0, 1.7]),
    st.integers(0, 8),
    st.sampled_from([0.0, 0.11, 0.37, 0.73, 0.97, 1.0]),
)
def test_distribution_equals_brute_force(logits: list[float], temperature: float, k: int, p: float) -> None:
    ours = next_token_probabilities(torch.tensor([logits]), SamplingSettings(temperature, k, p))[0]
    theirs = torch.tensor(brute_force(logits, temperature, k, p), dtype=torch.float64)
    # 1e-6: the logits are fp32, Python's are doubles. A wrong set would differ by far more.
    assert torch.allclose(ours, theirs, atol=1e-6, rtol=0)
    assert ((ours > 0) == (theirs > 0)).all()


def test_nucleus_is_the_smallest_set_that_reaches_p() -> None:
    probabilities = torch.tensor([[0.5, 0.25, 0.125, 0.125]], dtype=torch.float64)
    for p, size in [(0.0, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3), (0.875, 3), (0.9, 4), (1.0, 4)]:
        kept = keep_top_p(probabilities, p)
        assert int((kept > 0).sum()) == size, p
        assert kept.sum().item() == pytest.approx(1)


def test_top_k_keeps_exactly_k_and_the_lower_id_of_equals() -> None:
    assert torch.isfinite(keep_top_k(ROW, 1))[0].tolist() == [False, True, False, False, False, False]
    assert torch.isfinite(keep_top_k(torch.zeros(2, 5), 3)).sum().item() == 6
    assert torch.equal(keep_top_k(ROW, 99), ROW)


def test_every_uniform_number_lands_in_proportion() -> None:
    probabilities = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]], dtype=torch.float64)
    grid = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    counts = draw(probabilities.expand(1000, -1), grid).bincount(minlength=6)
    assert counts.tolist() == [0, 250, 0, 500, 250, 0]
    edges = torch.tensor([0.0, 0.25, 0.75, 1 - 2**-53], dtype=torch.float64)
    assert draw(probabilities.expand(4, -1), edges).tolist() == [1, 3, 4, 4]


def test_draws_follow_the_distribution() -> None:
    options = SamplingSettings(temperature=0.8, top_k=4, top_p=0.95)
    expected = next_token_probabilities(ROW, options)[0]
    n = 4000
    generators = [make_generator(0, i) for i in range(n)]
    counts = sample(ROW.expand(n, -1), options, generators).bincount(minlength=6)
    chi_squared = sum(
        (c - n * p) ** 2 / (n * p) for c, p in zip(counts.tolist(), expected.tolist(), strict=True) if p > 0
    )
    assert all(c == 0 for c, p in zip(counts.tolist(), expected.tolist(), strict=True) if p == 0)
    assert chi_squared < 16.3  # the 99.9 % point with 3 degrees of freedom; the seeds are fixed


def test_padding_is_never_sampled() -> None:
    logits = torch.tensor([[0.0, 1.0, 50.0, 60.0]])
    for options in [SamplingSettings(0), SamplingSettings(1.0), SamplingSettings(2.0, 3, 0.9)]:
        for i in range(20):
            assert sample(logits, options, [make_generator(1, i)], vocab_size=2).item() < 2
    assert next_token_probabilities(logits, SamplingSettings(), vocab_size=2)[0, 2:].sum() == 0


def test_greedy_takes_the_first_of_the_largest_and_draws_nothing() -> None:
    generator = make_generator(0, 0)
    before = generator.get_state()
    assert sample(ROW, SamplingSettings(0), [generator]).tolist() == [1]
    assert torch.equal(generator.get_state(), before)
    assert next_token_probabilities(ROW, SamplingSettings(0))[0].tolist() == [0, 1, 0, 0, 0, 0]


def test_a_tiny_temperature_is_greedy_and_finite() -> None:
    p = next_token_probabilities(torch.tensor([[1e4, 1e4 - 1, -1e4]]), SamplingSettings(1e-300))
    assert p[0].tolist() == [1, 0, 0]


def test_generators_differ_by_seed_and_index_and_repeat() -> None:
    def first(seed: int, index: int) -> float:
        return torch.rand((), generator=make_generator(seed, index), dtype=torch.float64).item()

    values = {key: first(*key) for key in itertools.product(range(4), range(4))}
    assert len(set(values.values())) == 16
    assert values == {key: first(*key) for key in values}


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"repetition_penalty": 0},
    ],
)
def test_senseless_settings_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(bad))):
        SamplingSettings(**bad)  # type: ignore[arg-type]


def test_min_p_is_relative_to_the_largest() -> None:
    probabilities = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64)
    for share, size in [(0.01, 4), (0.2, 3), (0.5, 2), (0.7, 1), (1.0, 1)]:
        kept = keep_min_p(probabilities, share)
        assert int((kept > 0).sum()) == size, share
        assert kept.sum().item() == pytest.approx(1)


def test_the_penalty_pushes_towards_what_is_new() -> None:
    seen = torch.tensor([[True, True, True, False, False, False]])
    assert penalise(ROW, seen, 2.0)[0].tolist() == [0.5, 1.5, -4.0, 3.0, 0.5, 2.0]
    assert sample(ROW, SamplingSettings(0, repetition_penalty=2.0), [], None, seen).tolist() == [3]


def test_the_nucleus_of_a_flat_distribution_is_found_beyond_the_most_probable() -> None:
    flat = torch.full((1, 5000), 1 / 5000, dtype=torch.float64)
    kept = keep_top_p(flat, 0.6)
    assert int((kept > 0).sum()) in (3000, 3001) and (kept[0, :3000] > 0).all()


@pytest.mark.parametrize("width", [5, 128, 256, 300])
def test_the_largest_is_what_argmax_finds_and_the_first_of_equal_ones(width: int) -> None:
    values = torch.randn(7, width, generator=torch.Generator().manual_seed(width))
    values[1] = 0
    values[2, -1], values[3, 0], values[4, [-2, -1]] = 9, 9, 9
    assert largest(values).tolist() == [row.tolist().index(row.max()) for row in values]


def test_logprobs_are_those_of_the_softmax() -> None:
    logits, ids = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)), torch.tensor([4, 0, 49])
    wanted = logits.log_softmax(-1)[torch.arange(3), ids]
    assert logprobs_of(logits, ids).tolist() == pytest.approx(wanted.tolist(), abs=1e-5)
