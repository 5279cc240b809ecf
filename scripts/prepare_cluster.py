"""Prepare a corpus with many machines, through datatrove's executors (pip install datatrove).

    python -m scripts.prepare_cluster --executor local --tasks 4 data=text 'data.files=[corpus/]'
    python -m scripts.prepare_cluster --executor slurm --tasks 64 --partition cpu \\
        data=fineweb_edu data.subset=sample-100BT data.dir=/shared/fineweb_edu_100BT
    python -m scripts.prepare_cluster --executor ray --tasks 64 data=c4 data.dir=/shared/c4

Every task is one `data.worker=i/n`; the last step joins their work.  The files are the same for any
number of tasks.  A source has no more shares than pieces (files of a data set on the hub, stretches
of some 128 MB of local text): tasks beyond that find nothing to do.  Started again, it goes on
where it stopped.  A job array without datatrove does as well:

    #SBATCH --array=1-64 --cpus-per-task=8
    python -m data.prepare data=fineweb data.dir=/shared/fineweb data.threads=8 \\
        data.worker=$SLURM_ARRAY_TASK_ID/64

Where the shared file system has no locks (flock), `python -m data.prepare merge data=...` follows
when all of them are done.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from data.cluster import EXECUTORS, Cluster, launch
from data.compose import compose_data


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--executor", choices=sorted(EXECUTORS), required=True)
    parser.add_argument("--tasks", type=int, required=True, help="shares of the work")
    parser.add_argument("--workers", type=int, default=-1, help="tasks at a time; -1: all")
    parser.add_argument("--logs", type=Path, default=Path("logs/prepare"))
    parser.add_argument("--cpus-per-task", type=int, default=8)
    parser.add_argument("--memory-per-cpu-gb", type=int, default=2)
    parser.add_argument("--time", default="12:00:00", help="Slurm's limit for a task")
    parser.add_argument("--partition", default="cpu", help="Slurm's partition")
    parser.add_argument("--venv", help="path of bin/activate on the nodes (Slurm)")
    parser.add_argument("overrides", nargs="*", help="data=... data.dir=...")
    args = vars(parser.parse_args())
    try:
        launch(compose_data(args.pop("overrides")), Cluster(**args))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
