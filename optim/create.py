"""From an optimizer's name and a model's parameters to an optimizer.

    optimizer = create_optimizer("mars_adamw", model.named_parameters(), lr=6e-3, weight_decay=0.01)

The keywords are those of configs/optim/<name>.yaml: ``lr``, ``weight_decay``, ``rule``,
``correction``, ``mars`` (gamma, clip, exact), ``mask``, ``groups``, and the rule's own
hyper-parameters (``betas=(0.9, 0.95)``). What is not given is as in the authors' code.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from torch import Tensor

from optim.correction import CORRECTIONS, Mars
from optim.mask import MASKS
from optim.optimizer import Optimizer
from optim.roles import assign, named_list
from optim.rules import build_rule, known, modules, rules

if TYPE_CHECKING:
    from optim.division import Division

# settings of an optimizer and of each of its groups, with what holds where nothing is said
SETTINGS: dict[str, Any] = {
    "rule": None,
    "lr": None,
    "weight_decay": 0.0,
    "correction": "none",
    "mars": {},
    "mask": "none",
    "groups": {"all": {"match": ["matrix", "embedding", "head", "vector"]}},
}


def list_optimizers() -> list[str]:
    """Names that `create_optimizer` knows."""
    return list(modules())


def create_optimizer(
    name: str,
    named_parameters: Iterable[tuple[str, Tensor]],
    *,
    roles: Mapping[str, str] | None = None,
    compile: bool = False,
    maximize: bool = False,
    division: Division | None = None,
    **hyperparameters: Any,
) -> Optimizer:
    """The optimizer ``name`` for these (name, parameter) pairs.

    ``roles`` maps patterns of parameter names to a role where the guess by name and dimensions is
    wrong (optim/roles.py). ``division`` says how several processes divide the work
    (optim/division.py); all of them call with the same arguments.

    Raises ValueError, naming the culprit, for an unknown optimizer or hyper-parameter, one out of
    range, and for parameters that are missing, duplicated, flattened, taken by no group, or of the
    wrong shape for their rule.
    """
    groups = resolve(name, **hyperparameters)
    members = assign(named_list(named_parameters), groups, roles)
    own = [
        {**{k: v for k, v in groups[group].items() if k != "match"}, "params": params}
        for group, params in members.items()
    ]
    if division is None:
        return Optimizer(own, compile=compile, maximize=maximize)
    from optim.divided import DividedOptimizer  # imports torch.distributed.tensor

    return DividedOptimizer(own, division, compile=compile, maximize=maximize)


def resolve(name: str, **hyperparameters: Any) -> dict[str, dict[str, Any]]:
    """The complete groups (group name -> settings) of an optimizer, checked, before there is a
    model: a configuration error is found here."""
    module = modules()[known(name, modules(), "optimizer")]
    given = {**SETTINGS, **module.DEFAULTS, **hyperparameters}
    for key in ("mars", "groups"):
        _check_table(key, given[key])
    given["mars"] = {**SETTINGS["mars"], **module.DEFAULTS.get("mars", {}), **given["mars"]}
    top, groups = {k: v for k, v in given.items() if k != "groups"}, given["groups"]
    if not groups:
        raise ValueError(f"optimizer {name} has no groups")
    # a hyper-parameter of the optimizer goes to every group that uses the optimizer's rule
    return {group: _complete(group, spec, top) for group, spec in groups.items()}


def _complete(group: str, spec: Mapping[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    _check_table(f"groups.{group}", spec)
    _check_table(f"groups.{group}.mars", spec.get("mars", {}))
    rule = known(spec.get("rule", top["rule"]), rules(), "rule")
    inherited = {k: v for k, v in top.items() if k in SETTINGS or rule == top["rule"]}
    merged = {"lr_scale": 1.0, **inherited, **spec, "mars": {**top["mars"], **spec.get("mars", {})}}
    known(merged["correction"], CORRECTIONS, "correction")
    known(merged["mask"], MASKS, "mask")
    for key in merged["mars"]:
        known(key, [f.name for f in fields(Mars)], "option of mars")
    if "match" not in merged:
        raise ValueError(f"optim.groups.{group} has no match: which roles or names does it take?")
    settings = (*SETTINGS, "lr_scale", "match")
    hyper = {
        k: tuple(v) if isinstance(v, list) else v for k, v in merged.items() if k not in settings
    }
    built = build_rule(rule, hyper)
    if merged["correction"] != "none":
        built.momentum  # noqa: B018 - raises for a rule that has none
        Mars(**merged["mars"])
    for key in ("lr", "weight_decay", "lr_scale"):
        _check_number(f"groups.{group}.{key}" if key in spec else key, merged[key])
    return {
        "name": group,
        "match": merged["match"],
        "rule": rule,
        "hyper": hyper,
        "correction": merged["correction"],
        "mars": merged["mars"],
        "mask": merged["mask"],
        "lr": merged["lr"] * merged["lr_scale"],
        "lr_scale": merged["lr_scale"],
        "weight_decay": merged["weight_decay"],
    }


def _check_table(what: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise ValueError(f"{what} is {value!r}, expected a table of settings")


def _check_number(what: str, value: Any) -> None:
    if isinstance(value, Tensor):
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise ValueError(f"{what} must be a number that is not negative, given {value!r}")
