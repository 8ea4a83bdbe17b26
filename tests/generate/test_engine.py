"""Generation: the cache changes nothing, batches change nothing, limits are named."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from castalia.errors import UserError
from castalia.generate.engine import generate, make_cache
from castalia.generate.sampling import SamplingSettings, make_generator, sample
from castalia.model import Transformer

MakeModel = Callable[..., Transformer]
SHAPES = [
    {},
    {"num_kv_heads": 2, "residual": "parallel", "norm": "rmsnorm", "activation": "swiglu"},
    {"position": "none", "tie_embeddings": True, "num_kv_heads": 1},
]


@pytest.mark.parametrize("shape", SHAPES)
def test_cached_logits_equal_uncached(make_model: MakeModel, shape: dict[str, Any]) -> None:
    model = make_model(**shape)
    tokens = torch.randint(0, 256, (3, 20), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        whole = model.logits(model(tokens))
        cache = make_cache(model, 20)
        parts = []
        for start, end in [(0, 7), (7, 8), (8, 13), (13, 14), (14, 20)]:  # prefill, single steps, chunks
            parts.append(model.logits(model(tokens[:, start:end], None, cache)))
            cache.advance(end - start)
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-5 * whole.abs().max()


def alone(model: Transformer, prompt: list[int], max_tokens: int, **settings: Any) -> list[int]:
    """The same without a cache and without a batch: the whole sequence anew for each token."""
    options, generator, tokens = SamplingSettings(**settings), make_generator(3, 0), list(prompt)
    with torch.inference_mode():
        for _ in range(max_tokens):
            logits = model.logits(model(torch.tensor([tokens]))[:, -1])
            seen = torch.zeros_like(logits, dtype=torch.bool)
            seen[0, tokens] = True
            tokens.append(int(sample(logits, options, [generator], 257, seen)))
    return tokens[len(prompt) :]


KINDS = [
    *SHAPES,
    {"position": "learned", "qk_norm": "head", "norm": "rmsnorm"},
    {"position": "alibi"},
    {"position": "rpe", "num_kv_heads": 2},
    {"position": "sinusoidal", "norm_placement": "post", "residual": "sequential"},
    {"attention": "window", "attention_window": 5},
    {"attention": [[["global", "window"], 1]], "attention_window": 7, "position": "alibi"},
    {"attention": "local", "attention_block": 4},
    {"attention": "gmlp", "position": "learned"},
    {"soft_prompt_tokens": 2},
    {"moe_num_experts": 4, "moe_top_k": 2},
]


@pytest.mark.parametrize("shape", KINDS, ids=str)
def test_a_batch_of_unequal_prompts_equals_each_alone_without_a_cache(
    make_model: MakeModel, tokenizer: Any, shape: dict[str, Any]
) -> None:
    model = make_model(**shape)
    prompts = [list(b"abc"), list(b"a longer one than the window"), list(b"xy"), list(b"xyzzy")]
    out = generate(model, tokenizer, prompts, 12, 0, stop_at_eod=False, repetition_penalty=1.3)
    for prompt, result in zip(prompts, out, strict=True):
        assert result.tokens == alone(model, prompt, 12, temperature=0, repetition_penalty=1.3)
    sampled = generate(model, tokenizer, prompts[:1], 12, seed=3, stop_at_eod=False, top_k=50, min_p=0.01)
    assert sampled[0].tokens == alone(model, prompts[0], 12, top_k=50, min_p=0.01)


def test_a_text_that_stops_is_cut_off_and_never_shown(make_model: MakeModel, tokenizer: Any) -> None:
    model = make_model()
    free = generate(model, tokenizer, "abc", 40, seed=1, stop_at_eod=False)[0]
    whole = free.text
    place = next(i for i in range(3, len(whole)) if whole[i].isascii() and whole[i] not in whole[:i])
    shown: list[str] = []
    (out,) = generate(
        model,
        tokenizer,
        "abc",
        40,
        seed=1,
        stop_at_eod=False,
        stop=["no such", whole[place]],
        on_token=lambda index, token, text: shown.append(text),
    )
    assert (out.text, out.finish_reason) == (whole[:place], "stop")
    assert "".join(shown) == out.text
    (out,) = generate(model, tokenizer, "abc", 40, seed=1, stop_at_eod=False, stop=[free.tokens[4:6]])
    assert out.tokens == free.tokens[:6] and out.text == tokenizer.decode(free.tokens[:4])
    with pytest.raises(UserError, match="a stop is empty"):
        generate(model, tokenizer, "abc", 1, stop=[""])


def test_logits_are_those_that_the_token_was_chosen_from(make_model: MakeModel, tokenizer: Any) -> None:
    (out,) = generate(make_model(), tokenizer, "abc", 5, 0, stop_at_eod=False, keep_logits=True)
    assert out.logits is not None and out.logits.shape == (5, 384)
    assert out.logits[:, :257].argmax(-1).tolist() == out.tokens
    picked = out.logits.log_softmax(-1).gather(-1, torch.tensor(out.tokens)[:, None])
    assert out.logprobs == pytest.approx(picked.flatten().tolist(), abs=1e-4)


def test_batch_size_does_not_change_the_text(make_model: MakeModel, tokenizer: Any) -> None:
    model = make_model()
    prompts = ["one", "two", "ab", "six", "cd", "ten", ""]
    runs = [generate(model, tokenizer, prompts, 10, seed=7, batch_size=size) for size in (1, 2, 16)]
    texts = [[g.tokens for g in run] for run in runs]
    assert texts[0] == texts[1] == texts[2]
    assert [g.prompt for g in runs[0]] == prompts
    assert texts[0] != [g.tokens for g in generate(model, tokenizer, prompts, 10, seed=8)]


def test_each_prompt_may_have_its_own_limit(make_model: MakeModel, tokenizer: Any) -> None:
    model, prompts = make_model(), ["one", "x" * 45, "two"]
    out = generate(model, tokenizer, prompts, [9, 3, 9], seed=7, stop_at_eod=False)
    assert [len(g.tokens) for g in out] == [9, 3, 9]
    assert out[2].tokens == generate(model, tokenizer, ["", "", "two"], 9, seed=7, stop_at_eod=False)[2].tokens


def test_equal_prompts_have_different_continuations(make_model: MakeModel, tokenizer: Any) -> None:
    out = generate(make_model(), tokenizer, ["same"] * 4, 10)
    assert len({tuple(g.tokens) for g in out}) == 4


def test_logprobs_are_the_models_own(make_model: MakeModel, tokenizer: Any) -> None:
    model = make_model()
    (g,) = generate(model, tokenizer, [[65, 66, 67]], 8, temperature=0.7, top_k=5, stop_at_eod=False)
    with torch.inference_mode():
        tokens = torch.tensor([[65, 66, 67, *g.tokens]])
        logprobs = model.logits(model(tokens)).log_softmax(-1)[0, 2:-1].gather(-1, tokens[0, 3:, None])
    assert g.logprobs == pytest.approx(logprobs.flatten().tolist(), abs=1e-4)
    assert g.prompt == "ABC"


def test_end_of_text_stops_and_is_not_text(make_model: MakeModel, tokenizer: Any) -> None:
    model = make_model()
    tokenizer.eod = generate(model, tokenizer, "abc", 6, temperature=0, stop_at_eod=False)[0].tokens[3]
    free, stopped = (generate(model, tokenizer, "abc", 6, 0, stop_at_eod=stop)[0] for stop in (False, True))
    end = free.tokens.index(tokenizer.eod) + 1
    assert (free.finish_reason, len(free.tokens)) == ("length", 6)
    assert (stopped.finish_reason, stopped.tokens) == ("stop", free.tokens[:end])
    assert len(stopped.logprobs) == end
    assert stopped.text == tokenizer.decode(stopped.tokens[:-1])


def test_one_row_that_stops_does_not_stop_the_others(make_model: MakeModel, tokenizer: Any) -> None:
    model = make_model()
    free = generate(model, tokenizer, ["abc", "xyz"], 8, 0, stop_at_eod=False)
    tokenizer.eod = next(t for t in free[0].tokens if t not in free[1].tokens)
    stopped = generate(model, tokenizer, ["abc", "xyz"], 8, 0)
    assert [g.finish_reason for g in stopped] == ["stop", "length"]
    assert stopped[1].tokens == free[1].tokens


def test_padding_ids_never_appear(make_model: MakeModel, tokenizer: Any) -> None:
    model = make_model()
    with torch.no_grad():
        model.head_weight[tokenizer.vocab_size :] *= 100
    for temperature in (0.0, 2.0):
        (g,) = generate(model, tokenizer, "abc", 20, temperature, stop_at_eod=False)
        assert max(g.tokens) < tokenizer.vocab_size


def test_an_empty_prompt_starts_from_the_end_of_text(make_model: MakeModel, tokenizer: Any) -> None:
    model = make_model()
    empty, explicit = generate(model, tokenizer, "", 5, 0), generate(model, tokenizer, [[256]], 5, 0)
    assert empty[0].tokens == explicit[0].tokens
    tokenizer.eod = None
    with pytest.raises(UserError, match="prompt 0 is empty"):
        generate(model, tokenizer, "", 5)


def test_streamed_text_adds_up_and_holds_broken_characters_back(make_model: MakeModel, tokenizer: Any) -> None:
    model = make_model()
    pieces: dict[int, list[str]] = {0: [], 1: []}
    tokens: dict[int, list[int]] = {0: [], 1: []}

    def on_token(index: int, token: int, text: str) -> None:
        pieces[index].append(text)
        tokens[index].append(token)

    out = generate(model, tokenizer, ["abc", "hello"], 12, on_token=on_token)
    assert ["".join(pieces[i]) for i in (0, 1)] == [g.text for g in out]
    assert [tokens[i] for i in (0, 1)] == [g.tokens for g in out]


def test_a_character_of_several_tokens_appears_when_whole(tokenizer: Any) -> None:
    from castalia.generate.engine import _new_text, _Sequence
    from castalia.generate.stopping import Stops

    stops = Stops(tokenizer, (), None)
    sequence = _Sequence(0, [], 9, torch.Generator())
    shown = []
    for token in "aé€b".encode():
        sequence.tokens.append(token)
        shown.append(_new_text(sequence, stops, last=False))
    assert shown == ["a", "", "é", "", "", "€", "b"]


def test_limits_are_named(make_model: MakeModel, tokenizer: Any) -> None:
    model = make_model()
    assert len(generate(model, tokenizer, "x" * 40, 8, stop_at_eod=False)[0].tokens) == 8
    with pytest.raises(UserError, match=r"40 tokens.*max_tokens 9.*49.*48"):
        generate(model, tokenizer, "x" * 40, 9)
    with pytest.raises(UserError, match=r"id 300.*0 to 256"):
        generate(model, tokenizer, [[1, 300]], 9)
    with pytest.raises(UserError, match="max_tokens is 0"):
        generate(model, tokenizer, "x", 0)


def test_the_models_mode_comes_back(make_model: MakeModel, tokenizer: Any) -> None:
    model = make_model().train()
    generate(model, tokenizer, "x", 1)
    assert model.training
    with pytest.raises(RuntimeError):
        generate(model, tokenizer, "x", 1, on_token=lambda *_: (_ for _ in ()).throw(RuntimeError()))
    assert model.training


def test_bf16_matrices_generate(make_model: MakeModel, tokenizer: Any) -> None:
    model = make_model(num_kv_heads=2).to(torch.bfloat16)
    assert len(generate(model, tokenizer, ["abc"], 4, 0, stop_at_eod=False)[0].tokens) == 4
