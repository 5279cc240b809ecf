"""What only a GPU can show; `scripts/gpu_check.sh` runs the same functions without pytest."""

from __future__ import annotations

import pytest
import torch

from scripts.gpu_claims import Claim, claims

CLAIMS = claims()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS.keys())
def test_holds_on_a_gpu(claim: Claim) -> None:
    claim(torch.device("cuda"))
