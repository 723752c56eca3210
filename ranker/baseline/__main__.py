"""`python -m ranker.baseline --config FILE --input dataset=DIR --out DIR`: run the baseline stage."""

from sidestack.infra.stage import run_stage
from sidestack.ranker.baseline.config import BaselineConfig
from sidestack.ranker.baseline.stage import run_baseline

if __name__ == "__main__":
    run_stage("baseline", "baseline", BaselineConfig, ["dataset"], run_baseline)
