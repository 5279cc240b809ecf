"""The preparation as two datatrove pipelines: shares of the work, then one task that joins them.

The tasks are those of `data.worker=i/n`, with the same files as the result for any number of them;
datatrove starts them, on this machine, as a Slurm job array or on a Ray cluster.  All of them must
see `data.dir` (or `data.cache`) under one path.  Nothing is skipped on datatrove's word: what is
done stands in the journals beside the data.

Needs `pip install datatrove` (and `ray`, for that executor).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from data import DataConfig
from data.preparation import merge, prepare_share

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Cluster:
    """Where the tasks run; all but the first three are Slurm's or Ray's own terms."""

    executor: str  # a name in EXECUTORS
    tasks: int  # shares of the work
    logs: Path  # datatrove's logs
    workers: int = -1  # tasks at a time; -1: all
    cpus_per_task: int = 8
    memory_per_cpu_gb: int = 2
    time: str = "12:00:00"
    partition: str = "cpu"
    venv: str | None = None  # path of the environment's bin/activate, on the nodes


def run_share(config: DataConfig, data: object, rank: int, world_size: int) -> None:
    """One task of datatrove's: the share with its rank."""
    prepare_share(replace(config, worker=f"{rank + 1}/{world_size}"))


def run_merge(config: DataConfig, data: object, rank: int, world_size: int) -> None:
    """The last task: joins the shares, unless the last of them did so already."""
    merge(config)


def launch(config: DataConfig, cluster: Cluster) -> None:
    """Start the shares and the join; returns when they are done (local, Ray) or queued (Slurm).

    Raises ValueError without datatrove or for an unknown executor.
    """
    if cluster.executor not in EXECUTORS:
        raise ValueError(f"executor {cluster.executor}: expected one of {', '.join(EXECUTORS)}")
    try:
        import datatrove  # noqa: F401
    except ImportError as error:
        raise ValueError("datatrove is not installed: pip install datatrove") from error
    if config.threads is None:
        config = replace(config, threads=cluster.cpus_per_task)
    # Absolute, because tasks start in other folders.
    config = replace(config, cache=str(Path(config.cache).expanduser().absolute()))
    if config.dir:
        config = replace(config, dir=str(Path(config.dir).expanduser().absolute()))
    create = EXECUTORS[cluster.executor]
    shares = create(cluster, [partial(run_share, config)], "shares", None)
    create(replace(cluster, tasks=1), [partial(run_merge, config)], "merge", shares).run()


def _local(cluster: Cluster, pipeline: list[Any], name: str, depends: Any) -> Any:
    from datatrove.executor import LocalPipelineExecutor

    return LocalPipelineExecutor(
        pipeline=pipeline,
        tasks=cluster.tasks,
        workers=cluster.workers,
        logging_dir=str(cluster.logs / name),
        depends=depends,
        skip_completed=False,
    )


def _slurm(cluster: Cluster, pipeline: list[Any], name: str, depends: Any) -> Any:
    from datatrove.executor import SlurmPipelineExecutor

    return SlurmPipelineExecutor(
        pipeline=pipeline,
        tasks=cluster.tasks,
        workers=cluster.workers,
        time=cluster.time,
        partition=cluster.partition,
        cpus_per_task=cluster.cpus_per_task,
        mem_per_cpu_gb=cluster.memory_per_cpu_gb,
        job_name=f"prepare_{name}",
        venv_path=cluster.venv,
        # The tasks unpickle functions of this repository.
        sbatch_args={"export": f"ALL,PYTHONPATH={_python_path()}"},
        logging_dir=str(cluster.logs / name),
        depends=depends,
        skip_completed=False,
    )


def _ray(cluster: Cluster, pipeline: list[Any], name: str, depends: Any) -> Any:
    from datatrove.executor import RayPipelineExecutor

    return RayPipelineExecutor(
        pipeline=pipeline,
        tasks=cluster.tasks,
        workers=cluster.workers,
        cpus_per_task=cluster.cpus_per_task,
        mem_per_cpu_gb=cluster.memory_per_cpu_gb,
        ray_remote_kwargs={"runtime_env": {"env_vars": {"PYTHONPATH": _python_path()}}},
        logging_dir=str(cluster.logs / name),
        depends=depends,
        skip_completed=False,
    )


def _python_path() -> str:
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


EXECUTORS: dict[str, Callable[[Cluster, list[Any], str, Any], Any]] = {
    "local": _local,
    "slurm": _slurm,
    "ray": _ray,
}
