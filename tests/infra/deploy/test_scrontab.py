"""The tests' scrontab parser accepts valid lines and refuses others."""

import pytest

from tests.infra.deploy.scrontab import Entry, parse_scrontab


def test_options_belong_to_the_entry_below_them() -> None:
    text = "DIR=/home\n# note\n#SCRON --mem=4G\n#SCRON --time=1:00\n1-5,30 8-17/2 * * 3 $DIR/a b\n\n*/5 * * * * c\n"
    assert parse_scrontab(text) == [
        Entry(("1-5,30", "8-17/2", "*", "*", "3"), "$DIR/a b", {"--mem": "4G", "--time": "1:00"}),
        Entry(("*/5", "*", "*", "*", "*"), "c"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("60 * * * * a", "line 1: '60' is no minute"),
        ("0 5-3 * * * a", "line 1: '5-3' is no hour"),
        ("0 * 0 * * a", "line 1: '0' is no day of month"),
        ("0 * * * */0 a", r"line 1: '\*/0' is no day of week"),
        ("0 * * *", "line 1: an entry has five fields and a command"),
        ("#SCRON --memory=4G\n0 * * * * a", "line 1: not options of sbatch"),
        ("#SCRON --mem=\n0 * * * * a", "line 1: not options of sbatch"),
        ("0 * * * * a\n#SCRON --mem=4G", "options without an entry"),
    ],
)
def test_invalid_line_is_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_scrontab(text)
