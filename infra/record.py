"""A stage's record of itself, beside its data:

| file | what |
|---|---|
| `config.yaml` | the resolved section, under its name (written by `infra.stage`) |
| `history.jsonl` | one object per line: `{"step": 10, "loss": 0.3}`; a text in place of a number is a note |
| `summary.json` | the stage's final numbers, nested as the stage wrote them |
"""

import json

CONFIG_FILE = "config.yaml"
HISTORY_FILE = "history.jsonl"
SUMMARY_FILE = "summary.json"


def numbers_of(line: str) -> tuple[int, dict[str, float]]:
    """Return the step and the numbers of one line of the history, without nulls and notes."""
    values = json.loads(line)
    step = values.pop("step")
    return step, {name: value for name, value in values.items() if isinstance(value, int | float)}
