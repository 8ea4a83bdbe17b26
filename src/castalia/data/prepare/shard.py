"""The i-th of n parts of a corpus, for n machines that need not know of each other.

    a.jsonl b.jsonl c.jsonl d.jsonl      --shard 0/2 ─> a b      --shard 1/2 ─> c d

Whole files are divided, in their order and as evenly by their stored size as that allows: no
machine then reads what another does, and the shards, merged in their order, are what one run
over everything would have written.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from castalia.errors import UserError


def parse_shard(text: str) -> tuple[int, int]:
    """ "3/16" -> (3, 16).

    Raises:
        UserError: it is no i/n with i from 0 to n - 1.
    """
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text.strip())
    if found is None or int(found[1]) >= int(found[2]):
        raise UserError(f"--shard {text}: give i/n with i from 0 to n - 1, such as 0/4 on the first of four machines")
    return int(found[1]), int(found[2])


def shard_inputs(described: Sequence[dict[str, Any]], i: int, n: int) -> list[dict[str, Any]]:
    """The files of part `i` of `n`; each part has at least one.

    Args:
        described: what `describe_inputs` says; a file of unknown size counts as an average one.

    Raises:
        UserError: there are fewer files than parts.
    """
    if len(described) < n:
        raise UserError(
            f"--shard {i}/{n}: there are only {len(described)} files, and whole files are divided: "
            "give fewer shards, or split the files"
        )
    known = [one["bytes"] for one in described if one["bytes"] is not None]
    average = sum(known) / len(known) if known else 1
    sizes = [average if one["bytes"] is None else one["bytes"] for one in described]
    total = sum(sizes) or 1
    cuts, middle = [0], 0.0
    starts = []
    for size in sizes:
        starts.append(int((middle + size / 2) * n / total))
        middle += size
    for k in range(1, n):
        wanted = next((f for f, shard in enumerate(starts) if shard >= k), len(sizes))
        cuts.append(max(cuts[-1] + 1, min(wanted, len(sizes) - (n - k))))
    cuts.append(len(sizes))
    return list(described[cuts[i] : cuts[i + 1]])


def shard_prefix(prefix: str, i: int, n: int) -> str:
    """PREFIX-00003-of-00016, which sorts in the order to merge in."""
    return f"{prefix}-{i:05d}-of-{n:05d}"
