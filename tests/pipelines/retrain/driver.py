"""Some nights as a process, to be killed: `python -m tests.pipelines.retrain.driver FOLDER NIGHTS`."""

import sys
from pathlib import Path

from tests.pipelines.retrain.nights import config_in, night, retraining


def main() -> None:
    """Bring the nights' cycles, those that are due; what is under way first."""
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
