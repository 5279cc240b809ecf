"""Presets are the runs that they name: batch, tokens, parameters and settings of the papers; each
one composes, cuts its batch for any number of GPUs, and trains."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from system import Command, here

from model import MODELS
from optim import list_optimizers
from optim.create import resolve
from runtime.config import Config, ConfigError, accumulation, gradient_scale, model_config, schedule
from scripts.compose import CONFIGS
from scripts.document_presets import PAGE, config_of, document, presets

GPT2_VOCAB = 50257
PRESETS = presets()
PAPERS = [name for name in PRESETS if not name.startswith("clean/")]
# One of each base and each optimizer trains by default, the rest with -m slow.
SAMPLE = [
    *("mars/small_mars_adamw_exact", "mars/medium_muon", "mars/large_mars_lion"),
    *("mars/fineweb_xl_adamw", "mars_m/fineweb_small_mars_m", "mars_m/large_moonlight"),
    *("nanogpt/small_adamw", "modded/small_soap", "modded/small_shampoo"),
    *("clean/small_schedule_free_adamw", "clean/medium_ademamix", "clean/large_sophia_g"),
]

# ---- what the papers say -------------------------------------------------------------------------

# papers.md section 1.1: total and without the positions, from the code, vocabulary 50304, no biases
PARAMETERS = {
    "small": (124_373_760, 123_587_328),
    "medium": (354_599_936, 353_551_360),
    "large": (773_582_080, 772_271_360),
    "xl": (1_556_840_000, 1_555_201_600),
}
# OpenAI's released models, with biases, vocabulary 50257
RELEASED = {"small": 124_439_808, "medium": 354_823_168, "large": 774_030_080}

# lr, min_lr, weight decay of the matrices. AGI-Arena/MARS config/train_gpt2_*.py; MARS-M: README
MARS = {
    "mars/small_adamw": (6e-4, 3e-5, 0.1),
    "mars/medium_adamw": (3e-4, 6e-5, 0.1),
    "mars/large_adamw": (2e-4, 1e-5, 0.1),
    "mars/small_muon": (2e-2, 3e-5, 0.0),
    "mars/medium_muon": (1e-2, 6e-5, 0.0),
    "mars/large_muon": (6.67e-3, 1e-5, 0.0),
    "mars/small_mars_adamw": (6e-3, 3e-5, 0.01),
    "mars/medium_mars_adamw": (3e-3, 6e-5, 0.01),
    "mars/large_mars_adamw": (2e-3, 1e-5, 0.01),
    "mars/small_mars_adamw_exact": (6e-3, 3e-5, 0.01),
    "mars/medium_mars_adamw_exact": (3e-3, 6e-5, 0.01),
    "mars/large_mars_adamw_exact": (2e-3, 1e-5, 0.01),
    "mars/fineweb_small_adamw": (6e-4, 3e-5, 0.1),
    "mars/fineweb_small_mars_adamw": (6e-3, 3e-5, 0.01),
    "mars/fineweb_xl_adamw": (2e-4, 1e-5, 0.1),
    "mars/fineweb_xl_mars_adamw": (2e-3, 1e-5, 0.01),
    "mars_m/small_moonlight": (6e-3, 3e-5, 0.1),
    "mars_m/medium_moonlight": (5e-3, 6e-5, 0.1),
    "mars_m/large_moonlight": (5e-3, 1e-5, 0.1),
    "mars_m/small_mars_m": (6e-3, 3e-5, 0.01),
    "mars_m/medium_mars_m": (5e-3, 6e-5, 0.01),
    "mars_m/large_mars_m": (5e-3, 1e-5, 0.01),
    "mars_m/fineweb_small_moonlight": (1e-2, 3e-5, 0.1),
    "mars_m/fineweb_medium_moonlight": (5e-3, 6e-5, 0.1),
    "mars_m/fineweb_large_moonlight": (5e-3, 1e-5, 0.1),
    "mars_m/fineweb_xl_moonlight": (3e-3, 1e-5, 0.1),
    "mars_m/fineweb_small_mars_m": (1e-2, 3e-5, 0.01),
    "mars_m/fineweb_medium_mars_m": (5e-3, 6e-5, 0.01),
    "mars_m/fineweb_large_mars_m": (5e-3, 1e-5, 0.01),
    "mars_m/fineweb_xl_mars_m": (3e-3, 1e-5, 0.01),
}
# papers.md sections 1.1 and 1.3: results, but no settings
UNSTATED = {
    *("mars/large_lion", "mars/large_mars_lion"),
    *("mars/fineweb_small_muon", "mars/fineweb_xl_muon"),
}
# rule, lr and weight decay by role, where the code differs from what one would expect (section 1.2)
ROUTING = {
    "mars/small_adamw": {
        "matrix": ("adamw", 6e-4, 0.1),
        "embedding": ("adamw", 6e-4, 0.0),
        "vector": ("adamw", 6e-4, 0.0),
    },
    "mars/medium_muon": {
        "matrix": ("muon", 1e-2, 0.0),
        "embedding": ("muon", 1e-2, 0.0),
        "vector": ("adamw", 1.5e-3, 0.1),
    },
    "mars/large_mars_adamw": {
        "matrix": ("adamw", 2e-3, 0.01),
        "embedding": ("adamw", 2e-3, 0.0),
        "vector": ("adamw", 1e-3, 0.1),
    },
    "mars_m/small_mars_m": {
        "matrix": ("muon", 6e-3, 0.01),
        "embedding": ("adamw", 6e-3, 0.01),
        "vector": ("adamw", 6e-3, 0.01),
    },
    "nanogpt/small_adamw": {
        "matrix": ("adamw", 6e-4, 0.1),
        "embedding": ("adamw", 6e-4, 0.1),
        "vector": ("adamw", 6e-4, 0.0),
    },
    "modded/small_muon": {
        "matrix": ("muon", 0.02, 0.0),
        "embedding": ("adamw", 3.6e-3, 0.0),
        "vector": ("adamw", 3.6e-3, 0.0),
    },
    "modded/small_adamw": {
        "matrix": ("adamw", 1.8e-3, 0.0),
        "embedding": ("adamw", 3.6e-3, 0.0),
        "vector": ("adamw", 3.6e-3, 0.0),
    },
}


def size_of(name: str) -> str:
    found = re.search(r"small|medium|large|xl", name)
    assert found is not None
    return found.group()


def parameters(config: Config) -> int:
    with torch.device("meta"):
        shape = model_config(config, GPT2_VOCAB)
        model = MODELS[config.model["name"]].network(shape)
    return sum(p.numel() for p in model.parameters())


def test_every_run_of_the_papers_is_there() -> None:
    sizes = ("small", "medium", "large")
    mars = {
        f"mars/{s}_{o}" for s in sizes for o in ("adamw", "muon", "mars_adamw", "mars_adamw_exact")
    }
    mars |= {f"mars/fineweb_{s}_{o}" for s in ("small", "xl") for o in ("adamw", "muon")}
    mars |= {f"mars/fineweb_{s}_mars_adamw" for s in ("small", "xl")}
    mars |= {f"mars_m/{s}_{o}" for s in sizes for o in ("moonlight", "mars_m")}
    mars |= {f"mars_m/fineweb_{s}_{o}" for s in ("small", "xl") for o in ("moonlight", "mars_m")}
    modded = {f"modded/small_{o}" for o in ("adamw", "muon", "shampoo", "soap")}
    wanted = mars | modded | UNSTATED | {"nanogpt/small_adamw"}
    assert wanted <= set(PRESETS)
    assert mars - UNSTATED <= set(MARS)


@pytest.mark.parametrize("name", [n for n in PAPERS if n.startswith("mars")])
def test_batch_tokens_and_schedule_of_mars(name: str) -> None:
    config = config_of(name)
    train = config.train
    assert train.global_batch * config.model["context"] == 491_520  # section 1.1
    assert train.steps * 491_520 == 49_152_000_000  # 49.15B
    micro, count = (5, 12) if size_of(name) in ("large", "xl") else (15, 4)
    assert (train.micro_batch, accumulation(train, 8)) == (micro, count)
    assert train.eval_tokens == 200 * micro * 1024  # section 1.2, 11
    assert {n: gradient_scale(train, n) for n in (1, 8, 16)} == dict.fromkeys((1, 8, 16), count)
    assert (config.seed, train.grad_clip, config.model["dropout"]) == (5000, 1.0, 0.0)
    assert config.data.sampling == "random_crops"
    assert config.model["scale_attn_by_inverse_layer_idx"]
    lr = schedule(config)
    assert (lr(0), lr(1000), lr(2000)) == (0.0, 0.5, 1.0)
    assert config.data.name is not None
    assert ("fineweb-edu" in config.data.name) == ("fineweb" in name)


@pytest.mark.parametrize("name", MARS)
def test_settings_of_mars(name: str) -> None:
    config, (lr, min_lr, weight_decay) = config_of(name), MARS[name]
    optim = config.optim
    assert (optim["lr"], optim["weight_decay"]) == (lr, weight_decay)
    assert schedule(config)(100_000) * lr == pytest.approx(min_lr, rel=1e-5)
    if optim["correction"] == "mars":
        assert optim["mars"] == {"gamma": 0.025, "clip": 1.0, "exact": name.endswith("_exact")}
    if optim["rule"] == "muon":
        nesterov = optim["name"] != "mars_m"
        scale = "original" if optim["name"] == "muon" else "match_rms_adamw"
        assert (optim["momentum"], optim["nesterov"], optim["scale"]) == (0.95, nesterov, scale)
        assert (optim["ns_steps"], optim["eps"]) == (5, 1e-7)
    elif optim["name"] != "mars_lion":
        mars = optim["correction"] == "mars"
        assert optim["betas"] == ([0.95, 0.99] if mars else [0.9, 0.95])


@pytest.mark.parametrize("name", ROUTING)
def test_who_gets_which_rule(name: str) -> None:
    optim = dict(config_of(name).optim)
    found = {}
    for group in resolve(**optim).values():
        for role in group["match"]:
            found[role] = (group["rule"], pytest.approx(group["lr"]), group["weight_decay"])
    assert {role: found[role] for role in ROUTING[name]} == ROUTING[name]


def test_nanogpt() -> None:
    """papers.md gives no section; karpathy/nanoGPT config/train_gpt2.py."""
    config = config_of("nanogpt/small_adamw")
    train, lr = config.train, schedule(config)
    assert train.global_batch * 1024 == 491_520
    assert train.steps * 491_520 == 294_912_000_000
    assert (train.micro_batch, accumulation(train, 8)) == (12, 5)
    assert config.optim["lr"] * lr(600_000) == pytest.approx(6e-5)
    assert lr(0) == pytest.approx(1 / 2001)
    assert gradient_scale(train, 8) == 1.0


@pytest.mark.parametrize("name", [n for n in PAPERS if n.startswith("modded/")])
def test_modded_nanogpt(name: str) -> None:
    config = config_of(name)  # papers.md section 5
    train, lr = config.train, schedule(config)
    assert train.global_batch * 1024 == 524_288
    assert train.steps * 524_288 == 2_673_868_800  # 2.67B
    assert config.model["n_embd"] // config.model["n_head"] == 128
    assert (lr(3650), lr(5100)) == (1.0, 0.0)
    assert lr(3650 + 145) == pytest.approx(0.9)
    assert lr.warmup_steps == (0 if name.endswith("muon") else 250)
    assert (config.optim["weight_decay"], train.grad_clip) == (0.0, None)


@pytest.mark.parametrize("name", ["mars/small_adamw", "mars/medium_muon", "mars/large_lion"])
def test_parameter_counts_of_mars(name: str) -> None:
    config = config_of(name)
    total, without_positions = PARAMETERS[size_of(name)]
    assert parameters(config) == total
    assert total - config.model["context"] * config.model["n_embd"] == without_positions


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_counts(name: str) -> None:
    """Of each preset by arithmetic: layers, width, and the switches that add parameters."""
    config, size = config_of(name), size_of(name)
    m, spare = config.model, 50304 - GPT2_VOCAB
    d, matrices = m["n_embd"], 12 * m["n_layer"] * m["n_embd"] ** 2
    biases = m["n_layer"] * 9 * d + (2 * m["n_layer"] + 1) * d if m["bias"] else 0
    total = matrices + (2 * m["n_layer"] + 1) * d + biases + (50304 + m["context"]) * d
    expected = RELEASED[size] + spare * d if m["bias"] else PARAMETERS[size][0]
    assert total == expected


@pytest.mark.parametrize("name", PRESETS)
def test_the_batch_divides_for_1_8_and_16_gpus(name: str) -> None:
    train = config_of(name).train
    micro = 15 if name == "nanogpt/small_adamw" else train.micro_batch  # its header says so
    train = OmegaConf.to_object(
        OmegaConf.merge(OmegaConf.structured(train), {"micro_batch": micro})
    )  # type: ignore[assignment]
    for gpus in (1, 8, 16):
        assert accumulation(train, gpus) * micro * gpus == train.global_batch
        assert gradient_scale(train, gpus) == gradient_scale(train, 8)


def test_a_batch_that_does_not_divide_is_refused() -> None:
    train = config_of("nanogpt/small_adamw").train
    with pytest.raises(ConfigError, match=r"on each of 16 processes: .*micro_batch=10"):
        accumulation(train, 16)
    with pytest.raises(ConfigError, match="does not divide among 7 processes"):
        accumulation(train, 7)


def test_what_no_source_states_is_marked() -> None:
    for name in PAPERS:
        text = (CONFIGS / "experiment" / f"{name}.yaml").read_text()
        assert ("NOT STATED by any source" in text) == (name in UNSTATED)


# ---- the clean comparison ------------------------------------------------------------------------

SAME = ("seed", "data", "schedule", "train", "parallel")


@pytest.mark.parametrize("size", ["small", "medium", "large"])
def test_clean_runs_of_a_size_differ_in_the_optimizer_alone(size: str) -> None:
    names = [name for name in PRESETS if name.startswith(f"clean/{size}_")]
    assert {name.removeprefix(f"clean/{size}_") for name in names} <= set(list_optimizers())
    reference = config_of(f"clean/{size}_adamw")
    for name in names:
        config = config_of(name)
        assert config.model == reference.model
        for part in SAME:
            if part == "schedule" and name.endswith("schedule_free_adamw"):
                continue  # its average takes the schedule's place
            assert getattr(config, part) == getattr(reference, part), (name, part)


def test_clean_runs_have_none_of_the_switches_of_paper_mode() -> None:
    for name in PRESETS:
        if name.startswith("clean/"):
            config = config_of(name)
            assert config.train.accumulation == "mean" and config.train.sum_factor is None
            assert config.data.sampling == "shuffled"
            assert config.model["mask_padding"] and config.model["bias"]
            assert not config.model["scale_attn_by_inverse_layer_idx"]
            assert not config.model["exact_gelu"]


def test_every_number_of_a_clean_run_has_its_source() -> None:
    for file in sorted((CONFIGS / "experiment" / "clean").glob("[a-z]*.yaml")):
        for line in file.read_text().splitlines():
            if re.match(r"  (lr|weight_decay):", line):
                assert "#" in line, f"{file.name}: {line}"


# ---- they run ------------------------------------------------------------------------------------

# What makes any preset a matter of a fifth of a second; the optimizer, the switches stay.
REDUCED = (
    *("model.n_layer=1", "model.n_head=2", "model.n_embd=32", "model.context=32"),
    *("train.steps=2", "train.global_batch=4", "train.micro_batch=2", "train.sum_factor=null"),
    *("train.precision=fp32", "train.compile=false", "train.device=cpu", "train.threads=1"),
    *("train.eval_every=2", "train.eval_tokens=640", "train.checkpoint_every=0"),
    *("train.sample_tokens=0", "data.val_fraction=0.05", "schedule.warmup_steps=0"),
    "schedule.decay_steps=2",
    *("logging.every=1", "logging.picture=false", "run.name=reduced"),
)


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def trains(name: str, corpus: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sophia = ("optim.tokens=128",) if "sophia" in name else ()
    data = [f"++{override}" for override in corpus[1:]]
    with one_thread():
        outcome = here(f"+experiment={name}", *REDUCED, *sophia, corpus[0], *data)
    assert outcome.result["step"] == 2
    saved = OmegaConf.load(outcome.dir / "config.yaml")
    assert saved.optim.rule == config_of(name).optim["rule"]
    assert saved.data.sampling == config_of(name).data.sampling


@pytest.mark.parametrize("name", SAMPLE)
def test_a_preset_trains(
    name: str, corpus: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trains(name, corpus, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PRESETS if name not in SAMPLE])
def test_every_preset_trains(
    name: str, corpus: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trains(name, corpus, tmp_path, monkeypatch)


# ---- the page ------------------------------------------------------------------------------------


def test_the_page_lists_the_presets_as_they_are() -> None:
    page = PAGE.read_text()
    assert document(page) == page, "stale: run python -m scripts.document_presets"
