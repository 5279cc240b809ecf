"""The loss on a fixed validation set, exactly weighted.

The windows are the same at every evaluation and for every run on the same data, so that two losses
can be compared. Sums over tokens are added up, not means of batches, and the last batch is filled
up with ignored targets instead of being smaller: every token counts once, and a compiled model
sees one shape only.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from data.loader import read_windows
from data.order import validation_offsets
from data.shards import Split
from runtime.device import Device

IGNORED = -100  # a target that F.cross_entropy leaves out


class Validation:
    """``tokens`` (at most, None: all) of a split in windows of ``context``, ``rows`` at a time."""

    def __init__(self, split: Split, context: int, tokens: int | None, rows: int) -> None:
        self.split, self.context, self.rows = split, context, rows
        self.offsets = validation_offsets(len(split), context, tokens)

    @property
    def tokens(self) -> int:
        return len(self.offsets) * self.context

    @torch.no_grad()
    def loss(self, model: nn.Module, device: Device) -> float:
        """Mean loss in nats per token. Reads the device once, at the end."""
        was_training = model.training
        model.eval()
        sums = []
        for start in range(0, len(self.offsets), self.rows):
            windows = read_windows(
                self.split, self.offsets[start : start + self.rows], self.context
            )
            missing = self.rows - len(windows)
            inputs = torch.nn.functional.pad(windows[:, :-1], (0, 0, 0, missing))
            targets = torch.nn.functional.pad(windows[:, 1:], (0, 0, 0, missing), value=IGNORED)
            with device.autocast():
                sums.append(
                    model(device.to_device(inputs), device.to_device(targets), reduction="sum")
                )
        model.train(was_training)
        return math.fsum(torch.stack(sums).tolist()) / self.tokens
