"""`python -m infra.rendezvous HOST:PORT NODE`: check on every node of a job, before torchrun, that the nodes can meet.

torchrun waits silently for minutes for a name that does not resolve, and for an answer from another program on its
port. Two names must resolve: that of the rendezvous node, and the node's own, which it publishes for its ranks. The
port must be free on the first node, number 0.
"""

import errno
import socket
import sys
import time
from collections.abc import Sequence

PATIENCE_S = 20.0
"""How long a name may take to resolve: some clusters publish a pod's name some seconds after its start."""
PORT_VARIABLE = "SIDESTACK_RENDEZVOUS_PORT"
"""The variable with the rendezvous port of a job (`components.torchrun`); on Slurm the job's script sets it."""
PREFIX = "rendezvous: "
"""The prefix of lines that explain why the nodes cannot meet."""


def unknown(host: str) -> str | None:
    """Return the reason why a host's name does not resolve here; None: it resolves."""
    try:
        socket.getaddrinfo(host, None)
    except (OSError, UnicodeError) as error:
        return str(error)
    return None


def is_taken(port: int) -> bool:
    """Return whether another program on this host listens on a port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was just released counts as free
        try:
            probe.bind(("", port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False


def faults(host: str, port: int, node: str) -> list[str]:
    """Return the reasons, as seen from this node, why the nodes cannot meet."""
    own = socket.getfqdn()
    names = {own: "this node's own name", host: "the first node of this job, which the others meet at"}
    found = [
        f"host {name!r} ({what}) does not resolve on {socket.gethostname()}: {fault}; add it to DNS or /etc/hosts"
        for name, what in names.items()
        if (fault := unknown(name))
    ]
    if node == "0" and is_taken(port):
        found.append(f"port {port} of {own}, where the job's nodes meet, is taken; set {PORT_VARIABLE} to a free one")
    return found


def main(argv: Sequence[str]) -> int:
    """Wait until the nodes can meet and return 0; otherwise print a line for each reason and return 1."""
    host, _, port = argv[0].rpartition(":")
    deadline = time.monotonic() + PATIENCE_S
    while found := faults(host, int(port), argv[1]):
        if time.monotonic() > deadline:
            print("\n".join(f"{PREFIX}{fault}" for fault in found), file=sys.stderr, flush=True)
            return 1
        time.sleep(1.0)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
