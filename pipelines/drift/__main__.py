"""`python -m pipelines.drift --input now=DIR [--input before=DIR] --input encoder.sid=DIR --out DIR`: run the stage."""

from sidestack.infra.stage import run_stage
from sidestack.pipelines.drift.config import DriftConfig
from sidestack.pipelines.drift.stage import INPUTS, OPTIONAL, drift

if __name__ == "__main__":
    run_stage("drift", "drift", DriftConfig, INPUTS, drift, optional=OPTIONAL)
