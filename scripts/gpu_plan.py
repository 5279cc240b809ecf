"""Which rows of the training step scripts/gpu_speed.py measures, in which order, and what each will
take.

The order is that of what is asked for most: first all that a target wants (scripts/gpu_targets.py),
then what each technique gained, then the rest. A row is left out where it would not end in time,
and a shorter one after it may still be reached.

Compiling is most of it. Of GPT-2 small the whole network is one graph, as the plain step has it;
larger ones are compiled layer by layer (``train.compile_blocks``), which takes the time of a few
layers whatever the depth. A network that a row before has compiled is read from the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

BATCH = 480  # sequences of an update
# of a micro-batch, of which 480 is a multiple: first tries, on a card of 80 GB
MICRO = {"small": 32, "medium": 32, "large": 32, "xl": 16}
STEPS = 4  # updates of a row: the one that compiles, and three turns
BUILD = {"small": 5.0, "medium": 6.0, "large": 9.0, "xl": 16.0}  # seconds to make a model, and end
PROCESS = 12.0  # seconds from the start of train.py to its first step, but for compiling
WHOLE, BLOCKS, CACHED = 12.0, 4.0, 4.0  # layers' worth of compiling: small's network, any by layer
MARS, MUON = 4.0, 8.0  # and of an update
# A quarter of GPT-2 small in depth and in vocabulary: layers and head have the same shares of the
# work as there, a quarter of it is to be compiled.
QUARTER = ("model.n_layer=3", "model.vocab_size=12564")


@dataclass(frozen=True)
class Setting:
    """One row: ``kind`` of side (gpu_speed.MEASURE), ``step_s`` a guess at one update of 480
    sequences on an H100, ``layers`` how many layers' worth there are to compile."""

    size: str
    kind: str
    compile: str  # whole | blocks | no
    step_s: float
    layers: float = 0.0
    optimizer: str = "adamw"
    extra: str = ""  # an override that the row is about
    micro_batches: int | None = None  # of an update; None: as many as 480 sequences are
    build_s: float | None = None  # None: of BUILD

    @property
    def sequences(self) -> int:
        """Of an update, with the micro-batch that is tried first."""
        return self.micro_batches * MICRO[self.size] if self.micro_batches else BATCH

    @property
    def update_s(self) -> float:
        """The guess at an update of them."""
        return self.step_s * self.sequences / BATCH

    @property
    def own(self) -> dict[str, Any]:
        """What the row says of itself before it is measured."""
        return {
            "size": self.size,
            "setting": self.kind,
            "optimizer": self.optimizer,
            "compile": self.compile,
            "with": self.extra,
        }


GRAPHS = "train.compile_mode=reduce-overhead"
TARGETS = (
    Setting("small", "start", "whole", 0.0, 1.3 * WHOLE, build_s=2 * PROCESS),
    Setting("small", "ours", "whole", 1.0, CACHED),  # compiled by the start
    Setting("small", "plain", "whole", 1.5, WHOLE),
    Setting("medium", "ours", "blocks", 2.5, BLOCKS),
    Setting("large", "ours", "blocks", 5.0, BLOCKS),
    Setting("small", "mars pair", "whole", 1.5, WHOLE / 4 * 2 + MARS, "mars_adamw"),
    Setting("small", "wrappers", "no", 1.5),
    Setting("xl", "ours", "blocks", 10.0, BLOCKS, micro_batches=4),
)
TECHNIQUES = (  # beside small as a whole; from the third on, beside small by blocks
    Setting("small", "ours", "no", 2.0),
    Setting("small", "ours", "blocks", 1.0, BLOCKS),
    Setting("small", "ours", "blocks", 1.0, BLOCKS / 2, extra="model.loss_chunks=8"),
    Setting("small", "ours", "blocks", 1.0, BLOCKS / 2, extra="model.vocab_multiple=1"),
    Setting("small", "ours", "blocks", 2.0, BLOCKS, extra="train.precision=fp32"),
    # CUDA graphs want one micro-batch an update; beside them the same without
    Setting("small", "one micro-batch", "whole", 1.0, CACHED, micro_batches=1),
    Setting("small", "one micro-batch", "whole", 1.0, WHOLE, extra=GRAPHS, micro_batches=1),
)
REST = (
    Setting("small", "ours", "whole", 1.0, CACHED + MARS, "mars_adamw"),
    Setting("small", "ours", "whole", 1.0, CACHED + MUON, "muon"),
    Setting("medium", "ours", "whole", 2.5, 2 * WHOLE),
    Setting("medium", "plain", "whole", 3.5, 2 * WHOLE),
    Setting("large", "ours", "whole", 5.0, 3 * WHOLE),
    Setting("large", "plain", "whole", 7.0, 3 * WHOLE),
)
ORDER = (*TARGETS, *TECHNIQUES, *REST)
TOY_ORDER = (*TARGETS[:-1], *TECHNIQUES[:3:2])  # of --smoke: each kind, and an override


@dataclass
class Plan:
    """What a row will take, by what the rows before took."""

    per_layer: float = 2.0  # seconds to compile one, until there is a reading
    pace: float = 1.0  # how much slower than the guesses this card is

    def needed(self, setting: Setting) -> float:
        """Seconds."""
        build = BUILD[setting.size] if setting.build_s is None else setting.build_s
        return build + self.per_layer * setting.layers + STEPS * self.pace * setting.update_s

    def learn(self, setting: Setting, step_s: float, first_step_s: float) -> None:
        """From what a row found: seconds of an update, and of the first one."""
        self.pace = step_s / setting.update_s
        if setting.compile == "whole":
            self.per_layer = max(0.1, (first_step_s - step_s) / setting.layers)
