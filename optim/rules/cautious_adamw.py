"""Cautious AdamW: AdamW that steps only where it agrees with the gradient (arXiv 2411.16085).

    u = AdamW's direction * 1[m g > 0] / max(mean(1[m g > 0]), 1e-3)         mean per tensor

The mask is an engine setting, ``mask: cautious``, and serves any rule; the momentum itself is not
masked. As kyleliang919/C-Optim c_adamw.py with foreach=False, whose eps stands beside the raw
sqrt(v); its default path has torch's eps, as timm's ``caution`` has (``eps_style: torch``).
"""

from __future__ import annotations

DEFAULTS = {
    "rule": "adamw",
    "lr": 1e-3,
    "weight_decay": 0.0,
    "betas": (0.9, 0.999),
    "eps": 1e-6,
    "eps_style": "raw",
    "mask": "cautious",
    "groups": {
        "decay": {"match": ["matrix", "embedding", "head"]},
        "no_decay": {"match": ["vector"], "weight_decay": 0.0},
    },
}
