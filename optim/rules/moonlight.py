"""Moonlight: Muon with AdamW's update size and weight decay (arXiv 2502.16982).

    u = 0.2 sqrt(max(rows, cols)) NS(nesterov momentum)

The factor gives the update the RMS of AdamW's (0.2 to 0.4), so that one lr and one weight decay
serve all parameters; the decay uses the plain lr. As in the authors' code (MoonshotAI/Moonlight
examples/toy_train.py) all others, gains and biases included, take AdamW with the same lr *and*
weight decay, and with eps beside the raw sqrt(v).
"""

from __future__ import annotations

DEFAULTS = {
    "rule": "muon",
    "lr": 1e-3,
    "weight_decay": 0.1,
    "scale": "match_rms_adamw",
    "groups": {
        "matrices": {"match": ["matrix"]},
        "others": {
            "match": ["embedding", "head", "vector"],
            "rule": "adamw",
            "betas": (0.9, 0.95),
            "eps": 1e-8,
            "eps_style": "raw",
        },
    },
}
