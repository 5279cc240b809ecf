"""Which parameter gets which rule.

Every parameter has a role: ``matrix`` (hidden, two or more dimensions), ``embedding``, ``head`` or
``vector`` (gains, biases). An optimizer's ``groups`` is an ordered table; the first group that
matches a parameter takes it, by role or by a regular expression over the parameter's name. Nothing
is left to chance: a parameter that no group takes, a pattern that matches nothing, a parameter
named twice are errors that name the culprit.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

ROLES = ("matrix", "embedding", "head", "vector")
NAMES = {  # tried in this order on parameters of two or more dimensions
    "head": re.compile(r"(^|\.)(lm_head|head|unembed\w*|output)\."),
    "embedding": re.compile(r"(^|\.)(wte|wpe|embed\w*|\w*embeddings?|tok_emb\w*|pos_emb\w*)(\.|$)"),
}


def role_of(name: str, param: Tensor) -> str:
    """Role of a parameter by its dimensions and name. GPT-2's tied head is its embedding."""
    if param.ndim < 2:
        return "vector"
    return next((role for role, pattern in NAMES.items() if pattern.search(name)), "matrix")


def named_list(parameters: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """The (name, parameter) pairs as a list, checked: named, trainable, unique, not flattened."""
    pairs = list(parameters)
    seen: dict[int, str] = {}
    for pair in pairs:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
            raise ValueError(
                "expected (name, parameter) pairs, given bare parameters: "
                "pass model.named_parameters() instead of model.parameters()"
            )
        name, param = pair
        if id(param) in seen:
            raise ValueError(f"parameter {name} was given before, as {seen[id(param)]}")
        seen[id(param)] = name
        if "_flat_param" in name or "_fsdp_wrapped_module" in name or _is_flat(param):
            raise ValueError(
                f"{name} is an FSDP1 flattened parameter, whose matrices are no longer visible: "
                "use FSDP2 (fully_shard)"
            )
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError("two parameters have the same name")
    trainable = [(name, p) for name, p in pairs if p.requires_grad]
    if not trainable:
        raise ValueError(f"no trainable parameters among the {len(pairs)} given")
    return trainable


def _is_flat(param: Tensor) -> bool:
    return getattr(param, "_is_flat_param", False)  # the mark of torch's FlatParameter


def assign(
    parameters: Sequence[tuple[str, Tensor]],
    groups: Mapping[str, Mapping[str, Any]],
    roles: Mapping[str, str] | None = None,
) -> dict[str, list[tuple[str, Tensor]]]:
    """Group name -> its (name, parameter) pairs; first match wins.

    ``groups[name]["match"]`` is one matcher or a list of them: a role, or a regular expression that
    is searched in the parameter's name. ``roles`` (pattern -> role) overrides `role_of`.
    """
    for pattern, wanted in (roles or {}).items():
        if wanted not in ROLES:
            expected = ", ".join(ROLES)
            raise ValueError(f"roles[{pattern!r}] is {wanted!r}, expected one of {expected}")
    role = {name: _role(name, p, roles or {}) for name, p in parameters}
    taken: dict[str, list[tuple[str, Tensor]]] = {group: [] for group in groups}
    patterns = {m for spec in groups.values() for m in _matchers(spec) if m not in ROLES}
    unused, unseen = set(patterns), {p for p in patterns if not any(_is_in(p, n) for n in role)}
    for name, param in parameters:
        for group, spec in groups.items():
            hits = [m for m in _matchers(spec) if m == role[name] or _is_in(m, name)]
            unused.difference_update(hits)
            if hits:
                taken[group].append((name, param))
                break
        else:
            raise ValueError(
                f"no optimizer group takes {name} (role {role[name]}): add the role or a pattern "
                f"to the match of one of: {', '.join(groups)}"
            )
    for pattern in sorted(unused):
        why = (
            f"matches no parameter: it is neither a role ({', '.join(ROLES)}) nor found in any "
            f"name, such as {parameters[0][0]}"
            if pattern in unseen
            else "matches only parameters that an earlier group takes: put its group first"
        )
        raise ValueError(f"optimizer group pattern {pattern!r} {why}")
    return {group: members for group, members in taken.items() if members}


def _role(name: str, param: Tensor, roles: Mapping[str, str]) -> str:
    named = (role for pattern, role in roles.items() if re.search(pattern, name))
    return next(named, role_of(name, param))


def _matchers(spec: Mapping[str, Any]) -> list[str]:
    match = spec["match"]
    matchers = [match] if isinstance(match, str) else list(match)
    for matcher in matchers:
        try:
            re.compile(matcher)
        except re.error as error:
            raise ValueError(f"match {matcher!r} is no regular expression: {error}") from None
    return matchers


def _is_in(matcher: str, name: str) -> bool:
    return matcher not in ROLES and re.search(matcher, name) is not None
