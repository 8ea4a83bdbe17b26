"""What a plan needs to know of the data: the size of the vocabulary, without importing torch.

A plan must answer for a configuration alone, on a machine that holds neither the data nor
the tokenizer; where one of them is at hand, its vocabulary is used.
"""

from __future__ import annotations

import json
from pathlib import Path

from castalia.config import Config


def tokenizer_vocabulary(config: Config) -> int | None:
    """Ids of the tokenizer that the configuration names or the data was made with; None if neither is here."""
    data = config.data
    prefixes = [data.path] if data.path else [p for ps in (data.train_paths, data.valid_paths) for p in ps or []]
    spec = config.tokenizer.path
    if spec is not None and (spec == "byte" or Path(spec).exists()):
        from castalia.data.tokenizer import load_tokenizer

        return load_tokenizer(spec).vocab_size
    for prefix in prefixes:
        info = Path(f"{prefix}.json")
        if info.exists():
            return int(json.loads(info.read_text(encoding="utf-8"))["tokenizer"]["vocab_size"])
    return None
