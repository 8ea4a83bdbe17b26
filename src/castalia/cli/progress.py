"""Progress on a terminal as a bar, elsewhere as a plain line now and then; always on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from castalia.data.prepare import Progress

_LINE_SECONDS = 10.0


@contextmanager
def preparation_progress(total_bytes: int | None) -> Iterator[Callable[[Progress], None]]:
    """A callback for `prepare`; `total_bytes` of text where the input's size says it (compressed input does not)."""
    if not sys.stderr.isatty():
        yield _lines(total_bytes)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("tokenising", total=total_bytes)

        def update(now: Progress) -> None:
            bar.update(task, completed=now.bytes, description=f"{now.documents:,} documents, {now.tokens:,} tokens")

        yield update


@contextmanager
def bar(doing: str, unit: str) -> Iterator[Callable[[int, int], None] | None]:
    """A callback for (done so far, in all), drawn as a bar; None where standard error is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[said]}"), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as drawn:
        task = drawn.add_task(doing, total=None, said="")
        yield lambda done, total: drawn.update(task, completed=done, total=total, said=f"{done:,} of {total:,} {unit}")


@contextmanager
def stages() -> Iterator[Callable[[str], None] | None]:
    """A callback that says what is being done now; None where standard error is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console

    with Console(stderr=True).status("") as status:
        yield status.update


def _lines(total_bytes: int | None) -> Callable[[Progress], None]:
    began = last = time.monotonic()
    before: int | None = None  # bytes that an interrupted preparation had done

    def update(now: Progress) -> None:
        nonlocal last, before
        moment = time.monotonic()
        if before is None:
            before = now.bytes
        if moment - last >= _LINE_SECONDS:
            last = moment
            rate = (now.bytes - before) / (moment - began)
            left = max(total_bytes - now.bytes, 0) / rate if total_bytes and rate else None
            print(
                f"{now.documents:,} documents, {now.tokens:,} tokens, {rate / 1e6:.1f} MB/s"
                + (f", about {left:.0f} s left" if left is not None else ""),
                file=sys.stderr,
                flush=True,
            )

    return update
