"""`python -m pipelines.prepare --config FILE --out DIR`: run the prepare stage."""

from sidestack.infra.stage import run_stage
from sidestack.pipelines.prepare.config import PrepareConfig
from sidestack.pipelines.prepare.stage import prepare

if __name__ == "__main__":
    run_stage("prepare", "prepare", PrepareConfig, (), prepare)
