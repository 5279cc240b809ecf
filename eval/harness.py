"""The tasks of lm-evaluation-harness on a model of this program.

    pip install -r requirements-eval.txt
    python -m eval.harness checkpoint=runs/<date>_<name> fewshot=0,2,5
    python -m eval.harness checkpoint=gpt2 tasks=hellaswag,lambada_openai limit=100
    python -m eval.harness checkpoint=... tasks=mine include_path=my_tasks

`tasks=mars` are the nine of the MARS paper's tables (arXiv 2411.10438): ARC-E, ARC-C, BoolQ,
HellaSwag, OBQA, PIQA, WinoGrande, MMLU, SciQ, there with 0, 2 and 5 examples in front. The model
answers without being exported; its numbers are those of lm_eval's own hf backend on the export.
The data sets come from the hub. Results go to the run's eval.jsonl, and are printed as a table; the
last line is one JSON object.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from data.tokenizer import Tokenizer
from eval.options import run_with_options
from model import GPT2
from runtime.describe import aligned
from runtime.device import Device
from runtime.files import json_safe
from runtime.processes import Processes, join

SUITES = {
    "mars": (
        "arc_easy",
        "arc_challenge",
        "boolq",
        "hellaswag",
        "openbookqa",
        "piqa",
        "winogrande",
        "mmlu",
        "sciq",
    )
}
Metrics = dict[str, dict[str, float]]
BOOTSTRAP = 1000  # resamples for the standard error of a perplexity; lm_eval's 100,000 take minutes
NORMED = ("acc_norm", "acc")  # of a task's metrics, the one that enters the average


def require_lm_eval() -> None:
    """Raise ValueError where lm_eval is not installed."""
    if find_spec("lm_eval") is None:
        raise ValueError(
            "this needs lm-evaluation-harness, which is not installed: "
            "pip install -r requirements-eval.txt"
        )


@contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Without lm_eval's messages below an error; they are many."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def evaluate(
    model: GPT2,
    tokenizer: Tokenizer,
    device: Device,
    tasks: list[Any],
    shots: Sequence[int | None],
    *,
    limit: int | None = None,
    include_path: str | None = None,
    processes: Processes | None = None,
    batch_tokens: int | None = None,
) -> list[Metrics]:
    """For each of ``shots`` (examples in front; None: what the task says) a table of task or group
    -> metric -> value, with `<metric>_stderr` where there is one. All processes take part; those
    that are not first on their machine get empty tables.

    ``tasks`` are lm_eval's names, or its task configurations. Raises ValueError without lm_eval,
    for an unknown task and where a data set cannot be had.
    """
    require_lm_eval()
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from eval.harness_model import HarnessModel

    lm = HarnessModel(model, tokenizer, device, processes, batch_tokens)
    with quiet_lm_eval():
        # reading every task file of lm_eval takes seconds: only names need them
        names = any(isinstance(task, str) for task in tasks)
        manager = TaskManager(include_path=include_path, include_defaults=names)
        for task in tasks:
            if isinstance(task, str) and not manager.match_tasks([task]):
                raise ValueError(
                    f"tasks={task}: lm_eval has no such task; `lm_eval ls tasks` lists them, and "
                    f"include_path= adds a folder of your own"
                )
        try:
            found = [
                simple_evaluate(
                    model=lm,
                    tasks=list(tasks),
                    num_fewshot=count,
                    limit=limit,
                    task_manager=manager,
                    log_samples=False,
                    bootstrap_iters=BOOTSTRAP,
                )
                for count in shots
            ]
        except OSError as error:  # a data set that is not there; the hub's errors are OSErrors
            reason = str(error).splitlines()[0]
            raise ValueError(f"a data set of {tasks} cannot be had: {reason}") from error
    return [{} if results is None else _metrics(results) for results in found]


def _metrics(results: Any) -> Metrics:
    """lm_eval's results without filters' names and what is not a number."""
    found = {}
    for task, values in {**results["results"], **(results.get("groups") or {})}.items():
        numbers = {
            key.partition(",")[0]: value
            for key, value in values.items()
            if "," in key and isinstance(value, int | float)
        }
        found[task] = numbers
    return found


def average(results: Metrics, tasks: list[str]) -> float | None:
    """Mean over the tasks of acc_norm, or of acc where a task has no other; None if one has
    neither. The MARS tables do not say which they hold."""
    values = []
    for task in tasks:
        metric = next((name for name in NORMED if name in results.get(task, {})), None)
        if metric is None:
            return None
        values.append(results[task][metric])
    return sum(values) / len(values)


def table(results: Mapping[int | None, Metrics], tasks: list[str]) -> str:
    """A line per task and metric, a column per number of examples in front."""
    heads = ["task", "metric", *("default" if k is None else f"{k}-shot" for k in results)]
    lines = [heads]
    some = next(iter(results.values()))
    for task in tasks:
        for metric in some.get(task, {}):
            if not metric.endswith("_stderr"):
                cells = [_cell(found.get(task, {}), metric) for found in results.values()]
                lines.append([task, metric, *cells])
    means = [average(found, tasks) for found in results.values()]
    if len(tasks) > 1 and None not in means:
        lines.append(["average", "", *(f"{mean:.4f}" for mean in means)])
    return aligned(lines)


def _cell(values: dict[str, float], metric: str) -> str:
    error = values.get(f"{metric}_stderr")
    spread = "" if error is None else f" +- {error:.4f}"
    return f"{values[metric]:.4f}{spread}"


# ---- command line


@dataclass(frozen=True)
class Options:
    """What to evaluate, and on what."""

    checkpoint: str  # a run, a checkpoint of one, a Hugging Face folder or hub name
    tasks: str = "mars"  # the nine tasks of the MARS tables, or names of lm_eval's with commas
    fewshot: str = "0"  # examples in front of each question, such as 0,2,5; null: as the task says
    limit: int | None = None  # examples per task
    include_path: str | None = None  # a folder of task files of your own
    device: str = "auto"  # cuda, mps or cpu
    precision: str = "fp32"  # or bf16
    batch_tokens: int | None = None  # of a forward pass; null: by the kind of device


def run(options: Options) -> None:
    """Evaluate, add the metrics to the run's eval.jsonl, print them."""
    from eval.checkpoint import append_results, load_model, open_device

    require_lm_eval()
    shots = [_shots(word) for word in options.fewshot.split(",")]
    tasks = list(SUITES.get(options.tasks, options.tasks.split(",")))
    processes = join()
    device = open_device(options.device, options.precision, processes.local_rank)
    model, tokenizer = load_model(options.checkpoint, device.device)
    found = evaluate(
        model,
        tokenizer,
        device,
        tasks,
        shots,
        limit=options.limit,
        include_path=options.include_path,
        processes=processes,
        batch_tokens=options.batch_tokens,
    )
    if processes.first:
        results = dict(zip(shots, found, strict=True))
        values = {
            f"eval/{task}_{metric}" + ("" if count is None else f"_{count}shot"): value
            for count, found in results.items()
            for task, metrics in found.items()
            for metric, value in metrics.items()
        }
        file = append_results(options.checkpoint, {**values, "options": asdict(options)})
        print(table(results, tasks))
        print(f"results in {Path(file)}")
        print(json.dumps(json_safe(values)))
    processes.leave()


def _shots(word: str) -> int | None:
    if word == "null":
        return None
    if not word.isdecimal():
        raise ValueError(f"fewshot={word}: expected numbers, such as 0,2,5, or null")
    return int(word)


if __name__ == "__main__":
    sys.exit(run_with_options(Options, run, __doc__))
