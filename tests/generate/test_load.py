"""A run directory gives back the very model and tokenizer that were saved."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

from castalia.checkpoint import save_checkpoint
from castalia.data.tokenizer import ByteTokenizer, HFTokenizer, Tokenizer
from castalia.errors import UserError
from castalia.generate import generate, load_run
from castalia.model import Transformer

CONFIG = """version: 1
data:
  seq_length: 48
model:
  num_layers: 2
  hidden_size: 32
  num_attention_heads: 4
  vocab_size: 384
  rotary_fraction: 0.5
training:
  steps: 10
"""


def save(path: Path, model: Transformer, step: int, tokenizer: Tokenizer | None) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.yaml").write_text(CONFIG)
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    # As a real checkpoint has: moments that nobody who generates wants to read.
    tensors |= {f"optimizer.{name}.exp_avg": torch.zeros_like(p) for name, p in model.named_parameters()}
    state = {"version": 1, "step": step, "tokenizer": tokenizer.identity() if tokenizer else None}
    return save_checkpoint(path / "checkpoints", step, tensors, state)


@pytest.fixture
def word_tokenizer() -> HFTokenizer:
    words = {word: i for i, word in enumerate(["a", "b", "c", "<|endoftext|>"])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return HFTokenizer(inner.to_str().encode())


def test_weights_come_back_and_generate_the_same(tmp_path: Path, make_model: Callable[..., Transformer]) -> None:
    model = make_model()
    save(tmp_path / "run", model, 5, ByteTokenizer())
    loaded, tokenizer = load_run(tmp_path / "run")
    assert tokenizer.identity() == ByteTokenizer().identity()
    assert not loaded.training and loaded.cfg.max_position_embeddings == 48
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name
    ours, theirs = (generate(m, tokenizer, "abc", 8)[0].tokens for m in (model, loaded))
    assert ours == theirs


def test_newest_or_a_given_step(tmp_path: Path, make_model: Callable[..., Transformer]) -> None:
    model = make_model()
    for step in (5, 10):
        with torch.no_grad():
            model.final_norm.weight.fill_(step)
        save(tmp_path / "run", model, step, ByteTokenizer())
    assert load_run(tmp_path / "run")[0].final_norm.weight[0] == 10
    assert load_run(tmp_path / "run", step=5)[0].final_norm.weight[0] == 5
    with pytest.raises(UserError, match="7"):
        load_run(tmp_path / "run", step=7)


def test_a_damaged_newest_checkpoint_is_passed_over_aloud(
    tmp_path: Path, make_model: Callable[..., Transformer]
) -> None:
    for step in (5, 10):
        newest = save(tmp_path / "run", make_model(), step, ByteTokenizer())
    (newest / "state.json").write_text("{}")
    with pytest.warns(UserWarning, match="passed over.*step-00000010"):
        load_run(tmp_path / "run")


def test_bf16_casts_matrices_only(tmp_path: Path, make_model: Callable[..., Transformer]) -> None:
    save(tmp_path / "run", make_model(), 5, ByteTokenizer())
    model, tokenizer = load_run(tmp_path / "run", dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        low = parameter.dim() >= 2 and name != "embedding.weight"  # a table that is only looked up stays fp32
        assert parameter.dtype == (torch.bfloat16 if low else torch.float32), name
    assert len(generate(model, tokenizer, "abc", 4, 0, stop_at_eod=False)[0].tokens) == 4


def test_the_tokenizer_kept_in_the_run(
    tmp_path: Path, make_model: Callable[..., Transformer], word_tokenizer: HFTokenizer
) -> None:
    run = tmp_path / "run"
    save(run, make_model(), 5, word_tokenizer)
    with pytest.raises(UserError, match=r"no tokenizer.json.*SHA-256"):
        load_run(run)
    content: Any = word_tokenizer.file_bytes()
    (run / "tokenizer.json").write_bytes(content)
    model, tokenizer = load_run(run)
    assert tokenizer.encode("b c") == [1, 2]
    assert max(generate(model, tokenizer, "a b", 10, 2.0, stop_at_eod=False)[0].tokens) < 4
    (run / "tokenizer.json").write_bytes(content + b"\n")
    with pytest.raises(UserError, match="not the one"):
        load_run(run)


def test_what_is_missing_is_named(tmp_path: Path, make_model: Callable[..., Transformer]) -> None:
    with pytest.raises(UserError, match="no config.yaml"):
        load_run(tmp_path)
    (tmp_path / "config.yaml").write_text(CONFIG)
    with pytest.raises(UserError, match="no checkpoint yet"):
        load_run(tmp_path)
    save(tmp_path, make_model(), 5, None)
    with pytest.raises(UserError, match=r"no tokenizer.json"):
        load_run(tmp_path)
    save(tmp_path, make_model(), 5, ByteTokenizer())
    (tmp_path / "config.yaml").write_text(CONFIG.replace("num_layers: 2", "num_layers: 3"))
    with pytest.raises(UserError, match="layers.2"):
        load_run(tmp_path)
