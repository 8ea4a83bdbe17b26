"""Every kind of layer inside a model: documents apart, caches, positions, sizes, learning, dropout."""

from __future__ import annotations

import pytest
import torch

from castalia.config import Config, ModelConfig
from castalia.config.attention import KINDS
from castalia.errors import UserError
from castalia.generate.engine import make_cache
from castalia.model import Transformer, build_model
from castalia.model.attention_layouts import BlockLayout
from castalia.model.dropout import DropoutKey
from castalia.model.size import model_size, parameter_shapes
from castalia.tools import model_matrix

POSITIONS = ["rotary", "learned", "sinusoidal", "rpe", "alibi", "none"]
LENGTHS = [[5, 1, 19, 15], [40]]


def config(kind, position="none", **changes):
    shape = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 64}
    sparse = {"attention_block": 4, "attention_window": 6, "attention_local_blocks": 2, "amlp_size": 8}
    if kind in ("gmlp", "amlp") and position in ("rotary", "rpe", "alibi"):
        kind = [kind, "window"]  # alone it has no use for them
    more = {"attention": kind, "position": position, "max_position_embeddings": 48, "attention_window_blocks": [2]}
    return ModelConfig(**(shape | sparse | more | {"attention_random_blocks": 1} | changes))


def random_model(cfg, std=0.3):
    model = Transformer(cfg).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, std, generator=generator)
    return model


def tokens(length=40, rows=2):
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(0))


def doc_ids():
    """Ids repeat, as long as neighbours differ."""
    rows = [[i % 2 for i, length in enumerate(lengths) for _ in range(length)] for lengths in LENGTHS]
    return torch.tensor(rows, dtype=torch.int32)


COMBINATIONS = [(k, p) for k in KINDS for p in POSITIONS]


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "tiles"])
@pytest.mark.parametrize(("kind", "position"), COMBINATIONS)
@torch.no_grad()
def test_packed_documents_are_as_they_would_be_alone(kind, position, dense, monkeypatch):
    if not dense:
        monkeypatch.setattr("castalia.model.attention_mask.DENSE_LENGTH", 0)
        monkeypatch.setattr("castalia.model.attention_mask.DENSE_BIAS_LENGTH", 0)
    model, ids = random_model(config(kind, position)), tokens()
    packed = model(ids, doc_ids=doc_ids())
    together = model(ids)
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            alone = model(ids[row : row + 1, start : start + length])
            torch.testing.assert_close(packed[row : row + 1, start : start + length], alone, rtol=1e-4, atol=1e-4)
            start += length
    assert (packed[0, 5:] - together[0, 5:]).abs().max() > 1e-2


def test_gradients_do_not_cross_documents():
    for kind in KINDS:
        model = random_model(config(kind))
        weight = torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(4))
        weight[0, :25] = 0  # only the last document of the first row bears a loss
        weight[1] = 0
        embedded = []

        def keep(module, given, out, embedded=embedded):
            out.retain_grad()
            embedded.append(out)

        hook = model.embedding.register_forward_hook(keep)
        (model(tokens(), doc_ids=doc_ids()) * weight).sum().backward()
        hook.remove()
        grad = embedded[0].grad
        assert grad[0, :25].abs().max() == 0 and grad[1].abs().max() == 0 and grad[0, 25:].abs().min(0).values.max() > 0


@pytest.mark.parametrize(("kind", "position"), COMBINATIONS)
@torch.no_grad()
def test_a_cache_changes_nothing(kind, position):
    """In pieces of many tokens and of one, also beyond the window and over block borders."""
    model = random_model(config(kind, position, num_kv_heads=2))
    whole, parts, cache = model(tokens()), [], make_cache(model, 40)
    for piece in tokens().split([13, 1, 1, 6, 1, 17, 1], 1):
        parts.append(model(piece, cache=cache))
        cache.advance(piece.shape[1])
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_nothing_looks_ahead_and_each_kind_has_its_reach(kind):
    model, ids = random_model(config(kind, "learned")), tokens()
    base, changed = model(ids), ids.clone()
    changed[:, 20] = (changed[:, 20] + 1) % 64
    moved = (model(changed) - base).abs().amax((0, 2)) > 0
    assert not moved[:20].any() and moved[20]
    if kind == "window":  # two layers of six keys reach ten tokens on
        assert moved[20:31].all() and not moved[31:].any()


@pytest.mark.parametrize("kind", [*KINDS, [[["global", "window"], 2], "gmlp", "amlp"]], ids=str)
def test_sizes_and_initial_weights(kind):
    mixed = not isinstance(kind, str)
    cfg = config(kind, "learned", num_layers=6 if mixed else 2, norm="rmsnorm", soft_prompt_tokens=3)
    model = build_model(cfg, 0)
    assert parameter_shapes(cfg, 64) == {name: tuple(p.shape) for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        if "spatial" in name:
            assert (p == (1 if name.endswith("bias") else 0)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_learns_and_differentiates(kind):
    """The copy task; and the gradients of all tensors against central differences in fp64."""
    cfg = model_matrix.configuration(("layernorm", "learned", "gelu", "sequential"), attention_window=9)
    reach = {"attention": kind, "attention_block": 2, "attention_local_blocks": 4, "amlp_size": 16}
    cfg = cfg.model_copy(update=reach)
    loss, _ = model_matrix.copy_task(cfg)
    assert loss < model_matrix.COPIED
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("castalia.model.attention_mask.DENSE_LENGTH", 0)
        error, tensor = model_matrix.gradient_error(model_matrix.random_model(cfg))
    assert error < model_matrix.GRADIENT_TOLERANCE, tensor


def test_flops_follow_what_is_seen():
    def flops(kind, **changes):
        return model_size(Config(model=config(kind, "learned", **changes), data={"seq_length": 48})).flops_per_token

    assert flops("global") - flops("window") == 2 * 12 * 32 * (48 - 6)
    assert flops("global") - flops("local") == 2 * 12 * 32 * (48 - 8)
    # A gmlp layer's weights of places are no matrix that each token is multiplied by.
    matrices = 2 * 6 * (2 * 128 * 32 + 256 + 32 * 128 + 32 + 2 * 32 + 2 * 128) + 6 * 2 * 32
    assert flops("gmlp") == matrices + 6 * 64 * 32 + 2 * 6 * 128 * 48


def test_dropout_is_of_the_layer_and_of_the_whole_sequence():
    """The same elements whichever way attention is computed, and whether or not the gradient is wanted."""
    key = DropoutKey(0, 3, torch.tensor([4, 9]))
    for kind in KINDS:
        model = random_model(config(kind, "learned", attention_dropout=0.3, hidden_dropout=0.2))
        with pytest.MonkeyPatch.context() as patch:
            dense = model(tokens(), dropout=key, doc_ids=doc_ids())
            patch.setattr("castalia.model.attention_mask.DENSE_LENGTH", 0)
            tiles = model(tokens(), dropout=key, doc_ids=doc_ids())
        torch.testing.assert_close(dense, tiles, rtol=1e-4, atol=1e-4)
        assert (dense - model(tokens(), doc_ids=doc_ids())).abs().max() > 1e-2


def test_random_blocks_depend_on_seed_layer_and_head_alone():
    cfg = config("bigbird", attention_per_head=True)
    live = BlockLayout(cfg, "bigbird", 0).live(400)
    again = BlockLayout(cfg, "bigbird", 0)
    assert torch.equal(again.live(40), live[:, :10, :10]) and torch.equal(again.live(400), live)
    assert not torch.equal(live[0], live[1]) and torch.equal(again.heads(1, 2).live(400), live[1:3])
    seeded = cfg.model_copy(update={"attention_seed": 5})
    for other in (BlockLayout(cfg, "bigbird", 1), BlockLayout(seeded, "bigbird", 0)):
        assert not torch.equal(other.live(400), live)


LAYOUTS = {
    "local": ["1...", "11..", ".11.", "..11"],
    "sparse_fixed": ["1.....", "11....", ".11...", ".111..", ".1.11.", ".1.111"],
    "sparse_variable": ["1.....", "11....", "111...", "1..1..", "1..11.", "1....1"],
    "bigbird": ["1.....", "11....", "111...", "1.11..", "1..11.", "1...11"],
    "bslongformer": ["1.....", "11....", ".11...", "1111..", "...11.", "...111"],
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_layouts_as_drawn(kind):
    changes = {
        "sparse_variable": {"attention_window_blocks": [1, 2], "attention_random_blocks": 0},
        "bigbird": {"attention_random_blocks": 0},
        "bslongformer": {"attention_global_starts": [3]},
    }.get(kind, {})
    live = BlockLayout(config(kind, **changes), kind, 0).live(4 * len(LAYOUTS[kind]))
    assert ["".join(".1"[int(x)] for x in row) for row in live[0]] == LAYOUTS[kind]


def test_heads_take_the_patterns_of_sparse_fixed_in_turn():
    cfg = config("sparse_fixed", attention_global_patterns=2, attention_per_head=True)
    live = BlockLayout(cfg, "sparse_fixed", 0).live(24)
    assert live.shape[0] == 4 and torch.equal(live[0], live[2]) and torch.equal(live[1], live[3])
    assert live[0, 4].tolist() == [False, True, False, True, True, False]
    assert live[1, 4].tolist() == [True, False, True, False, True, False]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attention": "globl"}, "unknown kind 'globl'"),
        ({"attention": "window", "attention_window": None}, "model.attention_window"),
        ({"attention": ["global"]}, "describes 1 layers"),
        ({"attention": ["global"] * 3}, "describes at least 3 layers"),
        ({"attention": [[["global"] * 3, "all"]]}, "leaves a rest"),
        ({"attention": [[["global"], "some"]]}, "repeats"),
        ({"attention": [3]}, "neither a kind"),
        ({"attention": "gmlp", "position": "rotary"}, "acts on attention"),
        ({"attention": "amlp", "activation": "swiglu"}, "model.activation"),
        ({"attention": "sparse_fixed", "attention_local_blocks": 3, "attention_global_blocks": 2}, "multiple"),
        ({"attention": "sparse_fixed", "attention_global_patterns": 2}, "attention_per_head"),
        ({"attention_global_ends": [1, 2]}, "one end"),
        ({"attention_window_blocks": [0]}, "at least 1"),
        ({"attention": ["global", "window"], "num_unique_layers": 1}, "share their weights"),
    ],
)
def test_what_makes_no_sense_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        config("global", **changes)


def test_layers_that_are_left_take_what_stands_last():
    kinds = config([[["global"], 2], "local", [["window", "local"], "all"]], num_layers=7).attention_kinds
    assert kinds == ("global", "global", "local", "window", "local", "window", "local")


def test_too_long_for_a_gmlp_and_documents_with_a_soft_prompt():
    with pytest.raises(UserError, match="places of a gmlp layer"):
        random_model(config("gmlp"))(tokens(49))
    with pytest.raises(UserError, match="soft prompt"):
        random_model(config("global", soft_prompt_tokens=2))(tokens(), doc_ids=doc_ids())
