"""Generation on several ranks writes what one process writes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.generate.test_load import save

from castalia.data.tokenizer import ByteTokenizer
from castalia.errors import UserError
from castalia.generate.engine import generate
from castalia.model import Transformer
from castalia.parallel.testing import run_in_processes
from castalia.parallel.world import World
from castalia.tools.decoding import opened, parallel_of

PROMPTS = ["abc", "a longer prompt", ""]


def on_rank(world: World, run: str, settings: list[str], precision: str) -> list[Any]:
    with opened(run, precision=precision, parallel=parallel_of(settings), world=world) as (decoder, tokenizer):
        return [g.tokens for g in generate(decoder, tokenizer, PROMPTS, 10, seed=2, stop_at_eod=False)]


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
        alone = [g.tokens for g in generate(decoder, tokenizer, PROMPTS, 10, seed=2, stop_at_eod=False)]
    ranks = run_in_processes(2 ** len(settings), on_rank, str(tmp_path / "run"), settings, precision)
    assert all(tokens == alone for tokens in ranks)


def test_other_layouts_are_refused() -> None:
    for bad in ("parallel.context=2", "parallel.tensor=x", "training.seed=1", "tensor=2"):
        with pytest.raises(UserError, match=r"parallel\.tensor and parallel\.pipeline"):
            parallel_of([bad])
