"""Retraining as an Airflow DAG, for 2.10 and 3: set the paths and copy it into the DAGs folder."""

from datetime import UTC, datetime

from airflow import DAG
from airflow.providers.standard.operators.bash import BashOperator

with DAG(
    dag_id="sidestack_retrain",
    schedule="@hourly",
    start_date=datetime(2026, 1, 1, tzinfo=UTC),
    catchup=False,
    max_active_runs=1,
):
    BashOperator(
        task_id="retrain",
        bash_command=".venv/bin/python -m sidestack.pipelines.retrain --config /shared/retrain.yaml",
        cwd="/opt/sidestack",
        env={"MLFLOW_TRACKING_URI": "http://mlflow.example.com:5000"},
        append_env=True,
        retries=0,  # the next hour's call resumes
    )
