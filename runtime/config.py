"""The configuration: a typed schema, and every check that needs no model.

Hydra composes the YAML files and the command line into a tree; this module turns the tree into
dataclasses. Unknown keys and wrong types are refused with the nearest valid name, then the
cross-field checks run, all before anything is built, so that a mistake costs a second, not a queue.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError

from data import DataConfig
from data.corpus import KINDS
from data.documents import DOCUMENTS
from data.order import SAMPLING
from data.sources import SPLIT_RULES
from model import MODELS
from model.init_from import complete
from optim import Schedule, create
from optim.symmetric import WAYS
from runtime.cpu_linear import LINEAR
from runtime.errors import ConfigError
from runtime.parallel import DIVIDE, DTYPES, WRAPPERS, Compile, ParallelConfig


@dataclass
class TrainConfig:
    steps: int
    global_batch: int  # sequences per optimizer update, over all processes
    micro_batch: int | str | None  # sequences per forward pass; None: the whole global batch; auto
    accumulation: str  # mean | sum (the MARS code's convention) over micro-batches
    sum_factor: int | None  # accumulation=sum: micro-batches per process of the run reproduced,
    # so that the number of GPUs does not shape it; None: those of this run
    grad_clip: float | None  # largest global gradient norm; None: no clip
    precision: str  # auto | fp32 | bf16 | fp16
    device: str  # auto | cpu | cuda | cuda:1 | mps
    compile: bool
    compile_mode: str  # torch.compile's, for the model: MODES
    compile_blocks: bool  # one graph for every layer, instead of one for the model
    compile_cache: str | None  # folder of compiled kernels; None: torch's own
    profile: bool  # record a few steps (runtime/profile.py)
    threads: int | None  # CPU threads; None: torch's default
    attention: str  # auto | default | a kernel of ATTENTION
    symmetric: str  # auto | whole | blocks | kernel: the optimizer's products x x^T
    cpu_linear: str  # auto | torch | onednn: who multiplies float32 matrices on a CPU
    eval_every: int  # steps; 0: never
    eval_tokens: int | None  # size of the fixed validation set; None: the whole split
    sample_tokens: int  # length of the text generated at each evaluation; 0: none
    checkpoint_every: int  # steps; 0: never
    keep_checkpoints: int  # the last k; the best one is kept besides
    resume: str  # auto | never | path of a run or a checkpoint

    @property
    def compiling(self) -> Compile | None:
        """How the model is to be compiled."""
        return Compile(self.compile_mode, self.compile_blocks) if self.compile else None


@dataclass
class ScheduleConfig:
    decay_steps: int | None  # where the decay ends; None: train.steps
    warmup_steps: int | None  # None: warmup_fraction of decay_steps
    warmup_fraction: float
    warmup: str
    decay_fraction: float
    decay_shape: str
    final: float


@dataclass
class HellaSwagConfig:
    every: int  # evaluations of the loss between two of HellaSwag; 0: never
    limit: int | None  # the first so many examples; None: all
    data_file: str | None  # its validation rows, .jsonl(.gz|.xz); None: the hub's


@dataclass
class EvalConfig:
    hellaswag: HellaSwagConfig


@dataclass
class LoggingConfig:
    every: int  # steps between lines of metrics.jsonl
    wandb: str  # online | offline | disabled
    wandb_project: str
    tensorboard: bool
    picture: bool  # draw loss.png
    diagnostics: int  # steps between measurements of the optimizer (optim/diagnostics.py); 0: never


@dataclass
class PathsConfig:
    runs: str
    cache: str


@dataclass
class RunConfig:
    name: str
    dir: str | None  # None: <paths.runs>/<date>_<name>


@dataclass
class Config:
    """Everything a run is made of. ``model`` and ``optim`` are open tables, because their keys
    belong to the model and the update rule; `check` holds them to theirs."""

    seed: int
    model: dict[str, Any]
    optim: dict[str, Any]
    data: DataConfig
    schedule: ScheduleConfig
    train: TrainConfig
    eval: EvalConfig
    parallel: ParallelConfig
    logging: LoggingConfig
    paths: PathsConfig
    run: RunConfig


AUTO = "auto"
ATTENTION = (AUTO, "default", "cudnn", "flash", "fa3", "efficient", "math")
GRAPHS = ("reduce-overhead", "max-autotune")  # which replay CUDA graphs
MODES = ("default", "max-autotune-no-cudagraphs", *GRAPHS)
CHOICES = {
    "train.accumulation": ("mean", "sum"),
    "train.precision": ("auto", "fp32", "bf16", "fp16"),
    "train.attention": ATTENTION,
    "train.symmetric": tuple(WAYS),
    "train.cpu_linear": LINEAR,
    "train.compile_mode": MODES,
    "parallel.strategy": tuple(WRAPPERS),
    "parallel.divide": DIVIDE,
    "parallel.param_dtype": tuple(DTYPES),
    "parallel.reduce_dtype": tuple(DTYPES),
    "logging.wandb": ("online", "offline", "disabled"),
    "data.source": KINDS,
    "data.documents": tuple(DOCUMENTS),
    "data.split_by": tuple(SPLIT_RULES),
    "data.sampling": tuple(SAMPLING),
}
POSITIVE = [
    *("train.steps", "train.global_batch", "train.grad_clip"),
    *("train.threads", "train.eval_tokens", "train.keep_checkpoints", "train.sum_factor"),
    *("logging.every",),
    *("data.shard_tokens", "data.prefetch", "data.processes", "data.threads"),
    *("schedule.decay_steps", "eval.hellaswag.limit"),
    *("parallel.timeout", "parallel.shards", "parallel.bucket_mb"),
]
NOT_NEGATIVE = [
    *("train.eval_every", "train.checkpoint_every", "train.sample_tokens", "logging.diagnostics"),
    *("eval.hellaswag.every",),
    *("schedule.warmup_steps", "schedule.warmup_fraction"),
    *("parallel.check_every", "parallel.prefetch"),
]


def load(tree: DictConfig) -> Config:
    """The typed, checked configuration of a composed tree. Raises ConfigError."""
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), tree))
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from None
    assert isinstance(config, Config)
    try:
        config.model = complete(config.model, config.model["init_from"])
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from None
    check(config)
    return config


def explain(error: OmegaConfBaseException) -> str:
    """One line for an error of composition or typing, with the nearest valid name."""
    key = str(error.full_key or error.key)
    if isinstance(error, ConfigKeyError | ValidationError) and error.parent_node is not None:
        name = key.rpartition(".")[2]
        valid = [str(k) for k in error.parent_node]
        if name not in valid:
            return unknown(key, name, valid)
    text = str(error).splitlines()[0]
    if "is not a ListConfig" in text:
        return f"{key} takes a list: write '{key}=[...]', also around a single value"
    return f"{key}: {text[0].lower()}{text[1:]}"


def unknown(key: str, name: str, valid: list[str]) -> str:
    """The line for a key that does not exist."""
    if near := nearest(name, valid):
        return f"unknown configuration key {key}: did you mean {key.removesuffix(name)}{near}?"
    return f"unknown configuration key {key}: valid names are {', '.join(sorted(valid))}"


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name that was probably meant, if any is near."""
    return next(iter(difflib.get_close_matches(name, list(valid), n=1)), None)


def check(config: Config) -> None:
    """Cross-field checks. Raises ConfigError for the first that fails."""
    for key, valid in CHOICES.items():
        if (given := _get(config, key)) not in valid:
            near = nearest(str(given), valid)
            hint = f"did you mean {near}?" if near else f"expected one of {', '.join(valid)}"
            raise ConfigError(f"{key} is {given!r}: {hint}")
    for key in POSITIVE:
        if (value := _get(config, key)) is not None and not value > 0:
            raise ConfigError(f"{key} must be positive, given {value}")
    for key in NOT_NEGATIVE:
        if (value := _get(config, key)) is not None and not value >= 0:
            raise ConfigError(f"{key} must not be negative, given {value}")
    if not 0 < config.data.val_fraction < 1:
        raise ConfigError(f"data.val_fraction must be in (0, 1), given {config.data.val_fraction}")
    if not 0 <= config.seed < 2**63:
        raise ConfigError(f"seed must be in [0, 2^63), given {config.seed}")
    if config.parallel.strategy == "ddp" and config.train.compile and config.parallel.bucket_mb < 1:
        raise ConfigError(  # else an AssertionError of dynamo's at the first step
            f"parallel.bucket_mb={config.parallel.bucket_mb:g} with train.compile=true: torch "
            f"compiles for messages of 1 or more"
        )
    accumulation(config.train)
    if config.train.micro_batch == AUTO and _cut_shapes_result(config.train):
        raise ConfigError(
            "train.micro_batch=auto with train.accumulation=sum: the sum depends on the number of "
            "micro-batches, so set train.sum_factor or give a number"
        )
    try:
        shape = model_config(config, vocab_size=2)
        schedule(config)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if config.train.eval_tokens is not None and config.train.eval_tokens < shape.context:
        raise ConfigError(
            f"train.eval_tokens={config.train.eval_tokens} holds no sequence of model.context="
            f"{shape.context}: raise the one or lower the other"
        )
    try:
        groups = create.resolve(**config.optim)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"optim: {error}") from None
    update = config.train.global_batch * shape.context
    for tokens in {group["hyper"].get("tokens", update) for group in groups.values()}:
        if tokens != update:  # Sophia's curvature is estimated per update
            raise ConfigError(
                f"optim.tokens={tokens}, but an update has train.global_batch * model.context = "
                f"{update} tokens: set optim.tokens={update}"
            )


def accumulation(train: TrainConfig, world_size: int = 1) -> int:
    """Micro-batches per update and process (one for auto, until it is settled), or ConfigError
    where the global batch does not divide into micro-batches for ``world_size`` processes."""
    share, rest = divmod(train.global_batch, world_size)
    if rest:
        raise ConfigError(
            f"train.global_batch={train.global_batch} does not divide among {world_size} "
            f"processes: use a multiple of {world_size}"
        )
    micro = share if train.micro_batch in (None, AUTO) else train.micro_batch
    if not isinstance(micro, int) or micro < 1:
        raise ConfigError(
            f"train.micro_batch is {micro!r}: expected a positive number of sequences, auto or null"
        )
    if share % micro:
        fits = [d for d in range(1, share + 1) if share % d == 0]
        near = min(fits, key=lambda d: abs(d - micro))
        among = "" if world_size == 1 else f" on each of {world_size} processes"
        raise ConfigError(
            f"train.global_batch={train.global_batch} is not a multiple of train.micro_batch="
            f"{micro}{among}: use a divisor, such as train.micro_batch={near}"
        )
    return share // micro


def _cut_shapes_result(train: TrainConfig) -> bool:
    return train.accumulation == "sum" and train.sum_factor is None


def gradient_scale(train: TrainConfig, world_size: int = 1) -> float:
    """The gradient as a multiple of the mean over the global batch: 1, or with accumulation=sum the
    number of micro-batches that a process adds up."""
    count = train.sum_factor or accumulation(train, world_size)
    return {"mean": 1.0, "sum": float(count)}[train.accumulation]


def model_config(config: Config, vocab_size: int) -> Any:
    """The model's own typed config; ``vocab_size`` (the tokenizer's) fills a null."""
    settings = dict(config.model)
    name = settings.pop("name")
    settings.pop("init_from")
    if name not in MODELS:
        raise ConfigError(f"model.name is {name!r}: expected one of {', '.join(MODELS)}")
    cls = MODELS[name].config
    valid = [f.name for f in fields(cls)]
    for key in settings:
        if key not in valid:
            raise ConfigError(unknown(f"model.{key}", key, valid))
    if settings.get("vocab_size") is None:
        settings["vocab_size"] = vocab_size
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), settings))
    except OmegaConfBaseException as error:
        raise ConfigError(f"model.{explain(error)}") from None


def schedule(config: Config) -> Schedule:
    s, steps = config.schedule, config.schedule.decay_steps or config.train.steps
    warmup = math.ceil(s.warmup_fraction * steps) if s.warmup_steps is None else s.warmup_steps
    return Schedule(steps, warmup, s.warmup, s.decay_fraction, s.decay_shape, s.final)


# Keys that may differ between a run and its continuation: they do not shape the trajectory, or only
# its rounding (micro_batch, threads, compile); KEPT: those among them that do.
KEPT = ("parallel.param_dtype", "parallel.reduce_dtype")
FREE = (
    *("run", "paths", "logging", "parallel", "eval", "data.dir", "data.cache", "data.prefetch"),
    *("data.worker", "data.processes", "data.threads", "data.check"),
    *("train.micro_batch", "train.threads", "train.compile", "train.device", "train.resume"),
    *("train.compile_mode", "train.compile_blocks", "train.compile_cache", "train.profile"),
    *("train.cpu_linear",),
    *("model.loss_chunks", "model.loss_kernel", "train.attention", "train.symmetric"),
    *("train.checkpoint_every", "train.keep_checkpoints"),
    *("train.eval_every", "train.eval_tokens", "train.sample_tokens"),
)


def trajectory(config: Config) -> dict[str, Any]:
    """The flat table of settings that decide the weights: equal tables, equal runs."""
    flat = flatten(asdict(config))
    free = tuple(f"{key}." for key in FREE)
    return {
        key: value for key, value in flat.items() if key in KEPT or not _plain(key).startswith(free)
    }


def _plain(key: str) -> str:
    """data.mixture.web.dir is as free as data.dir."""
    return re.sub(r"^data\.mixture\.[^.]+\.", "data.", f"{key}.")


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts -> "a.b.c": leaf; lists and tuples are leaves."""
    if not isinstance(tree, dict):
        return {prefix[:-1]: list(tree) if isinstance(tree, tuple) else tree}
    return {k: v for key, sub in tree.items() for k, v in flatten(sub, f"{prefix}{key}.").items()}


def _get(config: Config, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value
