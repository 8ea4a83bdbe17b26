"""GPT-NeoX's hostfile, include, exclude, num_nodes, num_gpus -> how many devices share the batch.

Only the count matters here, where a file leaves train_batch_size to follow from it; who starts
the processes is the business of the `launch` section.
"""

from __future__ import annotations

from pathlib import Path

from castalia.config.gptneox_given import Given
from castalia.config.hosts import HostError, read_hosts, select_hosts

KEYS = ("hostfile", "include", "exclude", "num_nodes", "num_gpus")


def counted_devices(given: Given) -> int | None:
    """Devices of the hostfile after its filters; None if none is named, or it is not on this machine."""
    if "hostfile" not in given:
        return None
    try:
        text = Path(str(given["hostfile"])).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None  # GPT-NeoX warns and takes the devices of the machine
    include, exclude = given.values.get("include"), given.values.get("exclude")
    nodes, per_node = given["num_nodes"], given["num_gpus"] or 0
    try:
        hosts = select_hosts(
            read_hosts(text),
            None if include is None else str(include),
            None if exclude is None else str(exclude),
            nodes if nodes > 0 else None,
        )
    except HostError as error:
        given.fail(error.key, error.what)
    # The filters say which devices; then a number of them says nothing any more.
    if per_node > 0 and include is None and exclude is None:
        return int(per_node) * len(hosts)
    return sum(len(slots) for slots in hosts.values())
