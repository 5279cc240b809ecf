"""docs/distributed.md says what the code does."""

from __future__ import annotations

from optim import list_optimizers
from scripts.plan_parallel import PAGE, document, granularities, settings


def test_the_page_is_what_the_code_says() -> None:
    page = PAGE.read_text()
    assert document(page) == page, "stale: run python -m scripts.plan_parallel"
    assert all(f"| {name} |" in page for name in list_optimizers())


def test_the_kinds_of_rules() -> None:
    expected = {
        "adamw": "element",
        "mars_adamw": "tensor, element",
        "cautious_adamw": "tensor",
        "came": "tensor",
        "muon": "matrix, element",
    }
    found = {name: granularities(settings(name)) for name in expected}
    assert found == expected
