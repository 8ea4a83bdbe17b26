"""Text -> a new vocabulary: BPE, Unigram or WordPiece, as a tokenizer.json.

    texts ──cut_runs──> tokenizers' trainers, in a thread ──> Tokenizer

BPE is lossless by default: GPT-2's regular expression, all 256 bytes, no normaliser. The trainers
know no signals, so they run in a thread that is left alone when the user interrupts. Their time
grows with the square of the longest word, so unbroken runs of letters or blanks are cut for training.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from castalia.data.tokenizer.lossless import ALPHABET
from castalia.errors import UserError

if TYPE_CHECKING:
    import tokenizers

SPECIALS = ("<|endoftext|>", "<|padding|>")
UNKNOWN = "[UNK]"
LARGEST = 10_000_000  # ids; the trainers take their memory beforehand
LONGEST_RUN = 1024  # characters without a change between blank and not, beyond which a text is cut for training
_RUN = re.compile(rf"\S{{{LONGEST_RUN}}}|\s{{{LONGEST_RUN}}}")


@dataclass(frozen=True)
class Training:
    """What a progress callback is given: characters and texts read so far, and whether all have been."""

    characters: int
    texts: int
    read: bool


def train_bpe(texts: Iterable[str], vocab_size: int, specials: Sequence[str] = SPECIALS) -> tokenizers.Tokenizer:
    """Train a lossless byte-level BPE: GPT-2's regular expression, all 256 bytes, no normaliser.

    Ids: the specials in order, then the bytes, then the merges.

    Raises:
        UserError: `vocab_size` does not hold the specials and the 256 bytes.
    """
    return train_tokenizer(texts, vocab_size, "bpe", specials)


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    kind: str = "bpe",
    specials: Sequence[str] = SPECIALS,
    normalizer: str = "none",
    prefix_space: bool = False,
    progress: Callable[[Training], None] | None = None,
) -> tokenizers.Tokenizer:
    """Train a vocabulary; it may come out smaller than asked where the texts hold too little.

    Args:
        texts: to learn from, read once.
        vocab_size: ids, specials included.
        kind: bpe and unigram are byte-level; wordpiece is BERT's, whole characters with an unknown token.
        specials: get the first ids, in order.
        normalizer: none, nfc or nfkc; GPT-NeoX's train_tokenizer has nfkc.
        prefix_space: put a space in front of each text, as GPT-NeoX's train_tokenizer does.
        progress: called about ten times a second, from this thread.

    Raises:
        UserError: a vocabulary too small for the specials and the bytes, or an unknown kind.
    """
    import tokenizers as hf
    from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

    if kind not in KINDS:
        raise UserError(f"tokenizers are trained as {', '.join(KINDS)}, not as {kind!r}")
    if kind == "wordpiece" and UNKNOWN not in specials:
        specials = [*specials, UNKNOWN]
    if len(set(specials)) != len(specials) or "" in specials:
        raise UserError("special tokens should differ from each other and not be empty")
    least = len(specials) + (1 if kind == "wordpiece" else 256)
    if vocab_size < least:
        what = "the specials and a letter" if kind == "wordpiece" else "256 bytes and the specials"
        raise UserError(f"a vocabulary of {vocab_size} is too small: {what} take {least}")
    if vocab_size > LARGEST:
        raise UserError(f"a vocabulary of {vocab_size:,} is larger than any that is of use: ask for up to {LARGEST:,}")
    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "special_tokens": [AddedToken(name, special=True, normalized=False) for name in specials],
        "show_progress": False,
    }
    if kind == "wordpiece":
        tokenizer = hf.Tokenizer(models.WordPiece(unk_token=UNKNOWN))
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece(prefix="##")
        trainer: Any = trainers.WordPieceTrainer(**common)
    else:
        level = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
        alphabet = sorted(ALPHABET)
        if kind == "bpe":
            tokenizer = hf.Tokenizer(models.BPE())
            trainer = trainers.BpeTrainer(initial_alphabet=alphabet, **common)
        else:
            tokenizer = hf.Tokenizer(models.Unigram())
            trainer = trainers.UnigramTrainer(initial_alphabet=alphabet, **common)
        tokenizer.pre_tokenizer = level
        tokenizer.decoder = decoders.ByteLevel()
        if prefix_space:
            tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    if normalizer != "none":
        if normalizer not in NORMALIZERS:
            raise UserError(f"texts are normalised as {', '.join(NORMALIZERS)}, not as {normalizer!r}")
        tokenizer.normalizer = normalizers.NFC() if normalizer == "nfc" else normalizers.NFKC()
    _train(tokenizer, trainer, texts, progress)
    return tokenizer


KINDS = ("bpe", "unigram", "wordpiece")
NORMALIZERS = ("none", "nfc", "nfkc")


def cut_runs(texts: Iterable[str]) -> Iterator[str]:
    """The texts, those with an unbroken run of over `LONGEST_RUN` characters in pieces that have none."""
    for text in texts:
        start = 0
        for run in _RUN.finditer(text):
            yield text[start : run.end()]
            start = run.end()
        if start < len(text):
            yield text[start:] if start else text


def _train(
    tokenizer: tokenizers.Tokenizer, trainer: Any, texts: Iterable[str], progress: Callable[[Training], None] | None
) -> None:
    state = [0, 0, False]
    failure: list[BaseException] = []
    stopped = threading.Event()

    def counted() -> Iterator[str]:
        for text in texts:
            if stopped.is_set():
                return
            state[0] += len(text)
            state[1] += 1
            yield text
        state[2] = True

    def work() -> None:
        try:
            tokenizer.train_from_iterator(cut_runs(counted()), trainer)
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=work, name="tokenizer training", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.1)
            if progress is not None:
                progress(Training(state[0], state[1], bool(state[2])))
    except BaseException:
        stopped.set()
        raise
    if failure:
        raise failure[0]


def save_tokenizer(tokenizer: tokenizers.Tokenizer, path: str | os.PathLike[str]) -> None:
    """Write a tokenizer.json whole or not at all."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(f"{target}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(tokenizer.to_str(pretty=True))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
