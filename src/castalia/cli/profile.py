"""`castalia profile CONFIG [key=value]`: time, FLOPs, memory and parameters of a step, module by module."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from castalia.cli import split_settings
from castalia.errors import UserError


def arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    parser.add_argument(
        "settings",
        nargs="+",
        metavar="FILE|key=value",
        help="configuration files and overrides; or what --json printed",
    )
    parser.add_argument("--depth", type=int, help="levels of the tree that are printed (default: all)")
    parser.add_argument("--each", action="store_true", help="print every layer by itself; else alike ones together")
    parser.add_argument("--top", type=int, default=5, help="modules to name whose own work takes longest (default: 5)")
    parser.add_argument("--repeat", type=int, default=3, help="steps to time, the middle one counts (default: 3)")
    parser.add_argument("--html", metavar="FILE", help="write a page with flames of time, FLOPs, memory, parameters")
    parser.add_argument("--trace", metavar="FILE", help="write torch's trace of a step, for ui.perfetto.dev")
    parser.add_argument("--memory", metavar="FILE", help="write what was allocated when in a step")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    from castalia.config import load
    from castalia.config.files import write_text
    from castalia.tools.profile import profile
    from castalia.tools.profile_page import page, report
    from castalia.train.profile_tree import read_profile

    for key in ("depth", "top", "repeat"):
        if (getattr(args, key) or 0) < 0:
            raise UserError(f"--{key} {getattr(args, key)}: must not be negative")
    files = {key: Path(value).expanduser() for key in ("html", "trace", "memory") if (value := getattr(args, key))}
    for path in files.values():
        if not path.parent.is_dir():
            raise UserError(f"{path}: its folder does not exist: make it first")
    written = _written(args.settings)
    if written is None:
        found = profile(load(*split_settings(args.settings)), args.repeat, files.get("trace"), files.get("memory"))
    elif files.keys() & {"trace", "memory"}:
        raise UserError(f"{args.settings[0]}: a profile that was measured has no step to record: give a configuration")
    else:
        found = read_profile(written)
    if "html" in files:
        write_text(files["html"], page(found))
        found.notes.append(f"written: {files['html']}")
    print(json.dumps(found.as_dict()) if args.json else "\n".join(report(found, args.depth, args.each, args.top)))
    return 0


def _written(settings: list[str]) -> dict[str, Any] | None:
    """A profile that was written before, by --json or by a run's profile.modules; None: these are configurations."""
    if len(settings) != 1 or not settings[0].endswith(".json"):
        return None
    try:
        values = json.loads(Path(settings[0]).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError):  # whoever loads configurations says what is wrong
        return None
    return values if isinstance(values, dict) and values.get("profile") == 1 and "root" in values else None
