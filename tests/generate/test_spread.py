"""Generation on several ranks writes what one process writes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.generate.test_load import save

from castalia.data.store import StoreWriter, TokenStore
from castalia.data.tokenizer import ByteTokenizer, Tokenizer
from castalia.errors import UserError
from castalia.evaluate.perplexity import score_store
from castalia.evaluate.team import Ranks
from castalia.generate.beams import beam_search
from castalia.generate.decoder import Decoder
from castalia.generate.engine import generate
from castalia.generate.load import load_run
from castalia.model import Transformer
from castalia.parallel.testing import run_in_processes
from castalia.parallel.world import World, joined
from castalia.tools.decoding import opened, parallel_of
from castalia.tools.logprobs import write_logprobs

PROMPTS = ["abc", "a longer prompt", ""]


def on_rank(world: World, run: str, settings: list[str], precision: str) -> list[Any]:
    with opened(run, precision=precision, parallel=parallel_of(settings), world=world) as (decoder, tokenizer):
        return written(decoder, tokenizer)


def written(decoder: Decoder, tokenizer: Tokenizer) -> list[Any]:
    drawn = generate(decoder, tokenizer, PROMPTS, 10, seed=2, stop_at_eod=False)
    return [g.tokens for g in [*drawn, *beam_search(decoder, tokenizer, PROMPTS, 3, 6, num_return=2)]]


@pytest.mark.parametrize(
    ("settings", "precision"),
    [
        (["parallel.tensor=2"], "fp32"),
        (["parallel.pipeline=2"], "fp32"),
        (["parallel.tensor=2", "parallel.pipeline=2"], "fp32"),
        (["parallel.pipeline=2"], "bf16"),
    ],
    ids=str,
)
def test_every_rank_writes_what_one_process_writes(
    tmp_path: Path, make_model: Callable[..., Transformer], settings: list[str], precision: str
) -> None:
    save(tmp_path / "run", make_model(), 5, ByteTokenizer())
    with opened(tmp_path / "run", precision=precision) as (decoder, tokenizer):
        alone = written(decoder, tokenizer)
    ranks = run_in_processes(2 ** len(settings), on_rank, str(tmp_path / "run"), settings, precision)
    assert all(tokens == alone for tokens in ranks)


def test_other_layouts_are_refused() -> None:
    for bad in ("parallel.context=2", "parallel.tensor=x", "training.seed=1", "tensor=2"):
        with pytest.raises(UserError, match=r"parallel\.tensor and parallel\.pipeline"):
            parallel_of([bad])


def share(world: World, run: str, data: str, target: str) -> float:
    model, tokenizer = load_run(run)
    with joined(world):
        team = Ranks.of(world)
        assert write_logprobs(model, data, target, 48, batch_size=2, team=team) == 7
        return score_store(model, tokenizer, TokenStore(data), 16, batch_size=2, team=team).nll


def test_processes_share_the_documents_of_a_data_set(tmp_path: Path, make_model: Callable[..., Transformer]) -> None:
    save(tmp_path / "run", make_model(), 5, ByteTokenizer())
    data, draw = str(tmp_path / "tokens"), np.random.default_rng(0)
    with StoreWriter(data, np.uint16) as writer:
        for length in (5, 60, 1, 12, 30, 9, 17):
            writer.add_document(draw.integers(0, 256, length).tolist())
        writer.finish()
    model, tokenizer = load_run(str(tmp_path / "run"))
    write_logprobs(model, data, str(tmp_path / "alone"), 48, batch_size=3)
    whole = score_store(model, tokenizer, TokenStore(data), 16, batch_size=2).nll
    found = run_in_processes(2, share, str(tmp_path / "run"), data, str(tmp_path / "shared"))
    assert found == pytest.approx([whole] * 2, rel=1e-6)
    for i in range(7):
        alone, shared = (TokenStore(tmp_path / name).get(i) for name in ("alone", "shared"))
        assert np.allclose(alone, shared, atol=1e-4) and len(alone) == len(shared)
