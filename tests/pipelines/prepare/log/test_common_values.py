"""Values of categoricals that too few users have become `unknown`, in events, users and items."""

from pathlib import Path
from typing import Any

from sidestack.infra.distributed import ALONE
from sidestack.infra.snapshot import read_dataset
from sidestack.pipelines.prepare.log.content import UNKNOWN
from tests.datasets import content, joined
from tests.pipelines.prepare.log.raw import Row, catalogue, log_config, raw_events, raw_orders, write, write_days
from tests.pipelines.prepare.running import run_prepare

MIN_USERS = 3


def prepared(folder: Path, **privacy: Any) -> Path:
    """Prepare a log in which two users share a rare device, a plan and an item, each many times."""
    events = [row | rare(row) for row in raw_events(6)]
    write_days(folder / "events", events)
    write(folder / "items.parquet", [row | {"kind": f"k-{row['sku']}"} for row in catalogue(9)])
    write(folder / "orders.parquet", raw_orders(events))
    users = [{"uid": f"u{n}", "plan": "rare plan" if n < 2 else "plan"} for n in range(6)]
    write(folder / "users.parquet", users)
    config = log_config(folder, privacy=privacy)
    config["source"]["users"] = {"path": f"{folder}/users.parquet", "id": "uid", "categoricals": ["plan"]}
    run_prepare(ALONE, config, folder / "runs/out")
    return folder / "runs/out"


def rare(row: Row) -> Row:
    """Return a row's device and item: only the two users have the rare device and events on item i00."""
    is_rare = row["uid"] in ("u0", "u1")
    return {
        "device": "rare device" if is_rare else row["device"],
        "sku": "i00" if is_rare else f"i{1 + int(row['sku'][1:]) % 8:02d}",
    }


def ids(out: Path) -> dict[str, tuple[set[int], set[int]]]:
    """Return, by categorical, the ids of the two users' values and those of the others'."""
    rows = joined(out, ["user_id", "device"]).to_pylist()
    keys = content(read_dataset(out), "users")["user_key"].to_pylist()
    users, items = (content(read_dataset(out), table).to_pylist() for table in ("users", "items"))
    device = [(keys[row["user_id"]] in ("u0", "u1"), row["device"][0]) for row in rows]
    plan = [(row["user_key"] in ("u0", "u1"), row["plan"]) for row in users]
    kind = [(row["item_key"] == "i00", row["kind"]) for row in items]
    found = {"device": device, "plan": plan, "kind": kind}
    return {name: ({n for own, n in of if own}, {n for own, n in of if not own}) for name, of in found.items()}


def test_value_of_few_users_is_unknown_even_when_frequent(tmp_path: Path) -> None:
    for name, (own, others) in ids(prepared(tmp_path / "floor", min_users=MIN_USERS)).items():
        assert own == {UNKNOWN} and UNKNOWN not in others, name
    for name, (own, others) in ids(prepared(tmp_path / "none")).items():
        assert UNKNOWN not in own | others, name
    for name, (own, others) in ids(prepared(tmp_path / "two", min_users=2)).items():
        assert UNKNOWN not in own | others, name
    for name, (own, others) in ids(prepared(tmp_path / "all", min_users=7)).items():
        assert own | others == {UNKNOWN}, name
