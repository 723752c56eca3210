"""Dry run of a call: what it would do, why, and the approximate cost; nothing is written."""

from sidestack.infra.manifest import is_committed
from sidestack.pipelines.retrain.cycle import Retraining
from sidestack.pipelines.retrain.ledger import Plan
from sidestack.ranker.config import Dates


def dry_run(retraining: Retraining) -> None:
    """Print what a call would do."""
    ledger = retraining.ledger
    plan = ledger.under_way
    if plan is not None:
        print(f"would resume cycle {plan.number}: {plan.why}")
    else:
        stage = retraining.prepare(None)
        prepared = retraining.pipeline().output(stage)
        if not is_committed(prepared):
            print("would prepare first: the source, a setting or the code has changed since the last snapshot;")
            print("what is due is known from the snapshot that this makes")
            _print_seconds(retraining)
            return
        plan = retraining.decide(prepared, None)
        if plan is None:
            return
        print(f"would begin cycle {plan.number}: {plan.why}")
    _print_plan(plan)
    _print_seconds(retraining)


def _print_plan(plan: Plan) -> None:
    start = "from scratch" if plan.champion is None else f"from version {plan.champion}"
    print(f"  encoders  {plan.policy}" if plan.champion is not None else "  encoders  trained")
    print(f"  ranker    {start}")
    for name, windows in (("learns", plan.learned), ("judged on", plan.measured)):
        for task, dates in windows.items():
            print(f"  {name:<9} {task}: {_range(dates)}")


def _print_seconds(retraining: Retraining) -> None:
    last = retraining.ledger.trained
    if last is not None and last.outcome is not None and last.outcome.seconds:
        seconds_by_stage = ", ".join(f"{label} {seconds:.0f}" for label, seconds in last.outcome.seconds.items())
        total = sum(last.outcome.seconds.values())
        print(f"  the last cycle took {total:.0f} s of stages: {seconds_by_stage}")


def _range(dates: Dates) -> str:
    first, last = dates
    return f"{first} to {last}" if first != last else f"{first}"
