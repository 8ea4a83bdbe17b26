"""The chunked loss: value and gradients equal plain cross-entropy's, ignored labels are really ignored."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from castalia.model.loss import IGNORED, linear_cross_entropy, loss_sums, token_nll


def _case(tokens=37, hidden=16, vocab=101, ignored=(0, 5, 36)):
    g = torch.Generator().manual_seed(0)
    h = torch.randn(tokens, hidden, generator=g)
    w = torch.randn(vocab, hidden, generator=g)
    y = torch.randint(0, vocab, (tokens,), generator=g)
    y[list(ignored)] = IGNORED
    return h, w, y


@pytest.mark.parametrize("chunk", [1, 8, 37, 512])
def test_equals_plain_cross_entropy(chunk):
    h, w, y = _case()
    mine = [t.clone().requires_grad_() for t in (h, w)]
    theirs = [t.clone().double().requires_grad_() for t in (h, w)]
    scaled, plain = linear_cross_entropy(*mine, y, scale=0.25, chunk_size=chunk)
    (scaled * 3).backward()
    reference = F.cross_entropy(theirs[0] @ theirs[1].T, y, ignore_index=IGNORED, reduction="sum")
    (reference * 0.75).backward()
    assert plain.item() == pytest.approx(reference.item(), rel=1e-6)
    assert scaled.item() == pytest.approx(0.25 * reference.item(), rel=1e-6)
    for a, b in zip(mine, theirs, strict=True):
        assert (a.grad.double() - b.grad).norm() < 1e-6 * b.grad.norm()


def test_large_logits_do_not_overflow():
    h, w, y = _case()
    scaled, _ = linear_cross_entropy(h * 100, w * 10, y)
    reference = F.cross_entropy((h * 100).double() @ (w * 10).double().T, y, ignore_index=IGNORED, reduction="sum")
    assert scaled.item() == pytest.approx(reference.item(), rel=1e-5)


def test_all_ignored_is_zero_not_nan():
    h, w, y = _case()
    h.requires_grad_()
    w.requires_grad_()
    scaled, _ = linear_cross_entropy(h, w, torch.full_like(y, IGNORED))
    scaled.backward()
    assert scaled.item() == 0.0 and h.grad.abs().max() == 0 and w.grad.abs().max() == 0


def test_bf16_gradient_is_as_good_as_bf16_allows():
    """Within twice the error of rounding the operands alone."""
    h, w, y = _case(tokens=256, hidden=64, vocab=1000, ignored=())
    exact = [t.clone().double().requires_grad_() for t in (h, w)]
    F.cross_entropy(exact[0] @ exact[1].T, y, reduction="sum").backward()
    mine = [h.clone().requires_grad_(), w.bfloat16().requires_grad_()]
    linear_cross_entropy(*mine, y, chunk_size=64)[0].backward()
    rounded = [t.bfloat16().double().requires_grad_() for t in (h, w)]
    F.cross_entropy(rounded[0] @ rounded[1].T, y, reduction="sum").backward()
    for a, b, r in zip(mine, exact, rounded, strict=True):
        floor = (r.grad - b.grad).norm() / b.grad.norm()
        assert (a.grad.double() - b.grad).norm() / b.grad.norm() < 2 * floor + 2.0**-8


@pytest.mark.parametrize("chunk", [16, 64, 512])
def test_bf16_gradient_does_not_decay_with_the_number_of_chunks(chunk):
    """Frequent labels make long sums of equal sign, where bf16 alone would lose most."""
    g = torch.Generator().manual_seed(0)
    h, w = torch.randn(4096, 32, generator=g) + 0.5, 0.3 * torch.randn(200, 32, generator=g)
    y = (200 ** torch.rand(4096, generator=g)).long().clamp(max=199)
    exact = w.double().requires_grad_()
    F.cross_entropy(h.double() @ exact.T, y, reduction="sum").backward()
    mine = w.bfloat16().requires_grad_()
    linear_cross_entropy(h, mine, y, chunk_size=chunk)[0].backward()
    assert (mine.grad.double() - exact.grad).norm() / exact.grad.norm() < 6e-3


def test_token_nll_matches_and_keeps_shape():
    h, w, y = _case(tokens=36, ignored=(3,))
    nll = token_nll(h.view(4, 9, -1), w, y.view(4, 9), chunk_size=5)
    reference = F.cross_entropy(h @ w.T, y, ignore_index=IGNORED, reduction="none").view(4, 9)
    assert nll.shape == (4, 9)
    torch.testing.assert_close(nll, reference, rtol=1e-5, atol=1e-6)
    assert nll[0, 3] == 0


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize("with_bias", [False, True])
def test_gradients_in_fp64_with_z_loss_and_bias(z_loss, with_bias):
    """The whole loss against autograd's finite differences, masked labels and several chunks included."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)
        for shape in ((7, 5), (11, 5), (11,))
    )
    labels = torch.tensor([0, 10, -100, 3, 4, -100, 2])

    def loss(hidden, weight, bias):
        given = bias if with_bias else None
        return loss_sums(hidden, weight, labels, bias=given, scale=0.5, z_loss=z_loss, chunk_size=3).scaled

    assert torch.autograd.gradcheck(lambda h, w, b: loss(h, w, b) + 0 * b.sum(), (hidden, weight, bias))
    sums = loss_sums(hidden, weight, labels, bias=bias if with_bias else None, z_loss=z_loss)
    logits = hidden @ weight.T + (bias if with_bias else 0)
    squares = logits.logsumexp(1).square()[labels >= 0].sum()
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    torch.testing.assert_close(sums.nll, expected.detach())
    torch.testing.assert_close(sums.z_squares, squares.detach())
    torch.testing.assert_close(sums.scaled, expected + z_loss * squares)
    nll = token_nll(hidden, weight, labels, bias=bias if with_bias else None)
    assert nll.sum().item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_fp16_gradients_beyond_its_range_of_columns(z_loss):
    """Even logits over 70,000 columns: the softmax's sum is beyond fp16's 65,504, and a probability near its least."""
    g = torch.Generator().manual_seed(0)
    h, w = torch.randn(24, 8, generator=g), 1e-2 * torch.randn(70_000, 8, generator=g)
    y = torch.randint(0, 70_000, (24,), generator=g)
    y[3] = IGNORED
    wide = [h.clone().requires_grad_(), w.clone().requires_grad_()]
    half = [h.clone().requires_grad_(), w.half().requires_grad_()]
    for operands in (wide, half):
        loss_sums(*operands, y, scale=64.0, z_loss=z_loss, chunk_size=10).scaled.backward()
    for a, b in zip(half, wide, strict=True):
        assert a.grad.isfinite().all()
        assert (a.grad.float() - b.grad).norm() < 5e-3 * b.grad.norm()
