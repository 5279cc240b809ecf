"""The README.md of an exported model: what it is, how it was trained, what it reached.

Settings come from the run's table of what decides its weights, results from its metrics, so that
nothing here is a claim of its own. A model that does not come from a run gets the first part alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data.tokenizer import Tokenizer
from eval.checkpoint import EVALUATIONS, Place, find
from model import GPT2
from runtime.run import TRAJECTORY

FOLDED = """\
The queries are divided by (layer + 1) in the weights, where the training divided the attention
logits (`scale_attn_by_inverse_layer_idx`): the same function, to rounding."""
SCALED = """\
Attention logits are divided by (layer + 1) (`scale_attn_by_inverse_layer_idx`). transformers does
so by this configuration; vLLM refuses it, and reads an export made with
`fold_attention_scale=true`."""
UNBIASED = """\
The network has no biases. The file holds zeros in their place, since transformers' GPT-2 always has
them; training it further there would train them too."""
UNMASKED = """\
In training {spare} padding rows of the embedding took part in the softmax as tokens that never
occur. They are cut off here, so losses are lower by what little probability they had."""
PADDED = "The {spare} rows that pad the embedding to {rows} in training are cut off."

PAGE = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [gpt2]
---

# {name}

A GPT-2 of {parameters:,} parameters: {c.n_layer} layers of width {c.n_embd} with {c.n_head} heads,
a context of {c.context} tokens, a vocabulary of {c.vocab_size} ({tokenizer} tokenizer).

```python
from transformers import pipeline

pipeline("text-generation", "{name}")("Once upon a time")
```
{notes}{training}
No licence is stated: whoever publishes this adds the one that the training data allow.
"""


def model_card(
    model: GPT2, tokenizer: Tokenizer, checkpoint: str, name: str, folded: bool = False
) -> str:
    """Markdown with the hub's front matter. `checkpoint` as for `load_model`; paths stay out."""
    return PAGE.format(
        name=name,
        parameters=model.num_parameters(),
        c=model.config,
        tokenizer=tokenizer.name,
        notes="".join(f"\n{note}\n" for note in _notes(model, folded)),
        training=_training(checkpoint),
    )


def _notes(model: GPT2, folded: bool) -> list[str]:
    config = model.config
    sizes = {
        "spare": config.padded_vocab_size - config.vocab_size,
        "rows": config.padded_vocab_size,
    }
    notes = []
    if config.scale_attn_by_inverse_layer_idx:
        notes.append(FOLDED if folded else SCALED)
    if not config.bias:
        notes.append(UNBIASED)
    if sizes["spare"]:
        notes.append((PADDED if config.mask_padding else UNMASKED).format(**sizes))
    return notes


def _training(checkpoint: str) -> str:
    """Results and settings of the run that `checkpoint` belongs to; nothing if there is no run."""
    place = find(checkpoint)
    if place is None:
        return ""
    rows = [f"| {key} | {value:,.6g} |" for key, value in _results(place).items()]
    table = "\n".join(["| result | value |", "|---|---|", *rows])
    settings = json.loads((place.run / TRAJECTORY).read_text())
    lines = [f"{key}: {json.dumps(_without_paths(settings[key]))}" for key in sorted(settings)]
    code = "\n".join(lines)
    return f"\n## Results\n\n{table}\n\n## Training\n\n```yaml\n{code}\n```\n"


def _results(place: Place) -> dict[str, float]:
    """Step and tokens of the checkpoint, and the last value of each figure of an evaluation: in
    training up to that step, and by the evaluation commands at that step."""
    step, tokens = place.meta["step"], place.meta["step"] * place.meta["tokens_per_step"]
    results: dict[str, float] = {"step": step, "tokens": tokens}
    for name, steps in (("metrics.jsonl", range(step + 1)), (EVALUATIONS, range(step, step + 1))):
        file = place.run / name
        for line in file.read_text().splitlines() if file.is_file() else ():
            values = json.loads(line)
            if values["step"] in steps:
                found = {k: v for k, v in values.items() if k.startswith(("val/", "eval/"))}
                results |= {k: v for k, v in found.items() if isinstance(v, int | float)}
    return results


def _without_paths(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_paths(each) for each in value]
    return Path(value).name if isinstance(value, str) and "/" in value else value
