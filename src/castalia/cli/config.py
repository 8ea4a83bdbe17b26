"""`castalia config show|check|explain`."""

from __future__ import annotations

import argparse

from castalia.cli import split_settings


def arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    verbs = parser.add_subparsers(dest="what", required=True, metavar="show|check|explain")
    show = verbs.add_parser("show", help="the complete configuration, every default written out")
    show.add_argument("settings", nargs="*", metavar="FILE|key=value")
    check = verbs.add_parser("check", help="say whether files are right, and what follows from them")
    check.add_argument("settings", nargs="+", metavar="FILE|key=value")
    explain = verbs.add_parser("explain", help="what a key means, its value, and where that comes from")
    explain.add_argument("key")
    explain.add_argument("settings", nargs="*", metavar="FILE|key=value")


def run(args: argparse.Namespace) -> int:
    """Print what was asked for."""
    from castalia.config import load, notes
    from castalia.config.derive import derive
    from castalia.config.render import explain, to_yaml
    from castalia.tools.plan import tokenizer_vocabulary

    config = load(*split_settings(args.settings))
    if args.what == "show":
        print(to_yaml(config), end="")
    elif args.what == "check":
        for line in [*notes(config), *derive(config, tokenizer_vocabulary(config))[1]]:
            print(line)
        print("the configuration is right")
    else:
        print(explain(config, args.key))
    return 0
