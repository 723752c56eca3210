"""Roll-back to an earlier version of encoders, SIDs and ranker as one."""

from datetime import UTC, datetime

from sidestack.infra.errors import ConfigError
from sidestack.pipelines.job_log import log_line
from sidestack.pipelines.retrain.cycle import Retraining
from sidestack.pipelines.retrain.ledger import Outcome, Plan


def roll_back(retraining: Retraining, number: int | None = None) -> None:
    """Make an earlier version champion, and set the store's alias to it; abandon a running cycle.

    Args:
        retraining: the run's. number: the version; None: the previous champion.

    Raises:
        ConfigError: there is no such version. StageError: the version is incomplete or altered.
    """
    ledger = retraining.ledger
    champions = ledger.champions
    if number is None:
        if len(champions) < 2:
            raise ConfigError("retrain rollback: there is no champion before this one")
        number = champions[-2]
    if number not in ledger.versions:
        made = ", ".join(map(str, ledger.versions)) or "none"
        raise ConfigError(f"retrain rollback: there is no version {number}; versions are {made}")
    ledger.require_whole(ledger.versions[number])
    now = datetime.now(UTC).replace(microsecond=0)
    if ledger.under_way is not None:  # it started from the champion that is replaced
        log_line(
            "retrain",
            f"cycle {ledger.under_way.number}, which had begun, is given up; its dates are learned by the next",
        )
        ledger.close(Outcome(at=now))
    was = champions[-1] if champions else None
    why = f"from version {was}" if was is not None else "by hand"
    ledger.open(Plan(number=len(ledger.cycles) + 1, kind="rollback", at=now, why=why, champion=number))
    ledger.close(Outcome(at=now))
    log_line("retrain", f"version {number} is champion")
    retraining.publish(force=True)
