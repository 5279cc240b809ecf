"""environment.json: on what, with what and from which source a run was made.

A curve that cannot be traced to a commit, a library version and a machine cannot be argued about.
This writes them down once per run, in a fraction of a second and without importing anything that
the run does not use. Secrets stay out: environment variables are taken by a short list of
prefixes, and a name that smells of a key or a token is skipped even then.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "numpy", "transformers", "datasets", "tiktoken", "wandb", "hydra-core", "safetensors",
)  # fmt: skip

VARIABLES = (
    "CUBLAS_", "CUDA_", "CUDNN_", "GLOO_", "HIP_", "KMP_", "LOCAL_WORLD_SIZE", "MKL_", "NCCL_",
    "NVIDIA_", "OMP_", "PYTHONHASHSEED", "PYTORCH_", "ROCR_", "SLURM_GPUS", "SLURM_JOB_ID",
    "SLURM_JOB_NUM_NODES", "SLURM_NTASKS", "TORCH", "TRITON_", "WORLD_SIZE",
)  # fmt: skip
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASS|CRED|AUTH|JWT|COOKIE")
SECRET_ARGUMENT = re.compile(r"(\S*(?:key|token|secret|password))=\S+", re.IGNORECASE)


def environment() -> dict[str, Any]:
    """A JSON-ready description of this process's hardware, software, source and settings."""
    return {
        "date_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(SECRET_ARGUMENT.sub(r"\1=***", word) for word in sys.orig_argv),
        "git": _git(),
        "platform": platform.platform(),
        "cpu": {"model": _cpu_model(), "cores": os.cpu_count()},
        "python": platform.python_version(),
        "torch": {
            "version": torch.__version__,
            "threads": torch.get_num_threads(),
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "cudnn": torch.backends.cudnn.version(),
            "gpus": [
                torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
            ],
        },
        "packages": {name: _version(name) for name in PACKAGES},
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(VARIABLES) and not SECRET.search(name)
        },
    }


def _git() -> dict[str, Any] | None:
    """Commit of the source tree, and whether tracked files differ from it (None: too slow to say).

    None without git, without a repository, and if the sources merely lie inside somebody else's.
    """
    root = Path(__file__).resolve().parent.parent
    answer = _run_git(root, ["rev-parse", "--show-toplevel", "HEAD"])
    if answer is None or len(answer.splitlines()) != 2:
        return None
    toplevel, commit = answer.splitlines()
    if Path(toplevel).resolve() != root:
        return None
    changes = _run_git(root, ["status", "--porcelain", "--untracked-files=no"])
    return {"commit": commit, "dirty": None if changes is None else changes != ""}


def _run_git(directory: Path, arguments: Sequence[str]) -> str | None:
    try:
        result = subprocess.run(
            ["git", "-C", str(directory), *arguments],
            capture_output=True, text=True, timeout=1.0, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")  # Linux; elsewhere Python's own, shorter answer
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
