"""A run's tokenizer -> the files that transformers reads, and whether its ids are the same.

    tokenizer.json          ─────────────────────────────────> tokenizer.json
    bytes                   ─an alphabet without merges──────> tokenizer.json
    tiktoken's ranks        ─every pair whose join is known──> tokenizer.json
    a SentencePiece model   ─────────────────────────────────> tokenizer.model

Where transformers gives other ids (it reads SentencePiece models by rules of its own), the file stays
what it is, and nothing beside it tells transformers to read it.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from castalia.data.tokenizer import Tokenizer
from castalia.errors import UserError

SAMPLES = (
    "Hello world! It's 10:45, isn't it? We'll see 1234567 things.",
    "  two spaces,\n\n  a line\tand a tab\r\n",
    "def f(x):\n    return {'a': x ** 2}  # naïve café, Zürich, 東京, привет 🙂",
)


def write_tokenizer(folder: Path, tokenizer: Tokenizer, longest: int, check: bool) -> str:
    """Write a tokenizer's files.

    Args:
        folder: to write into.
        longest: positions of the model.
        check: whether transformers is asked.

    Returns:
        One sentence for parity.json.

    Raises:
        UserError: it is of a kind that has no form there.
    """
    if tokenizer.kind == "sentencepiece":
        (folder / "tokenizer.model").write_bytes(tokenizer.file_bytes() or b"")
        class_name = "LlamaTokenizer"
    else:
        (folder / "tokenizer.json").write_bytes(tokenizer_json(tokenizer))
        class_name = "PreTrainedTokenizerFast"
    settings: dict[str, Any] = {"tokenizer_class": class_name, "model_max_length": longest}
    end = _end(tokenizer)
    if end is not None:
        settings |= {"eos_token": end, "bos_token": end}
    if tokenizer.kind == "sentencepiece":
        settings |= {"legacy": False, "add_bos_token": False, "add_eos_token": False}
    written = folder / "tokenizer_config.json"
    written.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    if not check:
        return "not compared"
    if _same_ids(folder, tokenizer):
        return f"the ids of {len(SAMPLES)} texts are equal in transformers"
    if tokenizer.kind != "sentencepiece":
        raise UserError("tokenizer: transformers gives other ids than the run's own: say --no-check to write it anyway")
    written.unlink()
    return "transformers gives other ids: read tokenizer.model with the package sentencepiece"


def _end(tokenizer: Tokenizer) -> str | None:
    """The text of the end of a document, where there is such a token."""
    if tokenizer.eod is None or tokenizer.kind == "char":
        return None
    if tokenizer.kind == "byte":
        return "<|endoftext|>"
    if tokenizer.kind == "sentencepiece":
        return next((name for name, i in tokenizer.special_tokens().items() if i == tokenizer.eod), None)  # type: ignore[attr-defined]
    return tokenizer.decode([tokenizer.eod])


def _same_ids(folder: Path, tokenizer: Tokenizer) -> bool:
    import transformers

    transformers.utils.logging.set_verbosity_error()  # a sample may be longer than a small model's positions
    try:
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        return all(theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text) for text in SAMPLES)
    except Exception:  # of whatever package it tried
        return False


def tokenizer_json(tokenizer: Tokenizer) -> bytes:
    """A tokenizer.json that gives the same ids.

    Raises:
        UserError: of a kind that has none.
    """
    if tokenizer.kind == "hf":
        return tokenizer.file_bytes() or b""
    if tokenizer.kind in ("byte", "char"):
        special = {"<|endoftext|>": 256} if tokenizer.kind == "byte" else {}
        return bpe_json({bytes([i]): i for i in range(256)}, special, None)
    if tokenizer.kind == "tiktoken":
        state = json.loads(tokenizer.file_bytes() or b"")["tiktoken"]
        ranks = {base64.b64decode(text): rank for rank, text in state["ranks"]}
        return bpe_json(ranks, state["special_tokens"], state["pattern"])
    raise UserError(
        f"tokenizer: one of kind '{tokenizer.kind}' has no form in Hugging Face's files: retrain with a tokenizer.json"
    )


def bpe_json(ranks: dict[bytes, int], special: dict[str, int], pattern: str | None) -> bytes:
    """Ranks of byte strings, as tiktoken has them -> a tokenizer.json.

    tiktoken joins the two neighbours whose join has the lowest rank, however it is divided, and takes a word
    that is an entry as it is: so each division into two entries is a merge, and merges are ignored for entries.

    Args:
        ranks: entry -> id.
        special: tokens that stand for no text -> id.
        pattern: of the words; None: the text is one word.
    """
    letters = _alphabet()

    def spelled(entry: bytes) -> str:
        return "".join(letters[b] for b in entry)

    merges = []
    for entry, rank in ranks.items():
        divisions = [(entry[:i], entry[i:]) for i in range(1, len(entry))]
        merges += [(rank, ranks[a], ranks[b], a, b) for a, b in divisions if a in ranks and b in ranks]
    merges.sort(key=lambda merge: merge[:3])
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    stages: list[dict[str, Any]] = [level]
    if pattern is not None:
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        stages.insert(0, split)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    state = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": name, **flags} for name, i in sorted(special.items(), key=lambda item: item[1])
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": stages},
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "ignore_merges": True,
            # Special tokens as well: an id that is in no vocabulary would be counted on from its end.
            "vocab": {spelled(entry): rank for entry, rank in ranks.items()} | special,
            "merges": [[spelled(a), spelled(b)] for *_, a, b in merges],
        },
    }
    return json.dumps(state, ensure_ascii=False).encode()


def _alphabet() -> list[str]:
    """GPT-2's printable letter of each byte: itself where it can be seen, else the next of those from 256 on."""
    seen = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = iter(range(256, 512))
    return [chr(b if b in seen else next(hidden)) for b in range(256)]
