"""`python -m pipelines.privacy.mask --config FILE [--kind user] [ID ...]`: print the masked forms of ids.

So that a raw id finds its row of the tables (`user_key`, `item_key`), for a request of its person or for a served
request. Without ids it reads them from the standard input, a line each, which leaves none in a shell's history.
"""

import argparse
import sys

from sidestack.infra.errors import ConfigError
from sidestack.infra.remote.urls import path_argument
from sidestack.pipelines.config import read_config
from sidestack.pipelines.prepare.log.config import LogConfig
from sidestack.pipelines.prepare.log.masking import KINDS, masking_of
from sidestack.pipelines.run import exit_status


def main() -> None:
    """Run the command; print an error as one message on stderr."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.privacy.mask", description=__doc__)
    parser.add_argument(
        "--config", type=path_argument, required=True, help="the run's configuration, which names the key"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, as in pipelines.run")
    parser.add_argument("--kind", choices=KINDS, default="user", help="whose ids they are")
    parser.add_argument("ids", nargs="*", metavar="ID")
    arguments = parser.parse_args()
    with exit_status():
        _, config = read_config(arguments.config, arguments.set)
        source = config.prepare.source
        masking = masking_of(source.privacy) if isinstance(source, LogConfig) else None
        if masking is None:
            raise ConfigError(f"{arguments.config}: prepare.source.privacy.key: names no key, so no id is masked")
        for one in arguments.ids or map(str.rstrip, sys.stdin):
            print(masking.masked(arguments.kind, one))


if __name__ == "__main__":
    main()
