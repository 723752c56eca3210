"""What a stage leaves about itself, beside its data:

| file | what |
|---|---|
| `config.yaml` | the resolved section, under its name (written by `infra.stage`) |
| `history.jsonl` | one object a line: `{"step": 10, "loss": 0.3}` |
| `summary.json` | the stage's closing numbers, nested as the stage wrote them |
"""

CONFIG_FILE = "config.yaml"
HISTORY_FILE = "history.jsonl"
SUMMARY_FILE = "summary.json"
