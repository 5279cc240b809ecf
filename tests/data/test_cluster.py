"""datatrove's executors make the files that one process makes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from preparation import content, small_config

from data import DataConfig
from data.cluster import EXECUTORS, ROOT, Cluster, launch
from data.preparation import prepare


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    return replace(small_config(tmp_path), dir=str(tmp_path / "out"))


@pytest.mark.slow
@pytest.mark.parametrize("tasks", [1, 3])
def test_local_executor(config: DataConfig, tmp_path: Path, tasks: int) -> None:
    pytest.importorskip("datatrove", reason="datatrove, an optional package, is not installed")
    cluster = Cluster("local", tasks, tmp_path / "logs", workers=2, cpus_per_task=1)
    launch(config, cluster)
    alone = prepare(replace(config, dir=str(tmp_path / "alone")))
    assert content(tmp_path / "out") == content(alone)
    launch(config, cluster)  # finished: nothing to do
    assert content(tmp_path / "out") == content(alone)


def test_slurm_executor_is_configured(config: DataConfig, tmp_path: Path) -> None:
    """Built as it would be submitted; there is no Slurm to submit it to."""
    pytest.importorskip("datatrove", reason="datatrove, an optional package, is not installed")
    cluster = Cluster("slurm", 64, tmp_path / "logs", workers=8, cpus_per_task=4, time="2:00:00")
    executor = EXECUTORS["slurm"](cluster, [print], "shares", None)
    script = executor.get_launch_file_contents(executor.get_sbatch_args(64), "srun task")
    for line in (
        "#SBATCH --array=0-63%8", "#SBATCH --cpus-per-task=4", "#SBATCH --partition=cpu",
        "#SBATCH --time=2:00:00", f"#SBATCH --export=ALL,PYTHONPATH={ROOT}", "srun task",
    ):  # fmt: skip
        assert line in script


def test_mistakes(config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="executor pbs: expected one of local, slurm, ray"):
        launch(config, Cluster("pbs", 1, tmp_path))
    monkeypatch.setitem(__import__("sys").modules, "datatrove", None)
    with pytest.raises(ValueError, match="pip install datatrove"):
        launch(config, Cluster("local", 1, tmp_path))
