"""What is in a checkpoint -> lines of text: a tree by the parts of the names, and a browser that folds it.

model.layers.0.attention.qkv.weight      model
model.layers.0.attention.qkv.bias   ─>     layers.0.attention.qkv
model.embedding.weight                       weight  [96, 32]  float32 ...
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from castalia.errors import UserError
from castalia.tools.inspect import Contents, Entry
from castalia.tools.inspect_numbers import Difference, Numbers, numbers

_UNITS = ("B", "KB", "MB", "GB", "TB")

HELP = """\
NUMBER     unfold or fold that line; of a tensor: its numbers and first values
+  -       unfold everything, fold everything
/GLOB      show names that match alone; / shows all again
h  q       this help; leave"""


@dataclass
class Node:
    """A part of a name: what lies below it, and what it is itself."""

    name: str
    below: dict[str, Node] = field(default_factory=dict)
    entry: Entry | None = None
    value: str | None = None

    def entries(self) -> Iterator[Entry]:
        """All tensors here and below."""
        if self.entry is not None:
            yield self.entry
        for node in self.below.values():
            yield from node.entries()


def chosen(contents: Contents, globs: Sequence[str]) -> Contents:
    """The part whose names match one of the patterns; all of it where there are none.

    Raises:
        UserError: nothing matches.
    """
    if not globs:
        return contents

    def matches(name: str) -> bool:
        return any(fnmatchcase(name, glob) for glob in globs)

    tensors = [entry for entry in contents.tensors if matches(entry.name)]
    values = {name: value for name, value in contents.values.items() if matches(name)}
    if not tensors and not values:
        some = next((entry.name for entry in contents.tensors), "none")
        raise UserError(f"{contents.path}: no name matches {' or '.join(globs)}; a name there is {some}")
    return Contents(contents.path, tensors, values)


def tree(contents: Contents) -> Node:
    """The names as a tree; chains of parts with nothing beside them are one node."""
    root = Node("")

    def place(name: str) -> Node:
        at = root
        for part in name.split("."):
            at = at.below.setdefault(part, Node(part))
        return at

    for entry in contents.tensors:
        place(entry.name).entry = entry
    for name, value in contents.values.items():
        place(name).value = value
    return _joined(root, top=True)


def _joined(node: Node, top: bool = False) -> Node:
    below = [_joined(child) for child in node.below.values()]
    if len(below) == 1 and not top and node.entry is None and node.value is None:
        only = below[0]
        return Node(f"{node.name}.{only.name}", only.below, only.entry, only.value)
    return Node(node.name, {child.name: child for child in below}, node.entry, node.value)


def heading(contents: Contents) -> str:
    """One line about the whole."""
    count = sum(entry.numel for entry in contents.tensors)
    return (
        f"{printable(str(contents.path))}: {len(contents.tensors):,} tensors, {count:,} numbers, "
        f"{amount(contents.bytes)}, {len(contents.values):,} other values"
    )


def lines(contents: Contents, read: bool = True) -> Iterator[str]:
    """The whole tree; with `read` each tensor's numbers are looked at."""
    yield heading(contents)
    yield from _lines(tree(contents), 0, read)


def _lines(node: Node, depth: int, read: bool) -> Iterator[str]:
    pad = "  " * depth
    for child in node.below.values():
        if child.entry is not None:
            yield f"{pad}{printable(child.name)}  {tensor_line(child.entry, read)}"
        elif child.value is not None:
            yield f"{pad}{printable(child.name)} = {printable(child.value)}"
        else:
            yield f"{pad}{printable(child.name)}"
        yield from _lines(child, depth + 1, read)


def tensor_line(entry: Entry, read: bool) -> str:
    """Shape, dtype, bytes and, with `read`, the numbers."""
    about = f"{list(entry.shape)}  {entry.dtype}  {amount(entry.bytes)}"
    return f"{about}  {numbers_text(numbers(entry.read()))}" if read else about


def numbers_text(found: Numbers | None) -> str:
    """`norm 1.2  min -3  max 4`, and what is not finite."""
    if found is None:
        return "numbers of a kind that is not reckoned with"
    parts = []
    if found.norm is not None:
        parts.append(f"norm {found.norm:.4g}  min {found.min:.4g}  max {found.max:.4g}")
    parts += [f"{count:,} {word}" for word, count in (("NaN", found.nan), ("infinite", found.inf)) if count]
    return "  ".join(parts) or "empty"


def difference_line(found: Difference) -> str:
    """One difference."""
    name = printable(found.name)
    if found.max_abs is not None:
        relative = "" if found.max_rel is None or math.isinf(found.max_rel) else f", {found.max_rel:.3g} relative"
        return f"{name}: differs by up to {found.max_abs:.3g}{relative}"
    if found.what.startswith("only"):
        return f"{name}: {found.what}: {printable(found.a or found.b or '')}"
    return f"{name}: {found.what} {printable(str(found.a))} in A, {printable(str(found.b))} in B"


def amount(count: int) -> str:
    """Bytes in a unit of 1024."""
    size, unit = float(count), 0
    while size >= 1024 and unit < len(_UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size:.1f} {_UNITS[unit]}" if unit else f"{count} B"


def printable(text: str) -> str:
    """Without what could steer a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Browser:
    """A tree of which the user folds and unfolds parts, a line of text at a time.

    Args:
        contents: of one checkpoint.
        show: prints a line.
    """

    def __init__(self, contents: Contents, show: Callable[[str], None]) -> None:
        self._all, self._contents, self._show = contents, contents, show
        self._root = tree(contents)
        self._open: set[int] = set()
        self._shown: list[Node] = []

    def draw(self) -> None:
        """Print what is unfolded, numbered."""
        self._show(heading(self._contents))
        self._shown = []
        self._draw(self._root, 0)

    def _draw(self, node: Node, depth: int) -> None:
        for child in node.below.values():
            self._shown.append(child)
            mark = ("-" if id(child) in self._open else "+") if child.below else " "
            self._show(f"{len(self._shown):>5} {mark} {'  ' * depth}{printable(child.name)}  {self._about(child)}")
            if id(child) in self._open:
                self._draw(child, depth + 1)

    def _about(self, node: Node) -> str:
        if node.entry is not None:
            return tensor_line(node.entry, read=False)
        if node.value is not None:
            return f"= {printable(node.value)}"
        found = list(node.entries())
        return f"({len(found):,} tensors, {amount(sum(entry.bytes for entry in found))})" if found else ""

    def obey(self, command: str) -> bool:
        """Do what a line asks for; False when it asks to leave."""
        command = command.strip()
        if command in ("q", "quit", "exit"):
            return False
        if command in ("h", "help", "?"):
            self._show(HELP)
        elif command == "+":
            self._open = {id(node) for node in _nodes(self._root)}
            self.draw()
        elif command in ("-", ""):
            self._open = set() if command else self._open
            self.draw()
        elif command.startswith("/"):
            self._filter(command[1:].strip())
        elif command.isdecimal() and 1 <= int(command) <= len(self._shown):
            self._toggle(self._shown[int(command) - 1])
        else:
            self._show(
                f"'{printable(command)}' is neither a number from 1 to {len(self._shown)} nor a command; h: help"
            )
        return True

    def _filter(self, glob: str) -> None:
        try:
            self._contents = chosen(self._all, [glob] if glob else [])
        except UserError as error:
            self._show(str(error))
            return
        self._root = tree(self._contents)
        self._open = {id(node) for node in _nodes(self._root)} if glob else set()
        self.draw()

    def _toggle(self, node: Node) -> None:
        if node.below:
            self._open ^= {id(node)}
            self.draw()
        if node.entry is not None:
            tensor = node.entry.read()
            self._show(f"{printable(node.entry.name)}  {tensor_line(node.entry, read=True)}")
            self._show(f"  begins {tensor.reshape(-1)[:8].tolist()}")
        elif node.value is not None:
            self._show(printable(node.value))


def _nodes(node: Node) -> Iterator[Node]:
    yield node
    for child in node.below.values():
        yield from _nodes(child)
