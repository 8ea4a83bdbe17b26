"""Weights that are converted while they are written, so that memory holds one row of the table at a time.

Hugging Face's files ──row──> `Later` ──save_checkpoint asks for it──> our checkpoint
our checkpoint       ──row──> `Part`  ──write_folder asks for it───> Hugging Face's files
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from castalia.checkpoint import Piece, load_weights
from castalia.convert.huggingface_files import Part
from castalia.convert.table import Row, row_to_ours, row_to_theirs
from castalia.errors import UserError

_M_MMAP_THRESHOLD = -3


def give_back_at_once() -> None:
    """Have large freed blocks go back to the system, where the C library lets itself be told so (glibc).

    Left to itself it keeps blocks of up to 32 MB and does not use them again for tensors, which are aligned: a
    conversion then holds almost the whole model. Process-wide; blocks from 1 MiB on.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)


class Later(Piece):
    """A whole tensor of a checkpoint that is made when it is written, and then forgotten.

    Args:
        shape: it has this, or the writing fails.
        make: the tensor, which becomes fp32.
        name: for messages.
        last: the tensor made before, of all that are written together. torch's writer keeps every tensor that it
            has written until the file is closed, so its memory is given back here.
    """

    def __init__(self, shape: Sequence[int], make: Callable[[], Tensor], name: str, last: list[Tensor]) -> None:
        self._make, self._name, self._last, self._planned = make, name, last, False
        self.shape, self.offset = torch.Size(shape), torch.Size([0] * len(shape))

    @property
    def local(self) -> Tensor:  # type: ignore[override]
        """The tensor; while the writing is planned only its shape."""
        if not self._planned:
            return torch.empty(self.shape, device="meta")
        while self._last:
            self._last.pop().untyped_storage().resize_(0)
        tensor = self._make().to(torch.float32, copy=True)
        self._last.append(tensor)
        if tensor.shape != self.shape:
            raise UserError(
                f"{self._name}: is {list(tensor.shape)} there and {list(self.shape)} by the configuration: "
                "use the one it was trained with"
            )
        return tensor

    def detach(self) -> Later:
        """Itself: it has no gradients."""
        return self

    def __create_write_items__(self, name: str, of: Any) -> Any:
        items = super().__create_write_items__(name, of)
        self._planned = True
        return items


def ours_later(
    rows: Sequence[Row], source: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], what: str
) -> dict[str, Later]:
    """Our tensors, each made of its row's when it is written.

    Args:
        rows: each of one tensor of ours, which tables of imports have.
        source: their tensors by the rows' names; asked for one row at a time.
        shapes: of ours.
        what: names the tensors in messages.
    """
    last: list[Tensor] = []

    give_back_at_once()

    def later(row: Row) -> Later:
        (name,) = row.ours
        return Later(shapes[name], lambda: row_to_ours(row, source, what)[name], name, last)

    return {row.ours[0]: later(row) for row in rows}


def theirs_later(rows: Sequence[Row], checkpoint: Path, shapes: Mapping[str, tuple[int, ...]]) -> list[Part]:
    """Their tensors, each row read from a checkpoint of ours when it is written.

    Args:
        shapes: of our tensors, by canonical name.
    """

    def part(row: Row) -> Part:
        empty = {name: torch.empty(shapes[name], device="meta") for name in row.ours}
        theirs = {name: tuple(t.shape) for name, t in row_to_theirs(row, empty, "the weights").items()}

        def make() -> dict[str, Tensor]:
            read = {name: torch.empty(shapes[name]) for name in row.ours}
            for name, tensor in read.items():
                load_weights(checkpoint, {f"model.{name}": tensor}, only=f"model.{name}")
            return row_to_theirs(row, read, "the weights")

        return Part(theirs, make)

    return [part(row) for row in rows]
