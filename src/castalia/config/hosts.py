"""A hostfile and its filters -> which devices of which hosts take part.

    host-1 slots=8      include: host-1:0,1@host-2     exclude: host-2:3
    host-2 slots=8      nodes: the first so many       procs_per_node: so many on each

The rules are those of GPT-NeoX's launcher, which is DeepSpeed's: blank lines and comments are
skipped, the order of the file is kept, and one of include and exclude may be given. What is
wrong comes back as a `HostError` that says which setting it is about.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_LINE = re.compile(r"(\S+)\s+slots\s*=\s*(\d+)")
_MOST_SLOTS = 1 << 20


@dataclass
class HostError(Exception):
    """What is wrong with the setting `key`: the end of a sentence that begins with its name."""

    key: str
    what: str


def read_hosts(text: str) -> dict[str, list[int]]:
    """The hosts of a hostfile and the slots of each, in order.

    Raises:
        HostError: a line is not `HOST slots=N`, a host comes twice, or there is none.
    """
    hosts: dict[str, list[int]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        match = _LINE.fullmatch(line)
        if match is None or match[1] in hosts or int(match[2]) > _MOST_SLOTS or match[1].startswith("-"):
            raise HostError("hostfile", f"names a file whose line {number} is not `HOST slots=N` with a new host")
        hosts[match[1]] = list(range(int(match[2])))
    if not hosts:
        raise HostError("hostfile", "names a file without hosts")
    return hosts


def select_hosts(
    hosts: dict[str, list[int]],
    include: str | None = None,
    exclude: str | None = None,
    nodes: int | None = None,
    procs_per_node: int | None = None,
) -> dict[str, list[int]]:
    """The hosts and slots that the filters leave, in the hostfile's order.

    Args:
        include, exclude: `HOST[:SLOT,SLOT]@HOST...`.
        nodes: the first so many hosts.
        procs_per_node: the first so many slots of each; not looked at beside include or exclude, which say it.

    Raises:
        HostError: both are given, one names a host or slot that does not exist, or more is asked for than there is.
    """
    if include and exclude:
        raise HostError("include", "and 'exclude' are both given: keep one")
    if include:
        hosts = _filtered("include", include, hosts)
    elif exclude:
        hosts = _filtered("exclude", exclude, hosts)
    if nodes is not None:
        hosts = dict(list(hosts.items())[:nodes])
    if procs_per_node is not None and not include and not exclude:
        hosts = {host: slots[:procs_per_node] or [0] for host, slots in hosts.items()}
    return hosts


def _filtered(key: str, spec: str, hosts: dict[str, list[int]]) -> dict[str, list[int]]:
    named: dict[str, set[int]] = {}
    for part in spec.split("@"):
        host, colon, slots = part.strip().partition(":")
        wanted = {int(slot) for slot in slots.split(",") if slot.strip().isdecimal()} if colon else hosts.get(host)
        if host not in hosts or wanted is None or (colon and not wanted) or not set(wanted) <= set(hosts[host]):
            raise HostError(key, f"names '{part}', but the hostfile has no such host or slot")
        named[host] = named.get(host, set()) | set(wanted)
    if key == "include":
        return {host: sorted(named[host]) for host in hosts if host in named}
    left = {host: [s for s in slots if s not in named.get(host, set())] for host, slots in hosts.items()}
    return {host: slots for host, slots in left.items() if slots}
