"""The code -> the pages that would otherwise repeat it by hand: `make docs`.

    schema.py          ─> docs/config.md             every key, its default, class and unit
    gptneox_keys.py    ─> docs/gptneox_keys.md       every key of GPT-NeoX and its fate
    json_schema.py     ─> docs/castalia.schema.json  for editors

A test fails when one of them is not what this would write.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from importlib.resources import files as _package_files
from pathlib import Path

from castalia.config.compare import RESUME_RULES
from castalia.config.fields import class_of, fields, unit_of
from castalia.config.files import write_text
from castalia.config.gptneox_keys import IDLE, REFUSED, REPORTED, TRANSLATED, Refused
from castalia.config.gptneox_rules import CHECKS, RENAMED, REQUIRED, RULES
from castalia.config.json_schema import json_schema_text
from castalia.config.render import scalar, type_text
from castalia.config.schema import Config

HERE = "<!-- Written by `make docs` from the code: change it there. -->\n\n"

CONFIG_INTRO = """# The configuration

A run is described by one tree of sections. This page lists every key; `castalia config explain KEY` says the same of
one key, with its value in your files and where that value was said.

## Files

A configuration is one or several YAML files, and `key=value` overrides on the command line:

```
castalia train model.yml data.yml optimizer.lr=3e-4
```

* YAML is read as YAML 1.2, of which JSON is a part. `6e-4` is a number, `no` is a word, and `100_000_000` is a whole
  number here.
* Several files merge in order. **The same key in two files is an error** that names both places. A file that means to
  change another says so:

  ```yaml
  base: model.yml        # relative to this file; its values hold where this one gives none
  optimizer:
    lr: 3.0e-4
  ```

* Overrides come last. A value is YAML too: `data.train_paths='[a, b]'`, `performance.threads=null`.
* An unknown key is an error that names file, line and the nearest known key. Values are not coerced: `"3"` is
  no number.
* What is left out has its default. `null` means "as follows from the rest", and each key below says what follows.

## What a run makes of it

`castalia config show FILE` prints the complete configuration with every default, `--comments` with the meanings below;
`castalia config check FILE` says what follows from it: steps, widths, the padded vocabulary. A run keeps the complete,
derived configuration as `config.yaml` in its folder, and that file starts the same run again.

`castalia config diff A B` says what differs between two configurations or runs, by class; overrides may follow each of
the two. Each key belongs to one class:

| class | what a change of it changes | when a run is resumed |
|---|---|---|
| numerics | the function that is computed | refused, unless `--accept` |
| performance | only rounding or speed | said, and accepted |
| cosmetic | neither | said, and accepted |

Where a program may want to read the answer there is `--json`: `show` prints the configuration as one object, `check`
`{"notes", "derivation", "config"}`, and `diff` `{"a", "b", "differences": [{"key", "a", "b", "class"}],
"same_function"}`, where a class may also be `length` (only where the run ends) or `place` (only where files lie).

## GPT-NeoX's files

A file with GPT-NeoX's flat keys (`num-layers`, `train_micro_batch_size_per_gpu`, ...) is recognised and translated;
overrides may be in its keys or in ours. [gptneox_keys.md](gptneox_keys.md) says what becomes of each key.
`castalia config convert FILE... --minimal --output mine.yml` writes the result as a native file.

## Editors

[castalia.schema.json](castalia.schema.json) is the JSON Schema of a configuration; `castalia config schema --output
castalia.schema.json` writes it. In an editor that knows the YAML language server, a first line that names it gives
completion, meanings and marks on mistakes:

```yaml
# yaml-language-server: $schema=docs/castalia.schema.json
version: 1
```

Such editors take `100_000_000` for a word, so write whole numbers there without underscores.

"""

KEYS_INTRO = """# What becomes of GPT-NeoX's keys

Castalia reads GPT-NeoX's YAML and JSON files as they are, with dashes or underscores, one or several. Every key of
v2.0 (March 2023) and of main (2026) stands in this table and has one of three fates:

* **translated**: its value becomes values of ours, which are named;
* **reported**: it means nothing here, and a line says why;
* **refused until**: it asks for what is not implemented yet. Values that ask for nothing are accepted.

So no key is dropped silently: `castalia config check FILE` prints a line for each key given. A key that is in neither
version is an error that names the nearest known one.

`compat: main` (the default) or `compat: v2.0`, in a file or as an override, says whose defaults and formulas hold where
the two differ: dropout, weight decay, clipping, the learning rate's arithmetic, RMSNorm's epsilon, the width of gated
MLPs, the precision rules, the first step of a logarithmic checkpoint scale. What is odd there but plain arithmetic is
kept, so that a translated run comes out the same; what crashes there is mended and said. Overrides may be in GPT-NeoX's
keys: `castalia train 20B.yml train_iters=1000`.

"""


def config_page() -> str:
    """docs/config.md."""
    return HERE + CONFIG_INTRO + "\n".join(_config_tables()).rstrip() + "\n"


def keys_page() -> str:
    """docs/gptneox_keys.md."""
    counts = f"{len(TRANSLATED)} are translated, {len(REPORTED)} reported, {len(REFUSED)} refused.\n\n"
    total = len(TRANSLATED) + len(REPORTED) + len(REFUSED)
    rows = [_row("key", "default", "here"), _row("---", "---", "---"), *_key_rows()]
    return HERE + KEYS_INTRO + f"Of {total} keys " + counts + "\n".join(rows) + "\n"


def _config_tables() -> Iterator[str]:
    known = dict(fields())
    top = [key for key in known if "." not in key]
    yield from ["## Keys at the top", "", *_table(top), ""]
    for section, info in Config.model_fields.items():
        inner = [key for key in known if key.startswith(f"{section}.")]
        if inner:
            yield from [f"## {section}: {info.description}", "", *_table(inner), ""]


def _table(keys: Sequence[str]) -> Iterator[str]:
    known = dict(fields())
    yield _row("key", "type", "default", "class", "unit", "meaning")
    yield _row(*["---"] * 6)
    for key in keys:
        info = known[key]
        rule = RESUME_RULES.get(key)
        meaning = f"{info.description}" + (f"; on resuming: {rule}" if rule else "")
        default = scalar(info.get_default(call_default_factory=True))
        yield _row(f"`{key}`", type_text(info), f"`{default}`", class_of(info), unit_of(info) or "", meaning)


def became() -> dict[str, list[str]]:
    """The keys of ours that each translated key of theirs has a part in; empty for what is only checked."""
    ours: dict[str, list[str]] = {key: [] for keys, _ in CHECKS for key in keys}
    for theirs, key in {**REQUIRED, **RENAMED}.items():
        ours.setdefault(theirs, []).append(key)
    for rule in RULES:
        for theirs in rule.reads:
            if rule.ours not in ours.setdefault(theirs, []):
                ours[theirs].append(rule.ours)
    return ours


def _key_rows() -> Iterator[str]:
    ours = became()
    for key in sorted({*TRANSLATED, *REPORTED, *REFUSED}):
        if key in REPORTED:
            yield _row(f"`{key}`", "", f"reported: {REPORTED[key]}")
        elif key in REFUSED:
            yield _row(f"`{key}`", "", f"**refused until** there is {_refused(REFUSED[key])}")
        else:
            given = TRANSLATED[key]
            main, old = (scalar(given.default(version)) for version in ("main", "v2.0"))
            default = "required" if key in REQUIRED else "" if main == old == "null" else f"`{main}`"
            default += "" if main == old else f" (v2.0 `{old}`)"
            names = (
                ", ".join(f"`{name}`" for name in ours[key]) or "only checked, as some values ask for what is missing"
            )
            names += f" (else: {IDLE[key]})" if key in IDLE else ""
            yield _row(f"`{key}`", default, f"translated: {names}")


def _refused(refused: Refused) -> str:
    if refused.block:
        return f"{refused.what}; a block that is not `enabled` asks for nothing"
    if refused.passed_on:
        return f"{refused.what}; entries that are reported anyway ask for nothing"
    values = ", ".join(f"`{scalar(v) if not isinstance(v, dict) else '{}'}`" for v in refused.harmless)
    return f"{refused.what}" + (f"; {values} asks for nothing" if values else "")


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


# In two pieces, since one would read as the name of a module of ours (tests/rules/test_imports.py).
SCHEMA_FILE = "castalia" + ".schema.json"


def pages() -> dict[str, str]:
    """Each generated file's name in docs/ with its text."""
    return {"config.md": config_page(), "gptneox_keys.md": keys_page(), SCHEMA_FILE: json_schema_text()}


def main(argv: Sequence[str] | None = None) -> int:
    """Write the pages; with --check, only say which are stale."""
    parser = argparse.ArgumentParser(prog="python -m castalia.tools.docs", description="write generated pages")
    parser.add_argument("folder", nargs="?", type=Path, default=_docs(), help="where to write (default: docs/)")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 4 if a page is stale")
    args = parser.parse_args(argv)
    stale = [name for name, text in pages().items() if _read(args.folder / name) != text]
    for name in stale:
        print(f"{args.folder / name}: {'is stale: run `make docs`' if args.check else 'written'}")
        if not args.check:
            write_text(args.folder / name, pages()[name])
    return 4 if stale and args.check else 0


def _docs() -> Path:
    return Path(str(_package_files("castalia"))).resolve().parents[1] / "docs"


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


if __name__ == "__main__":
    sys.exit(main())
