"""MARS-Lion: MARS's correction in front of a sign update (arXiv 2411.10438, Algorithm 3).

    c = clip(g + gamma beta / (1 - beta) (g - g'), 1)        m = beta m + (1 - beta) c
    u = sign(m)

The authors' code (mars.py, mars_type="mars-lion") takes the sign of the plain average, without
Lion's second interpolation: it is Signum on the corrected gradient. Gains and biases take AdamW.
"""

from __future__ import annotations

DEFAULTS = {
    "rule": "signum",
    "lr": 3e-4,
    "weight_decay": 0.0,
    "beta": 0.95,
    "correction": "mars",
    "groups": {
        "mars": {"match": ["matrix", "embedding", "head"]},
        "vectors": {
            "match": ["vector"],
            "rule": "adamw",
            "correction": "none",
            "betas": (0.9, 0.95),
            "weight_decay": 0.1,
        },
    },
}
