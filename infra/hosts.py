"""Check, before work begins, that all hosts of a stage see the same code, settings, inputs and time."""

import os
import socket
import time
from collections.abc import Mapping

from sidestack.infra.code import require_code
from sidestack.infra.distributed import World, barrier, gather, raise_on_all_ranks
from sidestack.infra.errors import ConfigError
from sidestack.infra.logs import LOG

CLOCK_SECONDS = 5.0
"""Largest difference between clocks without a warning: beyond it, file times and logs of the hosts are inconsistent."""


def require_alike_hosts(world: World, seen: Mapping[str, str]) -> None:
    """Check that every rank runs the code in its job's key and sees the same inputs; warn if clocks differ.

    Args:
        world: the process group.
        seen: name -> digest of what this rank sees, such as of the settings and each input.

    Raises:
        ConfigError: the code is not that in the job's key; or, on every rank, what differs, by rank and host.
        StageError: another rank has the wrong code; raised on ranks with the right one.
    """
    with raise_on_all_ranks(world, "checking the code"):
        code = require_code(os.environ)
    host = socket.gethostname()
    everywhere = gather(world, (host, {"code": code, **seen}))
    for what, first in everywhere[0][1].items():
        others = [
            f"rank {rank} on {name}: {digests[what][:12]}"
            for rank, (name, digests) in enumerate(everywhere)
            if digests[what] != first
        ]
        if others:
            raise ConfigError(f"{what}: rank 0 on {everywhere[0][0]} sees {first[:12]}; {', '.join(others)}")
    barrier(world)
    _warn_of_clocks(world, [name for name, _ in everywhere], time.time())


def _warn_of_clocks(world: World, hosts: list[str], now: float) -> None:
    """Log a warning if the clocks differ too much; the ranks have just left a barrier."""
    clocks = gather(world, now)
    slow, fast = clocks.index(min(clocks)), clocks.index(max(clocks))
    if world.is_main and clocks[fast] - clocks[slow] > CLOCK_SECONDS:
        ahead = f"{clocks[fast] - clocks[slow]:.0f} s ahead of that of rank {slow} on {hosts[slow]}"
        LOG.warning(f"the clock of rank {fast} on {hosts[fast]} is {ahead}; set the hosts' time (NTP)")
