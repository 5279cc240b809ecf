"""Every optimizer follows its authors' own trajectory, step by step.

Each golden file holds one trajectory of an authoritative implementation: initial parameters and
gradients (shared, in _inputs.safetensors), the parameters after every step, and in its metadata the
hyper-parameters, learning rates and tolerance. `--goldens DIR` runs another folder of that format.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from optim import Optimizer, clip_grad_norm, create_optimizer

Hyper = dict[str, Any]
LARGEST_RELATIVE_STEP = 1e-2  # transformers.Adafactor's min(1e-2, 1/sqrt(t)), used where lr is null
ALL = {"all": {"match": ["matrix", "vector"]}}


def adamw(h: Hyper) -> Hyper:
    return {"name": "adamw", "betas": h["betas"], "eps": h["eps"], "groups": ALL}


def lion(h: Hyper) -> Hyper:
    return {"name": "lion", "betas": h["betas"], "groups": ALL}


def signum_ema(h: Hyper) -> Hyper:
    return {"name": "signum", "beta": h["momentum"], "groups": ALL}


def came(h: Hyper) -> Hyper:
    hyper = {key: h[key] for key in ("betas", "eps", "clip_threshold")}
    return {"name": "came", "groups": ALL, **hyper}


def adafactor(h: Hyper) -> Hyper:
    hyper: Hyper = {"name": "adafactor", "groups": ALL, "eps": list(h["eps"])}
    if "beta2_decay" in h:  # torch.optim.Adafactor
        hyper["eps"][0] = h["eps"][0] or torch.finfo(torch.float32).eps
        return {**hyper, "beta2_decay": h["beta2_decay"], "clip_threshold": h["d"]}
    return {
        **hyper,
        "eps_style": "add",
        "relative_decay": True,
        "beta1": h["beta1"] or 0.0,
        "beta2_decay": h["decay_rate"],
        **{key: h[key] for key in ("clip_threshold", "scale_parameter", "relative_step")},
    }


def lamb(h: Hyper) -> Hyper:
    hyper = {"name": "lamb", "groups": ALL, "betas": h["betas"], "eps": h["eps"]}
    if "trust_clip" in h:  # timm
        keys = ("bias_correction", "always_adapt", "trust_clip")
        return {**hyper, **{key: h[key] for key in keys}}
    return {**hyper, "bias_correction": False, "always_adapt": True, "max_weight_norm": 10.0}


def shampoo(h: Hyper) -> Hyper:
    keys = ("betas", "grafting", "grafting_beta2", "precondition_frequency", "factor_dtype")
    return {
        "name": "shampoo",
        "groups": ALL,
        "eps": h["epsilon"],
        "bias_correction": h["use_bias_correction"],
        "grafting_eps": h["grafting_epsilon"],
        "max_dim": h["max_preconditioner_dim"],
        "start_step": h["start_preconditioning_step"],
        **{key: h[key] for key in keys},
    }


def cautious_adamw(h: Hyper) -> Hyper:
    style = "torch" if "timm" in h["source"] else "raw"
    return {**adamw(h), "name": "cautious_adamw", "eps_style": style}


def ademamix(h: Hyper) -> Hyper:
    keys = ("betas", "alpha", "alpha_warmup", "beta3_warmup", "eps")
    return {"name": "ademamix", "groups": ALL, **{key: h[key] or 0 for key in keys}}


def adopt(h: Hyper) -> Hyper:
    exponent = float(h["clip"].removeprefix("step**"))
    return {**adamw(h), "name": "adopt", "decoupled": h["decouple"], "clip_exponent": exponent}


def soap(h: Hyper) -> Hyper:
    keys = ("betas", "eps", "precondition_frequency", "max_precond_dim")
    beta = h["betas"][1] if h["shampoo_beta"] < 0 else h["shampoo_beta"]
    hyper = {key: h[key] for key in keys}
    return {"name": "soap", "groups": ALL, "shampoo_beta": beta, **hyper}


def schedule_free_adamw(h: Hyper) -> Hyper:
    keys = ("warmup_steps", "r", "weight_lr_power")
    return {**adamw(h), "name": "schedule_free_adamw", **{key: h[key] for key in keys}}


def sophia_g(h: Hyper) -> Hyper:
    hyper = {"betas": h["betas"], "rho": h["rho"]}
    hyper |= {"tokens": h["bs"], "hessian_interval": h["hess_interval"]}
    return {"name": "sophia_g", "groups": ALL, **hyper}


def prodigy(h: Hyper) -> Hyper:
    assert h["decouple"] and h["safeguard_warmup"], "the only variant that is followed"
    hyper = {key: h[key] for key in ("betas", "eps", "d0", "d_coef")}
    hyper |= {"beta3": h["beta3"] or 0.0, "bias_correction": h["use_bias_correction"]}
    return {"name": "prodigy", "groups": ALL, **hyper}


def mars(name: str, rule: Callable[[Hyper], Hyper]) -> Callable[[Hyper], Hyper]:
    """MARS's routing: 2-D tensors take the rule, vectors AdamW, or the rule too (optimize_1d).
    The rule of vectors under MARS-Shampoo is then MARS-AdamW's."""

    def build(h: Hyper) -> Hyper:
        adamw = {"match": ["vector"], "rule": "adamw", "eps": h["eps"]}
        vectors = {
            "correction": "none",
            "betas": h["betas_1d"],
            "lr_scale": h["lr_1d"] / h["lr"],
            "weight_decay": h["weight_decay_1d"],
        }
        groups = {"mars": {"match": ["matrix"]}, "vectors": {**adamw, **vectors}}
        if h["optimize_1d"]:
            same = {**adamw, "betas": h["betas"]} if name == "mars_shampoo" else ALL["all"]
            groups["vectors"] = {**same, "match": ["vector"]}
        return {"name": name, "mars": mars_options(h), "groups": groups, **rule(h)}

    return build


def mars_options(h: Hyper) -> Hyper:
    return {"gamma": h["gamma"], "exact": not h["is_approx"]}


def mars_shampoo(h: Hyper) -> Hyper:
    beta = h["betas"][0]
    return {"momentum": beta, "eps": h["eps"] * (1 - beta), "ns_dtype": ns_dtype(h)}


def ns_dtype(h: Hyper) -> str:
    """Precision of the Newton-Schulz products that were run: the tolerance tells."""
    return "float32" if json.loads(h["tolerance"])["kind"] == "allclose" else "bfloat16"


def with_adamw(name: str, rule: Callable[[Hyper], Hyper]) -> Callable[[Hyper], Hyper]:
    """A rule on matrices, its lr scaled by alpha; on vectors AdamW with the hyper-parameters aux_*
    and a schedule of its own."""

    def build(h: Hyper) -> Hyper:
        vectors = {
            "match": ["vector"],
            "rule": "adamw",
            "betas": h["aux_betas"],
            "eps": h["aux_eps"],
            "weight_decay": h["aux_weight_decay"],
        }
        matrices = {"match": ["matrix"], "lr_scale": h.get("alpha", 1.0)}
        groups = {"matrices": matrices, "vectors": vectors}
        return {"name": name, "groups": groups, **rule(h)}

    return build


def muon(h: Hyper) -> Hyper:
    return {
        "momentum": h["momentum"],
        "nesterov": h["nesterov"],
        "ns_steps": h["ns_steps"],
        "ns_dtype": ns_dtype(h),
        "eps": h.get("eps", 1e-7),
        "scale": h.get("adjust_lr_fn") or "original",
    }


def normuon(h: Hyper) -> Hyper:
    keys = ("momentum", "beta2", "ns_steps")
    return {"ns_dtype": ns_dtype(h), **{key: h[key] for key in keys}}


def dion(h: Hyper) -> Hyper:
    return {"momentum": h["mu"], "rank": h["rank"], "eps": h["epsilon"]}


def moonlight(name: str, rule: Callable[[Hyper], Hyper]) -> Callable[[Hyper], Hyper]:
    """Muon on matrices; on vectors AdamW with the same lr and weight decay, eps added raw."""

    def build(h: Hyper) -> Hyper:
        vectors = {
            "match": ["vector"],
            "rule": "adamw",
            "correction": "none",
            "betas": h["adamw_betas"],
            "eps": h["adamw_eps"],
            "eps_style": "raw",
        }
        groups = {"matrices": {"match": ["matrix"]}, "vectors": vectors}
        hyper = {"momentum": h["momentum"], "ns_steps": h["ns_steps"], "ns_dtype": ns_dtype(h)}
        return {"name": name, "groups": groups, **hyper, **rule(h)}

    return build


BUILDERS: dict[str, Callable[[Hyper], Hyper]] = {
    "Adafactor": adafactor,
    "ADOPT": adopt,
    "AdEMAMix": ademamix,
    "AdamW": adamw,
    "CAME": came,
    "Cautious AdamW": cautious_adamw,
    "Dion": with_adamw("dion", dion),
    "LAMB": lamb,
    "Lion": lion,
    "Signum": signum_ema,
    "MARS-AdamW": mars("mars_adamw", lambda h: {"betas": h["betas"], "eps": h["eps"]}),
    "MARS-Lion": mars("mars_lion", lambda h: {"beta": h["betas"][0]}),
    "MARS-Shampoo": mars("mars_shampoo", mars_shampoo),
    "MARS-M": moonlight("mars_m", lambda h: {"mars": mars_options(h)}),
    "Moonlight-Muon": moonlight("moonlight", lambda h: {"nesterov": h["nesterov"]}),
    "Muon": with_adamw("muon", muon),
    "Schedule-Free AdamW": schedule_free_adamw,
    "Shampoo": shampoo,
    "Sophia-G": sophia_g,
    "NorMuon": with_adamw("normuon", normuon),
    "Prodigy": prodigy,
    "SOAP": soap,
    "SWAN": with_adamw("swan", lambda h: {"ns_steps": h["ns_iters"], "ns_beta": h["ns_beta"]}),
    "SinkGD": with_adamw("sinkgd", lambda h: {"iterations": h["sinkhorn_iters"]}),
}
# one of each granularity (element, tensor with MARS's norm, tensor, matrix) is compiled as well
COMPILED = ["AdamW", "MARS-AdamW", "CAME", "Muon"]
SLOW = pytest.mark.slow
# other codes under a name that we also have, not followed: each with the reason
EXPECTED_DIFFERENCES = {
    "signum_epfml": "starts its momentum at a copy of the parameter, which the paper does not",
}


def metadata(file: Path) -> Hyper:
    with safe_open(file, "pt") as f:
        return dict(f.metadata())


def golden_files(folder: Path) -> list[Path]:
    return sorted(f for f in folder.glob("*.safetensors") if not f.name.startswith("_"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden" in metafunc.fixturenames:
        files = golden_files(metafunc.config.getoption("--goldens"))
        cases = [pytest.param(f, False, id=f.stem) for f in files]
        first = {metadata(f)["optimizer"]: f for f in reversed(files)}  # of each optimizer
        cases += [
            pytest.param(first[name], True, id=f"{first[name].stem}-compiled", marks=[SLOW])
            for name in COMPILED
            if name in first
        ]
        metafunc.parametrize("golden,compile", cases)


def follow(
    optimizer: Optimizer, params: list[torch.nn.Parameter], data: dict[str, Tensor], meta: Hyper
) -> list[list[Tensor]]:
    """Run the golden's steps; parameters after each."""
    schedules = list(json.loads(meta["lr_schedule"]).values())
    after = []
    for t in range(int(meta["T"])):
        for i, group in enumerate(optimizer.param_groups):
            # one schedule for all (MARS: its 1-D lr is lr_t * lr_1d / lr), or one per group
            schedule = schedules[min(i, len(schedules) - 1)]
            if schedule is not None:
                group["lr"] = group["lr_scale"] * schedule[t]
        if optimizer.needs_next_batch_gradient and t + 1 < int(meta["T"]):
            # prev_grad.{t+1}: the gradient of the next batch at the present point
            for i, p in enumerate(params):
                p.grad = data[f"prev_grad.{t + 1}.{i}"].clone()
            optimizer.store_next_batch_gradient()
        for i, p in enumerate(params):
            p.grad = data[f"grad.{t}.{i}"].clone()
        clip_grad_norm(params, json.loads(meta["hyperparameters"]).get("max_grad_norm"))
        optimizer.step()
        after.append([p.detach().clone() for p in params])
        if optimizer.needs_hessian_gradient:
            for i, p in enumerate(params):
                p.grad = data[f"hess_grad.{t}.{i}"].clone()
            optimizer.store_hessian_gradient()
        if f"d.after.{t}" in data:  # Prodigy's estimate
            d = optimizer.state[params[0]]["d"]
            assert torch.allclose(d.double(), data[f"d.after.{t}"].double(), rtol=1e-5), f"d.{t}"
        with optimizer.evaluation_weights():
            for i, p in enumerate(params):
                if (key := f"eval_param.{i}.after.{t}") in data:
                    assert torch.allclose(p, data[key], rtol=1e-5, atol=5e-6), key
    return after


def trajectory(
    golden: Path, compile: bool = False
) -> tuple[list[list[Tensor]], dict[str, Tensor], Hyper]:
    """Our parameters after each of a golden's steps, the golden's tensors and its metadata."""
    meta = metadata(golden)
    data = {**load_file(golden.with_name("_inputs.safetensors")), **load_file(golden)}
    hyper = json.loads(meta["hyperparameters"])
    n = len(json.loads(meta["shapes"]))
    params = [torch.nn.Parameter(data[f"param.{i}.init"].clone()) for i in range(n)]
    optimizer = create_optimizer(
        named_parameters=[(f"layer{i}.weight", p) for i, p in enumerate(params)],
        lr=hyper["lr"] or LARGEST_RELATIVE_STEP,
        weight_decay=hyper["weight_decay"],
        compile=compile,
        **BUILDERS[meta["optimizer"]]({**meta, **hyper}),
    )
    for i, p in enumerate(params):
        if f"q_init.{i}" in data:  # Dion's random start
            optimizer.state[p]["q"].copy_(data[f"q_init.{i}"])
    return follow(optimizer, params, data, meta), data, meta


def worst_error(
    after: list[list[Tensor]], data: dict[str, Tensor], tolerance: Hyper
) -> tuple[float, str]:
    """The largest error as a fraction of what the tolerance allows, and where it is."""
    errors = {}
    for t, params in enumerate(after):
        for i, ours in enumerate(params):
            golden, start = data[f"param.{i}.after.{t}"], data[f"param.{i}.init"]
            if tolerance["kind"] == "relF" and ours.ndim == 2:
                error = (ours - golden).norm() / (golden - start).norm() / tolerance["relF"]
            else:
                atol = (
                    tolerance["atol"] if tolerance["kind"] == "allclose" else tolerance["atol_1d"]
                )
                allowed = atol + tolerance.get("rtol", 0.0) * golden.abs()
                error = ((ours - golden).abs() / allowed).max()
            errors[f"parameter {i} after step {t}"] = error
    largest, position = torch.stack(list(errors.values())).max(0)  # nan if any is
    return largest.item(), list(errors)[int(position)]


def test_follows_its_authors(golden: Path, compile: bool) -> None:
    if golden.stem in EXPECTED_DIFFERENCES:
        pytest.skip(f"expected difference: {EXPECTED_DIFFERENCES[golden.stem]}")
    if (name := metadata(golden)["optimizer"]) not in BUILDERS:
        pytest.skip(f"no optimizer {name} yet")
    after, data, meta = trajectory(golden, compile)
    error, where = worst_error(after, data, json.loads(meta["tolerance"]))
    assert error <= 1, f"{where}: off by {error:.3g} times the tolerance"
