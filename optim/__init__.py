"""Optimizers for pretraining, usable in any training loop with torch alone:

from optim import create_optimizer, list_optimizers
"""

from optim.create import create_optimizer, list_optimizers
from optim.norms import clip_grad_norm
from optim.optimizer import Optimizer
from optim.schedule import Schedule

__all__ = ["Optimizer", "Schedule", "clip_grad_norm", "create_optimizer", "list_optimizers"]
