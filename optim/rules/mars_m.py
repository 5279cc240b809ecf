"""MARS-M: MARS's correction in front of Muon with Moonlight's scale (arXiv 2510.21800).

    c = clip(g + gamma mu / (1 - mu) (g - g'), 1)            m = mu m + (1 - mu) c
    u = 0.2 sqrt(max(rows, cols)) NS(m)

No Nesterov, in spite of a comment in the authors' code (AGI-Arena/MARS mars_m.py), whose ``clip_c``
is ignored: c is always clipped. All others take AdamW on the plain gradient with the same lr and
weight decay, eps beside the raw sqrt(v).
"""

from __future__ import annotations

DEFAULTS = {
    "rule": "muon",
    "lr": 1e-3,
    "weight_decay": 0.1,
    "nesterov": False,
    "scale": "match_rms_adamw",
    "correction": "mars",
    "groups": {
        "matrices": {"match": ["matrix"]},
        "others": {
            "match": ["embedding", "head", "vector"],
            "rule": "adamw",
            "correction": "none",
            "betas": (0.9, 0.95),
            "eps": 1e-8,
            "eps_style": "raw",
        },
    },
}
