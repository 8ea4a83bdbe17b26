"""Kill a command with SIGKILL at random moments, start it again, until it has finished.

    start ─> wait until it works (a file grows) ─> wait a random while ─> SIGKILL ─┐
      ^────────────────────────────────────────────────────────────────────────────┘
    after the last kill: let it finish; whoever asked compares what it left

The moments are drawn from a seed, so a campaign can be repeated.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from castalia.errors import CheckFailed


@dataclass
class Campaign:
    """What happened.

    Attributes:
        kills: processes that were killed at work.
        finished_early: starts that ended before their moment came.
        moments: seconds after the first sign of work at which each kill fell.
    """

    kills: int = 0
    finished_early: int = 0
    moments: list[float] = field(default_factory=list)


def kill_campaign(
    command: Sequence[str],
    at_work: Callable[[], object],
    kills: int,
    longest: float,
    seed: int = 0,
    between: Callable[[int], None] | None = None,
    before: Callable[[], None] | None = None,
    timeout: float = 120.0,
) -> Campaign:
    """Kill `command` `kills` times, then run it to its end.

    Args:
        command: the program and its arguments.
        at_work: any value that changes once the program is at work (a file's size, say).
        kills: how many kills.
        longest: seconds; each kill falls between 0 and this after work began.
        seed: of the moments.
        between: called after each kill with its number, to look at what was left behind.
        before: called before each start, also of the last.
        timeout: seconds after which a start that shows no work, or a last run that does not end, has failed.

    Raises:
        CheckFailed: the program fails, hangs, or finishes `kills` times before it could be killed.
    """
    draw = random.Random(seed)
    campaign = Campaign()
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    while campaign.kills < kills:
        if before is not None:
            before()
        idle = at_work()
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            started = time.monotonic()
            while at_work() == idle and process.poll() is None:
                if time.monotonic() - started > timeout:
                    raise CheckFailed(f"{' '.join(command)}: showed no work within {timeout:g} s")
                time.sleep(0.002)
            moment = draw.uniform(0, longest)
            end = time.monotonic() + moment
            while time.monotonic() < end and process.poll() is None:
                time.sleep(0.001)
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.communicate()
                campaign.kills += 1
                campaign.moments.append(moment)
                if between is not None:
                    between(campaign.kills)
                continue
            _, errors = process.communicate()
            if process.returncode != 0:
                raise CheckFailed(f"{' '.join(command)}: exit code {process.returncode}: {errors.decode()[-800:]}")
            campaign.finished_early += 1
            if campaign.finished_early > kills:
                raise CheckFailed(f"{' '.join(command)}: finishes before it can be killed; give it more work")
        finally:
            if process.poll() is None:
                process.kill()
                process.communicate()
    if before is not None:
        before()
    final = subprocess.run(command, env=environment, capture_output=True, timeout=timeout, check=False)
    if final.returncode != 0:
        raise CheckFailed(f"{' '.join(command)}: exit code {final.returncode} at last: {final.stderr.decode()[-800:]}")
    return campaign
