"""Text <-> token ids, and what each id weighs in bytes.

    "byte", "char"              -> ids are bytes                                        plain.py
    tokenizer.json or a folder  -> Hugging Face's, GPT-NeoX-20B's among them            hf.py
    vocab.json and merges.txt   -> GPT-2's pair                                         gpt2.py
    FILE.model                  -> SentencePiece                                        sentencepiece.py
    tiktoken:NAME, FILE.tiktoken -> tiktoken's encodings and rank files                 tiktoken.py
    module:attribute            -> the user's own

A tokenizer never adds special tokens of its own; where documents end is the preparer's business.
"""

from castalia.data.tokenizer.base import EOD_NAMES, Tokenizer, encode_flat, special_tokens
from castalia.data.tokenizer.hf import HFTokenizer
from castalia.data.tokenizer.inspect import inspect_tokenizer
from castalia.data.tokenizer.plain import ByteTokenizer, CharTokenizer
from castalia.data.tokenizer.registry import TOKENIZERS, load_kept, load_tokenizer
from castalia.data.tokenizer.train import save_tokenizer, train_bpe, train_tokenizer

__all__ = [
    "EOD_NAMES",
    "TOKENIZERS",
    "ByteTokenizer",
    "CharTokenizer",
    "HFTokenizer",
    "Tokenizer",
    "encode_flat",
    "inspect_tokenizer",
    "load_kept",
    "load_tokenizer",
    "save_tokenizer",
    "special_tokens",
    "train_bpe",
    "train_tokenizer",
]
