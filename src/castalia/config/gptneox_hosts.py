"""A hostfile and its filters -> how many devices share the work, which decides GPT-NeoX's batch.

    host-1 slots=8      include: host-1:0,1@host-2     exclude: host-2:3
    host-2 slots=8      num_nodes: the first so many   num_gpus: so many on each

The rules are those of DeepSpeed's runner. Here nothing is launched by them: only the count
matters, where a file leaves train_batch_size to follow from it.
"""

from __future__ import annotations

import re
from pathlib import Path

from castalia.config.gptneox_given import Given

KEYS = ("hostfile", "include", "exclude", "num_nodes", "num_gpus")
_LINE = re.compile(r"(\S+)\s+slots\s*=\s*(\d+)")


def counted_devices(given: Given) -> int | None:
    """Devices of the hostfile after its filters; None if none is named, or it is not on this machine."""
    if "hostfile" not in given:
        return None
    try:
        text = Path(str(given["hostfile"])).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None  # GPT-NeoX warns and takes the devices of the machine
    hosts = _hosts(given, text)
    if "include" in given and "exclude" in given:
        given.fail("include", "and 'exclude' are both given: keep one")
    for key in ("include", "exclude"):
        if key in given:
            hosts = _filtered(given, key, hosts)
    if given["num_nodes"] > 0:
        hosts = dict(list(hosts.items())[: given["num_nodes"]])
    # The filters say which devices; then a number of them says nothing any more.
    if (given["num_gpus"] or 0) > 0 and "include" not in given and "exclude" not in given:
        return int(given["num_gpus"]) * len(hosts)
    return sum(len(slots) for slots in hosts.values())


def _hosts(given: Given, text: str) -> dict[str, set[int]]:
    hosts: dict[str, set[int]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.partition("#")[0].strip()
        match = _LINE.fullmatch(line)
        if not line:
            continue
        if match is None or match[1] in hosts or int(match[2]) > 1 << 20:
            given.fail("hostfile", f"names a file whose line {number} is not `HOST slots=N` with a new host")
        hosts[match[1]] = set(range(int(match[2])))
    if not hosts:
        given.fail("hostfile", "names a file without hosts")
    return hosts


def _filtered(given: Given, key: str, hosts: dict[str, set[int]]) -> dict[str, set[int]]:
    """Hosts and slots that `include` names, or those that `exclude` leaves, in the hostfile's order."""
    named: dict[str, set[int]] = {}
    for part in str(given[key]).split("@"):
        host, colon, slots = part.strip().partition(":")
        wanted = {int(slot) for slot in slots.split(",") if slot.strip().isdecimal()} if colon else hosts.get(host)
        if host not in hosts or wanted is None or (colon and not wanted) or not wanted <= hosts[host]:
            given.fail(key, f"names '{part}', but the hostfile has no such host or slot")
        named[host] = named.get(host, set()) | wanted
    if key == "include":
        return {host: named[host] for host in hosts if host in named}
    left = {host: slots - named.get(host, set()) for host, slots in hosts.items()}
    return {host: slots for host, slots in left.items() if slots}
