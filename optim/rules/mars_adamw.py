"""MARS-AdamW: MARS's correction in front of AdamW (arXiv 2411.10438, Algorithm 2).

    c = clip(g + gamma beta1 / (1 - beta1) (g - g'), 1)      then AdamW on c

Both moments see the clipped c; the paper's formula for v shows the raw gradient, the authors' code
(AGI-Arena/MARS mars.py), which produced the results, does not. There every 2-D tensor, embeddings
and tied head included, takes the MARS rule, and gains and biases plain AdamW with their own lr
(lr_1d, half of lr), betas and weight decay (0.1, whatever their group says).
"""

from __future__ import annotations

DEFAULTS = {
    "rule": "adamw",
    "lr": 3e-3,
    "weight_decay": 0.0,
    "betas": (0.95, 0.99),
    "correction": "mars",
    "groups": {
        "mars": {"match": ["matrix", "embedding", "head"]},
        "vectors": {
            "match": ["vector"],
            "correction": "none",
            "betas": (0.9, 0.95),
            "weight_decay": 0.1,
        },
    },
}
