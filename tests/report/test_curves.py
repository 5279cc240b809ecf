"""loss.png: drawn from whatever a metrics.jsonl can hold, without touching pyplot."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from report.curves import main, plot_loss, short, smooth
from runtime.metrics import MetricsLog

ROOT = Path(__file__).resolve().parents[2]


def write_run(run_dir: Path, rows: Sequence[Mapping[str, float]]) -> Path:
    log = MetricsLog(run_dir, [], None)
    for step, row in enumerate(rows):
        log.log(step, 1024 * step, 0.1 * step, row)
    log.close()
    return run_dir


CASES: dict[str, list[dict[str, float]]] = {
    "empty": [],
    "nothing measured": [{"lr": 1.0}] * 3,
    "step 0 only": [{"val/loss": 11.0}],
    "one training point": [{}, {"train/loss": 3.0}],
    "validation only": [{"val/loss": 4.0}, {}, {"val/loss": 3.0}],
    "all nan": [{"train/loss": math.nan, "val/loss": math.inf}] * 50,
    "constant": [{"train/loss": 2.0}] * 200,
    "some nan": [{"train/loss": math.nan if i % 7 == 0 else 10 / (i + 1)} for i in range(300)],
    "validation at the start of a long run": [{"val/loss": 9.0}] + [{"train/loss": 3.0}] * 200,
    "explosion": [{"train/loss": 1e30 if i == 150 else 3.0} for i in range(300)],
}


@pytest.mark.parametrize("rows", CASES.values(), ids=CASES.keys())
def test_draws_anything_without_a_warning(
    tmp_path: Path, rows: Sequence[Mapping[str, float]]
) -> None:
    write_run(tmp_path, rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = plot_loss(tmp_path, {"byte bigram": 2.4})
        plot_loss(tmp_path, None, bits_per_byte=0.3)
    assert path == tmp_path / "loss.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert {file.name for file in tmp_path.iterdir()} == {"loss.png", "metrics.jsonl"}


def test_ink_is_where_the_loss_is(tmp_path: Path) -> None:
    """A falling loss goes from top left to bottom right: look for the training color."""
    image = pytest.importorskip("matplotlib.image")
    rows = [{"train/loss": 5.0 - step / 100} for step in range(1, 301)]
    pixels = image.imread(plot_loss(write_run(tmp_path, rows), None))[:, :, :3]
    blue = np.all(np.abs(pixels - np.array([0x3B, 0x6E, 0xA8]) / 255) < 0.02, axis=2)
    blue = blue[: int(0.9 * blue.shape[0])]  # without the legend below
    heights, columns = np.nonzero(blue)
    assert columns.max() - columns.min() > 0.8 * blue.shape[1]
    assert np.corrcoef(columns, heights)[0, 1] > 0.99  # row numbers grow downwards


def test_smoothing_neither_lags_nor_invents() -> None:
    line = np.linspace(5.0, 2.0, 101)
    np.testing.assert_allclose(smooth(line, 10), line, rtol=1e-12)  # exact also at both ends
    noise = np.random.default_rng(0).normal(size=10_000)
    assert smooth(noise, 50)[100:-100].std() == pytest.approx(101**-0.5, rel=0.2)
    assert smooth(np.array([1.0]), 5) == [1.0]
    np.testing.assert_allclose(smooth(np.array([0.0, 3.0, 0.0]), 1), [0.0, 1.0, 0.0])


def test_token_counts_are_short() -> None:
    counts = [0, 12.5, 999, 1500, 2_500_000, 5e9, 3e12]
    assert [short(n) for n in counts] == ["0", "12.5", "999", "1.5k", "2.5M", "5B", "3T"]


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(write_run(tmp_path, [{"train/loss": 1.0}] * 3))])
    assert capsys.readouterr().out.strip() == str(tmp_path / "loss.png")
    result = subprocess.run(
        [sys.executable, "-m", "report.curves", str(tmp_path / "nowhere")],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and "metrics.jsonl does not exist" in line


def test_pyplot_stays_out(tmp_path: Path) -> None:
    write_run(tmp_path, [{"train/loss": 1.0}] * 3)
    code = (
        "import sys; from pathlib import Path; from report.curves import plot_loss;"
        "assert 'matplotlib' not in sys.modules; plot_loss(Path(sys.argv[1]), None);"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True)
