"""Beam search: wide enough it finds the best of all; batches change nothing; as transformers' own."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from castalia.convert import huggingface_config, to_huggingface
from castalia.errors import UserError
from castalia.generate.beams import beam_search
from castalia.generate.engine import generate
from castalia.model import Transformer

MakeModel = Callable[..., Transformer]
PROMPTS = [[1, 2, 3], [4], [0, 3, 3, 1, 2]]


class Few:
    """A tokenizer of six ids, of which the last one ends a text."""

    vocab_size, eod = 6, 5

    def decode(self, ids: list[int]) -> str:
        return "".join("abcde."[i] for i in ids)


@pytest.fixture
def small(make_model: MakeModel) -> Transformer:
    model = make_model(vocab_size=6)
    with torch.no_grad():
        model.head_weight.div_(4)
    return model


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0, -1.0])
def test_a_search_wide_enough_finds_the_best_of_all(small: Transformer, penalty: float) -> None:
    length = 3
    texts = [t for n in (1, 2, 3) for t in itertools.product(range(6), repeat=n)]
    texts = [t for t in texts if 5 not in t[:-1] and (len(t) == length or t[-1] == 5)]
    for prompt in PROMPTS:
        scores = {}
        for text in texts:
            with torch.inference_mode():
                logprobs = small.logits(small(torch.tensor([[*prompt, *text]]))).log_softmax(-1)[0]
            total = sum(float(logprobs[len(prompt) - 1 + i, t]) for i, t in enumerate(text))
            scores[text] = total / len(text) ** penalty
        ranked = sorted(scores, key=lambda t: -scores[t])[:5]
        found = beam_search(small, Few(), [prompt], 200, length, penalty, 5)
        assert [tuple(g.tokens) for g in found] == ranked
        assert [g.score for g in found] == pytest.approx([scores[t] for t in ranked], abs=1e-5)


def test_a_beam_of_one_is_greedy_and_batches_change_nothing(small: Transformer) -> None:
    greedy = generate(small, Few(), PROMPTS, 12, 0)
    single = beam_search(small, Few(), PROMPTS, 1, 12, 0.0)
    assert [(g.tokens, g.text, g.finish_reason) for g in single] == [
        (g.tokens, g.text, g.finish_reason) for g in greedy
    ]
    for a, b in zip(single, greedy, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    for kind in ({}, {"attention": "window", "attention_window": 4}, {"attention": "gmlp", "position": "learned"}):
        model = small if not kind else type(small)(small.cfg.model_copy(update=kind))
        together, alone = (beam_search(model, Few(), PROMPTS, 3, 8, num_return=3, batch_size=b) for b in (9, 1))
        assert [g.tokens for g in together] == [g.tokens for g in alone]
        assert len(together) == 9


@pytest.mark.parametrize("penalty", [0.0, 1.0, -0.5])
def test_it_is_the_search_of_transformers(small: Transformer, penalty: float) -> None:
    transformers: Any = pytest.importorskip("transformers")
    settings = huggingface_config(small.cfg)
    theirs = transformers.GPTNeoXForCausalLM.from_pretrained(
        None, config=transformers.GPTNeoXConfig(**settings), state_dict=to_huggingface(small.state_dict(), small.cfg)
    )
    theirs.generation_config.update(eos_token_id=5, pad_token_id=5, bos_token_id=None)
    for prompt in PROMPTS:
        out = theirs.eval().generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            num_beams=4,
            num_return_sequences=3,
            max_new_tokens=10,
            do_sample=False,
            length_penalty=penalty,
            early_stopping="never",
            return_dict_in_generate=True,
            output_scores=True,
        )
        ours = beam_search(small, Few(), [prompt], 4, 10, penalty, 3)
        assert [g.score for g in ours] == pytest.approx(out.sequences_scores.tolist(), abs=1e-4)
        for sequence, g in zip(out.sequences[:, len(prompt) :].tolist(), ours, strict=True):
            assert sequence[: len(g.tokens)] == g.tokens


def test_what_cannot_be_asked_for_is_named(small: Transformer) -> None:
    with pytest.raises(UserError, match="5 of 4 beams"):
        beam_search(small, Few(), PROMPTS, 4, 3, num_return=5)
    with pytest.raises(UserError, match="max_tokens is 0"):
        beam_search(small, Few(), PROMPTS, 4, 0)
