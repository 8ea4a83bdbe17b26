"""GPT-2's pair of files, vocab.json and merges.txt, -> the tokenizer.json that means the same.

The pair says nothing of the pre-tokenisation: it is GPT-2's regular expression over bytes spelled
as printable letters, without a space in front. `<|endoftext|>` in a text is the special token, as
Hugging Face has it (GPT-NeoX v2.0's own implementation spells it out).
"""

from __future__ import annotations

import json
from pathlib import Path

from castalia.data.tokenizer.base import EOD_NAMES
from castalia.data.tokenizer.hf import HFTokenizer
from castalia.errors import UserError


def load_gpt2(vocabulary: Path, merges: Path) -> HFTokenizer:
    """Read GPT-2's files (encoder.json and vocab.bpe are the same under other names).

    Raises:
        UserError: a file is missing, or is not what its name says.
    """
    for path in (vocabulary, merges):
        if not path.is_file():
            raise UserError(f"{path} does not exist: GPT-2's tokenizer is a vocab.json and a merges.txt")
    try:
        entries = json.loads(vocabulary.read_bytes())
    except ValueError:
        entries = None
    if not isinstance(entries, dict) or not all(type(i) is int and i >= 0 for i in entries.values()):
        raise UserError(f"{vocabulary} is no vocabulary of GPT-2's kind: it should be an object of entry: id")
    try:
        lines = merges.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError:
        raise UserError(f"{merges} is not UTF-8: it should be GPT-2's merges.txt") from None
    pairs = []
    for number, line in enumerate(lines, start=1):
        if (number == 1 and line.startswith("#version")) or not line.strip():
            continue
        pair = line.rstrip("\r").split(" ")
        if len(pair) != 2 or not {*pair, "".join(pair)} <= entries.keys():
            raise UserError(
                f"{merges}:{number} is no merge of entries of {vocabulary}: the files do not belong together"
            )
        pairs.append(pair)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    state = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": entries[name], "content": name, **flags} for name in EOD_NAMES[:1] if name in entries],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {"type": "BPE", "vocab": entries, "merges": pairs},
    }
    return HFTokenizer(json.dumps(state, ensure_ascii=False).encode(), str(vocabulary))
