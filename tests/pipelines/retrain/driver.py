"""Run some nights in a process that tests kill: `python -m tests.pipelines.retrain.driver FOLDER NIGHTS`."""

import sys
from pathlib import Path

from tests.pipelines.retrain.nights import config_in, night, retraining


def main() -> None:
    """Run each night's cycle if it is due, after finishing the interrupted one."""
    folder, nights = Path(sys.argv[1]), int(sys.argv[2])
    for number in range(nights):
        with retraining(config_in(folder)) as one:
            if one.ledger.under_way is not None:
                one.step()
            one.step(night(number))
    with retraining(config_in(folder)) as one:
        one.publish()


if __name__ == "__main__":
    main()
