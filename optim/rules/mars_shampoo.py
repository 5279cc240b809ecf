"""MARS-Shampoo: MARS's correction in front of an orthogonalized momentum (arXiv 2411.10438).

    c = clip(g + gamma beta1 / (1 - beta1) (g - g'), 1)      m = beta1 m + (1 - beta1) c
    u = sqrt(max(1, rows / cols)) NS(m / (1 - beta1))

Not Shampoo but Muon without Nesterov. The authors' code (AGI-Arena/MARS mars.py, mars_type=
"mars-shampoo") multiplies its Newton-Schulz out in its own order (``ns_order: product``), and adds
the optimizer's eps, 1e-8, to the norm of m / (1 - beta1): which is eps (1 - beta1) = 5e-10 added to
the norm of m. It routes every 2-D tensor here, embeddings and tied head included (whose update is
then scaled by sqrt(50304 / 768) = 8); gains and biases take AdamW with their own lr and decay.
"""

from __future__ import annotations

DEFAULTS = {
    "rule": "muon",
    "lr": 3e-3,
    "weight_decay": 0.0,
    "momentum": 0.95,
    "nesterov": False,
    "ns_order": "product",
    "eps": 5e-10,
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
