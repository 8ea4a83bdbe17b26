"""Every kernel of attention against the definition, token by token: values, gradients, dropout, all kinds of masks."""

from __future__ import annotations

import math

import pytest
import torch

from castalia.config import ModelConfig
from castalia.model import attention_flex, attention_tiles
from castalia.model.attention import attend
from castalia.model.attention_layouts import BlockLayout
from castalia.model.attention_mask import Documents, Drop, MaskSpec, ScoreBias
from castalia.model.attention_tiles import plan, tiled_attention
from castalia.model.dropout import DropoutKey
from castalia.model.positions import alibi_slopes

KINDS = ["global", "window", "local", "sparse_fixed", "sparse_variable", "bigbird", "bslongformer"]
S, HEADS = 53, 4
DOCUMENTS = torch.tensor([[0] * 7 + [1] * 1 + [2] * 30 + [0] * 15, [5] * 53])


def config(kind, **changes):
    shape = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": HEADS, "vocab_size": 64, "attention": kind}
    sparse = {"attention_block": 4, "attention_window": 9, "attention_random_blocks": 1, "attention_per_head": True}
    return ModelConfig(**(shape | sparse | {"attention_local_blocks": 2, "attention_window_blocks": [1, 2]} | changes))


def spec(kind, documents=False, bias=None, past=0, length=S, **changes):
    cfg = config(kind, **changes)
    layout = None if kind in ("global", "window") else BlockLayout(cfg, kind, 1)
    docs = Documents.of(DOCUMENTS[:, :length], "cpu") if documents else None
    keys = torch.arange(length)[None] if docs is None else torch.arange(length) - docs.starts
    scores = None
    if bias == "alibi":
        scores = ScoreBias(keys[:, past:], keys, slopes=torch.tensor(alibi_slopes(HEADS)))
    elif bias == "rpe":
        table = torch.randn(8, HEADS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        scores = ScoreBias(keys[:, past:], keys, table=table.requires_grad_(), furthest=20, head_size=8)
    return MaskSpec(kind, past, cfg.attention_window if kind == "window" else None, layout, docs, scores)


def tensors(kv_heads=HEADS, queries=S, keys=S, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def random(heads, length):
        return torch.randn(2, heads, length, 8, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    return random(HEADS, queries), random(kv_heads, keys), random(kv_heads, keys)


def is_seen(mask, row, head, i, j):
    """The definition: may token i of a row see token j?"""
    start_i = start_j = 0
    if mask.documents is not None:
        ids = DOCUMENTS[row].tolist()
        start_i, start_j = (max(p for p in range(t + 1) if p == 0 or ids[p] != ids[p - 1]) for t in (i, j))
    if j > i or start_i != start_j or (mask.window is not None and i - j >= mask.window):
        return False
    if mask.layout is None:
        return True
    live, size = mask.layout.live(S), mask.layout.block
    return bool(live[head % len(live), (i - start_i) // size, (j - start_j) // size])


def seen(mask, queries=S, keys=S):
    table = [
        [[[is_seen(mask, b, h, mask.past + i, j) for j in range(keys)] for i in range(queries)] for h in range(HEADS)]
        for b in range(2)
    ]
    return torch.tensor(table)


def expected(q, k, v, mask, drop=None, scale=None):
    k, v = (t.repeat_interleave(HEADS // t.shape[1], 1) for t in (k, v))
    scores = q @ k.mT * (scale or 1 / math.sqrt(8))
    if mask.bias is not None:
        distance = mask.bias.queries[:, None, :, None] - mask.bias.keys[:, None, None, :]
        if mask.bias.table is None:
            scores = scores - torch.tensor(alibi_slopes(HEADS)).view(-1, 1, 1) * distance
        else:
            near = distance.clamp(min=0).double()
            far = 4 + ((near.clamp(min=4) / 4).log() / math.log(20 / 4) * 4).long()
            bucket = torch.where(near < 4, near.long(), far.clamp(max=7))
            heads = torch.arange(HEADS).view(1, -1, 1, 1)
            scores = scores + math.sqrt(8) * mask.bias.table[bucket.expand(-1, HEADS, -1, -1), heads]
    p = scores.masked_fill(~seen(mask, q.shape[2], k.shape[2]), -math.inf).softmax(-1)
    return (p if drop is None else drop(p)) @ v


def gradients(out, leaves):
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return torch.autograd.grad((out * weight).sum(), leaves)


def check(core, mask, kv_heads=HEADS, drop=None, plain_drop=None, scale=None, tolerance=1e-6):
    """A core's values and gradients in fp64 are those of the definition."""
    leaves = list(tensors(kv_heads))
    if mask.bias is not None and mask.bias.table is not None:
        leaves.append(mask.bias.table)
    out = core(*leaves[:3], mask, drop, scale)
    right = expected(*leaves[:3], mask, plain_drop, scale)
    torch.testing.assert_close(out, right, rtol=tolerance, atol=tolerance)
    for found, wanted in zip(gradients(out, leaves), gradients(right, leaves), strict=True):
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=10 * tolerance)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    monkeypatch.setattr(attention_tiles, "ROWS", (8, 8))


@pytest.mark.parametrize("documents", [False, True], ids=["", "documents"])
@pytest.mark.parametrize("bias", [None, "alibi", "rpe"])
@pytest.mark.parametrize("kind", KINDS)
def test_tiles_compute_the_definition(kind, bias, documents):
    check(tiled_attention, spec(kind, documents, bias))


@pytest.mark.parametrize("documents", [False, True], ids=["", "documents"])
@pytest.mark.parametrize("bias", [None, "rpe"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_dense_path_computes_the_definition(kind, bias, documents):
    """Of this length `attend` takes the whole matrix; the same with one that was built before."""
    mask = spec(kind, documents, bias)
    check(attend, mask)
    mask.dense = mask.matrix(S, S, "cpu").detach()
    out = attend(*tensors(), mask)
    torch.testing.assert_close(out, expected(*tensors(), mask), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bias", [None, "alibi"])
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("kind", ["global", "window", "bigbird", "sparse_fixed"])
def test_grouped_heads(kind, kv_heads, bias):
    for documents in (False, True):
        for per_head in (False, True):
            mask = spec(kind, documents, bias, attention_per_head=per_head)
            check(tiled_attention, mask, kv_heads)
            check(attend, mask, kv_heads)


def test_a_scale_of_its_own():
    for kind in ("global", "window"):
        check(tiled_attention, spec(kind, True), scale=0.5)
        check(attend, spec(kind), scale=0.5)


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("core", [tiled_attention, attend])
@pytest.mark.parametrize("kind", KINDS)
def test_dropout_goes_by_the_number_of_the_element(kind, core, kv_heads):
    """The same elements are dropped by tiles, by the whole matrix, and by the masks written out."""
    key = DropoutKey(1, 2, torch.tensor([7, 9]))
    from castalia.model.dropout import keep_mask

    keep = keep_mask(key.streams, HEADS * S, S, 0.3, "probabilities", 1).view(2, HEADS, S, S)
    for documents in (False, True):
        mask = spec(kind, documents, "alibi" if documents else None)
        check(core, mask, kv_heads, Drop(key, 0.3, 1, S), lambda p: p * keep / 0.7)


def test_dropout_of_some_heads_is_that_of_the_whole():
    key, q = DropoutKey(1, 2, torch.tensor([7, 9])), tensors()
    for kind in ("global", "bigbird"):
        whole = tiled_attention(*q, spec(kind, True, "rpe"), Drop(key, 0.3, 1, S))
        part = [t[:, 2:3] for t in q]
        mask = spec(kind, True, "rpe").heads(2, 1)
        for core in (tiled_attention, attend):
            out = core(*part, mask, Drop(key, 0.3, 1, S, first_head=2))
            torch.testing.assert_close(out, whole[:, 2:3])


@pytest.mark.parametrize("bias", [None, "alibi"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_with_a_past(kind, bias):
    """Queries that come after cached keys, many at once and one at a time."""
    q, k, v = tensors()
    whole = expected(q, k, v, spec(kind, bias=bias))
    for past in (5, 16, 40):
        for core in (tiled_attention, attend):
            mask = spec(kind, bias=bias, past=past)
            torch.testing.assert_close(core(q[:, :, past:], k, v, mask), whole[:, :, past:], rtol=1e-6, atol=1e-6)
        mask = spec(kind, bias=bias, past=past, length=past + 1)
        one = attend(q[:, :, past : past + 1], k[:, :, : past + 1], v[:, :, : past + 1], mask)
        torch.testing.assert_close(one, whole[:, :, past : past + 1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["global", "window", "bigbird"])
def test_gradcheck(kind):
    """Central differences, independent of any reference."""
    q, k, v = (t[:1, :, :13, :3].detach().requires_grad_() for t in tensors(2))
    for documents in (False, True):
        mask = spec(kind, documents, length=13)
        if documents:
            mask.documents = Documents.of(DOCUMENTS[:1, 2:15], "cpu")
        assert torch.autograd.gradcheck(lambda *t, m=mask: tiled_attention(*t, m), (q, k, v), fast_mode=True)
    mask = spec(kind, bias="rpe", length=13)

    def with_table(q, k, v, table):
        return tiled_attention(q, k, v, MaskSpec(kind, 0, mask.window, mask.layout, None, mask.bias.with_table(table)))

    assert torch.autograd.gradcheck(with_table, (q, k, v, mask.bias.table), fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16(kind):
    mask = spec(kind, bias="alibi")
    q, k, v = tensors(2, dtype=torch.bfloat16)
    out = tiled_attention(q, k, v, mask)
    assert out.dtype == torch.bfloat16
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    right = expected(*exact, mask)
    assert (out - right).norm() < 0.01 * right.norm()
    for found, wanted in zip(gradients(out, (q, k, v)), gradients(right, exact), strict=True):
        assert found.dtype == torch.bfloat16 and (found - wanted).norm() < 0.02 * wanted.norm()


# --- What is not computed ---


@pytest.mark.parametrize("documents", [False, True], ids=["", "documents"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_covers_what_is_seen_and_hardly_more(kind, documents):
    """Each query once; every key that it sees; and no key that no query of the tile's blocks sees."""
    mask = spec(kind, documents)
    wanted = seen(mask)
    covered = torch.zeros_like(wanted, dtype=torch.long)
    for tile in plan(mask, HEADS, S, S, "cpu"):
        columns = torch.arange(S)[tile.columns]
        part = torch.zeros(2, HEADS, S, S, dtype=torch.long)
        rows = part[tile.batch, tile.heads, tile.rows]
        rows[..., columns] = 1
        covered += part
        # A key outside of all queries' sight may only be there to fill up its block.
        useful = wanted[tile.batch, tile.heads, tile.rows].any(2).flatten(0, 1).any(0)
        blocks = {int(c - tile.start) // 4 for c in torch.arange(S)[useful]}
        assert {int(c - tile.start) // 4 for c in columns} <= blocks
    assert covered.max() == 1 and (covered[wanted] == 1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_mask_is_noticed(kind, monkeypatch):
    """Take one live block out of the mask, or let one masked block in: the comparisons above fail."""
    right = MaskSpec.seen
    for change in (lambda m, i, j: m & ~((i == 50) & (j == 49)), lambda m, i, j: m | ((i == 30) & (j == 31))):

        def broken(self, rows, columns, start=0, head=0, change=change):
            seen = right(self, rows, columns, start, head)
            return change(seen, rows.unsqueeze(-1), columns.unsqueeze(-2))

        monkeypatch.setattr(MaskSpec, "seen", broken)
        mask = spec(kind, bias="alibi")
        with pytest.raises(AssertionError):
            check(tiled_attention, mask)


# --- FlexAttention, by its forward on the CPU ---


@pytest.mark.parametrize("bias", [None, "alibi", "rpe"])
@pytest.mark.parametrize("kind", ["global", "window", "bigbird", "sparse_fixed"])
@torch.no_grad()
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_flex_attention_computes_the_same(kind, bias):
    for documents in (False, True):
        mask = spec(kind, documents, bias)
        q, k, v = (t.detach() for t in tensors(2, dtype=torch.float32))
        out = attention_flex.flexible_attention(q, k, v, mask)
        torch.testing.assert_close(out, tiled_attention(q, k, v, mask), rtol=1e-4, atol=1e-5)
