"""Every update rule, one file each.

A file of this folder defines at most one `Rule` and a ``DEFAULTS`` table: the optimizer of that
name as its authors' code has it (rule, correction, groups, hyper-parameters), in the shape of
configs/optim/<name>.yaml and of `create_optimizer`'s keywords. A file without a rule of its own,
such as mars_adamw, is a composition of others. Files are found by themselves; nothing is
registered.
"""

from __future__ import annotations

import difflib
import inspect
import pkgutil
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

from optim.rule import Rule


@cache
def modules() -> dict[str, ModuleType]:
    """Optimizer name -> its module."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__))
    return {name: import_module(f"{__name__}.{name}") for name in names}


@cache
def rules() -> dict[str, type[Rule]]:
    """Rule name -> its class: the one that the module of that name defines."""
    return {
        name: value
        for name, module in modules().items()
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, Rule)
        and value.__module__ == module.__name__
    }


def build_rule(name: str, hyper: Mapping[str, Any]) -> Rule:
    """The rule of that name with these hyper-parameters; ValueError for unknown or bad ones."""
    cls = rules()[known(name, rules(), "rule")]
    for key in hyper:
        known(key, [f.name for f in fields(cls)], f"hyper-parameter of {name}")
    try:
        return cls(**hyper)
    except (ValueError, TypeError) as error:
        raise ValueError(f"optimizer rule {name}: {error}") from None


def known(name: str, valid: Any, what: str) -> str:
    """``name`` if it is valid; else ValueError with the nearest valid name."""
    if name in valid:
        return name
    near = difflib.get_close_matches(name, list(valid), n=1)
    hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(valid) or 'none'}"
    raise ValueError(f"{name!r} is no {what}: {hint}")
