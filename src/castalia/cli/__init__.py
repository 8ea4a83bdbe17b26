"""`castalia VERB [files] [key=value] [--flag]`: verbs -> functions.

Only the verb that is called is imported, so that `castalia --help` answers at once. A
`UserError` becomes one sentence on standard error and its exit code; anything else that is
raised is our defect and keeps its traceback (docs/contracts.md, section 2).
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import NoReturn, TextIO

from castalia import __version__
from castalia.errors import UserError

# verb -> what it does; each is a module of this package with `arguments(parser)` and `run(args) -> int`.
VERBS = {
    "demo": "train a small model on this machine from nothing, in minutes",
    "corpora": "list and get corpora",
    "tokenizer": "train or inspect a tokenizer",
    "prepare": "text -> token data set",
    "data": "view, find, check, count, merge and convert token data sets",
    "train": "configuration -> trained run",
    "generate": "run -> text",
    "evaluate": "run -> accuracies on tasks, bits per byte on texts; over all checkpoints, against another model",
    "export": "run -> a folder in Hugging Face format",
    "import": "other people's weights -> a run: Hugging Face, Llama, GGUF, GPT-NeoX",
    "report": "runs -> one HTML page with curves",
    "plan": "parameters, FLOPs and bytes of a configuration; its layouts on a machine; a big job rehearsed",
    "pipeline": "draw a pipeline's schedule: who computes what when, who waits, what is held",
    "tune": "measure the most promising ways to run a configuration here; write the quickest",
    "profile": "time, FLOPs, memory and parameters of one step, module by module; traces",
    "config": "show, explain, check, compare and convert configurations",
    "doctor": "does this machine compute and communicate as it should?",
    "launch": "start a run on several hosts: ssh, pdsh, MPI, Slurm, Kubernetes",
    "replay": "a step of a past run, computed again, against its record; and where a NaN came from",
    "verify": "are checkpoints whole? do layouts of processes train, and go on, as one process does?",
    "checkpoint": "list a run's checkpoints; copy one without what only training needs",
    "inspect": "what is in a checkpoint, ours or anybody's; what differs between two",
    "mup": "check muP over widths, search its settings at a small one, write GPT-NeoX's base shapes",
    "deepy": "the command line of GPT-NeoX's launcher",
}


# Arguments that are places of files.
_PATHS = ("output", "folder", "corpus", "data", "run", "hostfile")


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, instead of printing its usage."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of leaving."""
        hint = ""
        wrong = re.fullmatch(r"argument (.+): invalid choice: (.+) \(choose from (.+)\)", message)
        if wrong and not wrong[1].startswith("-"):
            message = f"{wrong[2]} is none of {wrong[3].replace(chr(39), '')}"
        if message.startswith("unrecognized arguments: "):
            from difflib import get_close_matches

            flag = message.split(": ", 1)[1].split()[0].partition("=")[0]
            near = get_close_matches(flag, self._option_string_actions, 1)
            hint = f"did you mean '{near[0]}'? " if near else ""
        raise UserError(f"{message}; {hint}`{self.prog} --help` lists the arguments")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    _usable_output()
    _short_waits()
    parser = argparse.ArgumentParser(
        prog="castalia",
        usage="castalia VERB [A.yml ...] [key=value ...] [--flag ...]",
        description="Train language models from scratch: text -> tokens -> training -> generation, export.",
        epilog="verbs:\n"
        + "\n".join(f"  {verb:<10} {text}" for verb, text in VERBS.items())
        + "\n\n`castalia VERB --help` explains a verb.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"castalia {__version__}")
    parser.add_argument("verb", help=argparse.SUPPRESS)
    if not argv:
        parser.print_help()
        return 2
    if argv[0].startswith("-") and argv[0] not in ("-h", "--help", "--version"):
        return _fail(f"unknown flag '{argv[0]}'; a verb comes first, and `castalia --help` lists them", 2)
    verb = parser.parse_args(argv[:1]).verb
    if verb not in VERBS:
        from difflib import get_close_matches

        near = get_close_matches(verb, VERBS, 1)
        hint = f"did you mean '{near[0]}'?" if near else "`castalia --help` lists the verbs"
        return _fail(f"unknown verb '{verb}'; {hint}", 2)
    try:
        _check_arguments(argv)
        module = import_module(f"castalia.cli.{verb}")
        inner = Parser(prog=f"castalia {verb}", description=VERBS[verb])
        module.arguments(inner)
        args = inner.parse_intermixed_args(argv[1:]) if _mixable(inner) else inner.parse_args(argv[1:])
        for name, value in vars(args).items():
            if name in _PATHS and isinstance(value, str):  # a shell expands `~` at the start of a word alone
                setattr(args, name, os.path.expanduser(value))
        with _spoken_warnings():
            return int(module.run(args))
    except UserError as error:
        return _fail(str(error), error.exit_code)
    except BrokenPipeError:  # the reader of our output has gone, as in `castalia ... | head`
        return 1
    except OSError as error:  # a full disk, a missing permission, a file where a folder is needed
        if error.strerror is None:
            raise
        where = f"{error.filename}: " if error.filename is not None else ""
        # A write to a full disk names no file.
        mend = "free some where the output goes" if error.errno == errno.ENOSPC else "mend that"
        return _fail(f"{where}{error.strerror}: {mend}, or choose another place", 2)
    except MemoryError as error:
        return _fail(f"not enough memory{f' ({error})' if str(error) else ''}: ask for smaller sizes", 2)
    except RuntimeError as error:  # torch's word for the same, on a CPU and on other devices
        if "can't allocate memory" not in str(error) and type(error).__name__ != "OutOfMemoryError":
            raise
        return _fail("not enough memory: ask for smaller sizes, for example training.micro_batch_size", 2)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def split_settings(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Positional arguments -> (configuration files, overrides): whatever holds a `=` is an override."""
    files = [a for a in arguments if "=" not in a]
    return files, [a for a in arguments if "=" in a]


def _short_waits() -> None:
    """Let the threads of a product wait for each other for microseconds, not for a time slice (docs/performance.md).

    Read by the OpenMP that torch brings when torch is imported; what the environment says already is kept.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


@contextmanager
def _spoken_warnings() -> Iterator[None]:
    """Let a warning of our own be one line for people, without the place in the code that it came from."""
    with warnings.catch_warnings():
        other = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if category is UserWarning and "castalia" in Path(filename).parts:
                print(f"castalia: WARNING: {message}", file=sys.stderr)
            else:
                other(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        yield


def _usable_output() -> None:
    """Make standard output and error take any text: closed ones swallow it, narrow encodings escape it."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - as long as the process
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _check_arguments(argv: Sequence[str]) -> None:
    """Refuse arguments that are no text in this locale: they could be neither printed nor written down."""
    for argument in argv:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise UserError(f"the argument {argument!a} is not valid text (UTF-8 is expected): retype it") from None


def _mixable(parser: argparse.ArgumentParser) -> bool:
    """Intermixed parsing (files after flags) is refused by argparse for verbs with sub-verbs."""
    return not any(isinstance(a, argparse._SubParsersAction) for a in parser._actions)


def _fail(sentence: str, code: int) -> int:
    print(f"castalia: {sentence}", file=sys.stderr)
    return code
