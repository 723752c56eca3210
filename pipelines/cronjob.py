"""A Kubernetes CronJob that retrains on a schedule, with the pod of a cluster's file: `python -m pipelines.cronjob`.

It prints YAML for `kubectl apply -f -` and sends nothing to the cluster itself.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import yaml

from sidestack.components.pipeline import retrain
from sidestack.infra.clusters.config import load_cluster
from sidestack.infra.clusters.kubernetes import create_scheduler
from sidestack.infra.errors import ConfigError, SidestackError

# A call more than ten minutes late is skipped; without a deadline, 100 missed calls end the schedule.
_DEADLINE_S = 600


def cron_job(
    cluster: str, config: str, schedule: str = "0 * * * *", cpu: int = 2, memory_mb: int = 6144
) -> dict[str, Any]:
    """Return the CronJob.

    Args:
        cluster: name or path of a Kubernetes cluster's file.
        config: the run's YAML file, as a path in the pod.
        schedule: in cron's five fields.
        cpu: cores of the driver; with `run.scheduler` `local_cwd` the stages run on them too.
        memory_mb: its memory, in MB.

    Raises:
        ConfigError: the cluster's file is invalid, or is for another scheduler.
    """
    file = load_cluster(cluster)
    if file.scheduler != "kubernetes":
        raise ConfigError(f"cluster {cluster}: its scheduler is {file.scheduler!r}; a CronJob needs 'kubernetes'")
    app = retrain(config=config, cluster=cluster, cpu=cpu, memMB=memory_mb)
    job = create_scheduler("sidestack").submit_dryrun(app, {}).request.resource
    (task,) = job["spec"]["tasks"]
    pod = task["template"]["spec"]
    (container,) = pod["containers"]
    container["name"] = "retrain"
    container["command"] = ["python", "-m", "sidestack.pipelines.retrain", "--config", config]
    container["env"] = [one for one in container["env"] if not one["name"].startswith("TORCHX_")]
    del container["ports"]
    # The next call resumes what this one did not finish.
    template = {"spec": {"backoffLimit": 0, "template": {"spec": pod}}}
    return {
        "apiVersion": "batch/v1",
        "kind": "CronJob",
        "metadata": {"name": "sidestack-retrain", "namespace": file.scheduler_options["namespace"]},
        "spec": {
            "schedule": schedule,
            "concurrencyPolicy": "Forbid",
            "startingDeadlineSeconds": _DEADLINE_S,
            "jobTemplate": template,
        },
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Print the CronJob as YAML.

    Raises:
        SystemExit: with status 1, after printing a user's error.
    """
    parser = argparse.ArgumentParser(prog="cronjob", description="Print a CronJob that retrains on a schedule.")
    parser.add_argument("--cluster", required=True, help="name or path of the cluster's file")
    parser.add_argument("--config", required=True, help="the run's YAML file, where the pod sees it")
    parser.add_argument("--schedule", default="0 * * * *", help="when, in cron's five fields")
    parser.add_argument("--cpu", type=int, default=2, help="cores; enough for the stages where they run in this pod")
    parser.add_argument("--memory-mb", type=int, default=6144, help="memory, in MB")
    given = parser.parse_args(argv)
    try:
        content = cron_job(given.cluster, given.config, given.schedule, given.cpu, given.memory_mb)
    except SidestackError as error:
        print(f"cronjob: error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    print(yaml.safe_dump(content, sort_keys=False), end="")


if __name__ == "__main__":
    main()
