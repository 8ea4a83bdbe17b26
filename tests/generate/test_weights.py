"""Quick forms of matrices: the same products, or as near as 8 bits are; and caches no longer than a window."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from castalia.generate.cache import RowCache
from castalia.generate.decoder import Decoder
from castalia.generate.engine import generate
from castalia.generate.weights import Int8Linear, PackedLinear
from castalia.model import Transformer
from castalia.model.registry import ACTIVATIONS


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_packed_matrices_give_the_products_of_plain_ones(rows: int) -> None:
    draw = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(*s, generator=draw).bfloat16() for s in ((rows, 1, 64), (96, 64), (96,)))
    with torch.inference_mode():
        theirs = F.linear(x, w, b)
        assert torch.allclose(PackedLinear(w, b)(x.float()), theirs, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu"])
@pytest.mark.parametrize(("rows", "wide"), [(3, False), (3, True), (300, True)])
def test_an_activation_in_the_product_is_the_same_activation(activation: str, rows: int, wide: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(*s, generator=draw).bfloat16() for s in ((rows, 64), (96, 64), (96,)))
    packed = PackedLinear(w, b, wide)
    packed.activation = activation
    with torch.inference_mode():
        theirs = ACTIVATIONS[activation](F.linear(x.float(), w.float(), b.float()))
        assert torch.allclose(packed(x).float(), theirs, rtol=2**-6, atol=2**-7)


@pytest.mark.parametrize("kind", ["gelu_tanh", "mish", "swiglu"])
def test_a_decoder_computes_what_its_model_does(make_model: Callable[..., Transformer], kind: str) -> None:
    model = make_model(activation=kind, qk_norm="head", num_kv_heads=2).to(torch.bfloat16).eval()
    tokens = torch.tensor([list(b"some text to read"), list(b"and another, too!")])
    with torch.inference_mode():
        plain = model.logits(model(tokens)[:, -1])
        assert (Decoder(model).begin(tokens.tolist(), 20) - plain).norm() < 0.02 * plain.norm()


@pytest.mark.parametrize("rows", [1, 40])
def test_int8_errs_by_half_a_step_of_each_weight(rows: int) -> None:
    draw = torch.Generator().manual_seed(0)
    x, w = (torch.randn(*s, generator=draw) for s in ((rows, 64), (96, 64)))
    w *= torch.logspace(-2, 2, 96).unsqueeze(1)  # a scale for all rows would lose the small ones
    linear = Int8Linear(w, None)
    step = linear.scale.float()
    assert ((linear.q * step.unsqueeze(1) - w).abs() <= 0.502 * step.unsqueeze(1)).all()
    with torch.inference_mode():
        error = (linear(x).float() - F.linear(x, w)).abs() / (x.norm(dim=1, keepdim=True) * w.norm(dim=1))
    assert error.max() < 0.01


@pytest.mark.parametrize("int8", [False, True])
def test_a_decoder_leaves_the_model_as_it_was(make_model: Callable[..., Transformer], int8: bool) -> None:
    model = make_model().to(torch.bfloat16)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    Decoder(model, int8)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.head is not None


@pytest.mark.parametrize("shape", [{}, {"tie_embeddings": True}, {"moe_num_experts": 2, "norm": "rmsnorm"}])
def test_int8_and_bf16_write_nearly_what_fp32_writes(
    make_model: Callable[..., Transformer], tokenizer: Any, shape: dict[str, Any]
) -> None:
    model = make_model(**shape)
    prompts = [[65, 66, 67], [70]]
    exact = generate(model, tokenizer, prompts, 1, 0, keep_logits=True)
    rough = generate(Decoder(model, int8=True), tokenizer, prompts, 1, 0, keep_logits=True)
    for a, b in zip(exact, rough, strict=True):
        assert a.logits is not None and b.logits is not None
        assert 0 < (a.logits - b.logits).norm() / a.logits.norm() < 0.05


def test_layers_with_a_window_keep_no_more_than_it(make_model: Callable[..., Transformer], tokenizer: Any) -> None:
    model = make_model(attention=[[["global", "window"], 1]], attention_window=6)
    decoder = Decoder(model)
    generate(decoder, tokenizer, ["abcdefghijk", "xy"], 10, 0, stop_at_eod=False)
    cache = decoder._cache
    assert isinstance(cache, RowCache)
    assert [stored[0].shape[2] for stored in cache._stored if stored is not None] == [20, 6]
