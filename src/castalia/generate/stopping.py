"""Where a continuation ends: end of text, a list of ids, or a text, which may begin and end inside tokens.

tokens so far ──kept──> None: go on, or how many of them are text ──text──> without what stopped it
"""

from __future__ import annotations

from collections.abc import Sequence

from castalia.data.tokenizer import Tokenizer
from castalia.errors import UserError


class Stops:
    """What ends a continuation.

    Args:
        tokenizer: of the texts.
        stop: texts and lists of ids; none empty. They are looked for in the continuation alone.
        eod: the end-of-text token; None: it does not stop.

    Raises:
        UserError: a stop is empty.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str | Sequence[int]], eod: int | None) -> None:
        if isinstance(stop, str):
            stop = [stop]
        if any(not len(s) for s in stop):
            raise UserError("a stop is empty, and would end everything at once: leave it out")
        self._tokenizer, self._eod = tokenizer, eod
        self.texts = [s for s in stop if isinstance(s, str)]
        self._ids = [list(s) for s in stop if not isinstance(s, str)]
        # A token is one byte of text or more, so a text of n bytes that ends in the newest token lies within n tokens,
        # apart from tokens that are no text; some more let a character that is cut at the edge become whole.
        self._window = 8 + max((len(s.encode()) for s in self.texts), default=0)

    def kept(self, tokens: list[int]) -> int | None:
        """How many of the tokens to decode, if the newest one ends the continuation; else None."""
        if tokens[-1] == self._eod:
            return len(tokens) - 1
        for ids in self._ids:
            if tokens[-len(ids) :] == ids:
                return len(tokens) - len(ids)
        if self.texts:
            end = self._tokenizer.decode(tokens[-self._window :])
            if any(s in end for s in self.texts):
                return len(tokens)
        return None

    def text(self, tokens: list[int], kept: int | None) -> str:
        """The text of a continuation, up to the stop that ended it."""
        text = self._tokenizer.decode(tokens[:kept])
        places = [text.find(s) for s in self.texts] if kept is not None else []
        return text[: min((p for p in places if p >= 0), default=None)]

    def certain(self, text: str) -> str:
        """Without an end that may be the beginning of a stop."""
        for size in range(min(max(map(len, self.texts), default=0) - 1, len(text)), 0, -1):
            if any(s.startswith(text[-size:]) for s in self.texts):
                return text[:-size]
        return text
