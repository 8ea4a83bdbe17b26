"""What GPT-NeoX files say once they are merged: values by their key, defaults, and where each was said."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NoReturn

from castalia.config.gptneox_keys import KNOWN, TRANSLATED
from castalia.config.yaml12 import Origin
from castalia.errors import UserError

# PyYAML reads these words as booleans, hence GPT-NeoX does; YAML 1.2 does not.
_WORDS = {"yes": True, "on": True, "no": False, "off": False}
_NAMES = {
    "int": "a whole number",
    "number": "a number",
    "bool": "true or false",
    "text": "text",
    "list": "a list",
    "mapping": "a mapping",
}


@dataclass
class Given:
    """Merged GPT-NeoX values.

    Attributes:
        values: by their key, underscored; what no file gives is absent, and so is null.
        origins: where each was said.
        compat: `main` or `v2.0`: whose defaults and formulas count.
        remarks: what is worth saying about the translation as a whole.
    """

    values: dict[str, Any]
    origins: dict[str, Origin]
    compat: str = "main"
    remarks: list[str] = field(default_factory=list)

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def __getitem__(self, key: str) -> Any:
        """The value of a translated key, or its default."""
        value = self.values.get(key)
        return TRANSLATED[key].default(self.compat) if value is None else value

    def origin(self, *keys: str) -> Origin:
        """Where the first of these keys that was given was said; else the default's origin."""
        for key in keys:
            if key in self:
                return self.origins[key]
        return Origin(f"GPT-NeoX {self.compat}'s default")

    @property
    def tuned(self) -> bool:
        """Whether the files are for DeepSpeed's autotuning, which fills in `auto`."""
        block = self.values.get("autotuning")
        return isinstance(block, dict) and bool(block.get("enabled", False))

    def remark(self, text: str) -> None:
        """Say something about the translation as a whole, once."""
        if text not in self.remarks:
            self.remarks.append(text)

    def fail(self, key: str, text: str) -> NoReturn:
        """Raise a UserError about a key of theirs, at its place."""
        raise UserError(f"{self.origin(key)}: '{key}' {text}")

    def fail_at(self, key: str, text: str) -> NoReturn:
        """As `fail`, of a key whose value has been taken out."""
        raise UserError(f"{self.origins[key]}: '{key}' {text}")

    def unsupported(self, key: str, what: str, instead: str) -> NoReturn:
        """Raise a UserError: what a key asks for is not implemented yet."""
        value = self[key] if key in TRANSLATED else self.values.get(key)
        shown = repr(value) if isinstance(value, str) else str(value)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        self.fail(key, f"({shown}) asks for {what}, which is not implemented yet: {instead}")

    def positive(self, key: str) -> int | None:
        """A whole number that must be at least 1, None if it was not given."""
        value: int | None = self[key]
        if value is not None and value < 1:
            self.fail(key, f"must be at least 1, got {value}")
        return value

    def required(self, key: str) -> Any:
        """The value of a key that must be given."""
        if key not in self:
            raise UserError(f"no file gives '{key}', which GPT-NeoX requires: add it, or give {key}=VALUE")
        return self[key]

    def choose(self, key: str, choices: dict[str, str], instead: str | None = None) -> str:
        """Our word for theirs, compared without case as GPT-NeoX does; a word that we lack is refused."""
        word = str(self[key])
        if word.lower() in choices:
            return choices[word.lower()]
        self.unsupported(key, f"'{word}'", instead or f"use one of {', '.join(choices)}")

    def check_kinds(self) -> None:
        """Check the kinds of the values of translated keys; YAML 1.1's words for booleans become booleans."""
        for key, value in self.values.items():
            kind = TRANSLATED[key].kind if key in TRANSLATED else "any"
            if value is None or (value == "auto" and self.tuned):
                continue
            if isinstance(value, str) and value.lower() in _WORDS and kind != "text":
                value = self.values[key] = _WORDS[value.lower()]
            if not _is(value, kind):
                self.fail(key, f"must be {_NAMES[kind]}, got {str(value)[:60]!r}")


@dataclass(frozen=True)
class Rule:
    """A value of ours from values of theirs.

    Attributes:
        ours: our dotted key.
        reads: their keys, the one that counts most first.
        value: from what was given; None leaves our key unset.
    """

    ours: str
    reads: tuple[str, ...]
    value: Callable[[Given], Any]


def _is(value: Any, kind: str) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return {
        "int": number and isinstance(value, int),
        # Not more than a double holds, and neither infinity nor NaN.
        "number": number and abs(value) < 1e300,
        "bool": isinstance(value, bool),
        "text": isinstance(value, str),
        "list": isinstance(value, list),
        "mapping": isinstance(value, dict),
        "any": True,
    }[kind]


def near(key: str, known: Iterable[str] = KNOWN) -> str:
    """`; did you mean 'x'?`, or nothing."""
    close = difflib.get_close_matches(key, sorted(known), 1, 0.7)
    return f"; did you mean '{close[0]}'?" if close else ""
