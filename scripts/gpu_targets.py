"""What a GPU should reach, what scripts/gpu_check.py found, and the verdicts as a table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from runtime.describe import aligned
from scripts.gpu_parts import Row, short
from scripts.gpu_plan import GRAPHS

Rows = dict[str, list[Row]]  # by part

COLUMNS = {
    "card": "device matmul_tflops datasheet_tflops copy_tb_per_s memory_gb torch cuda python",
    "speed": (
        "size setting optimizer compile with micro_batch global_batch tokens_per_s mfu of_matmul "
        "memory_gb step_ms forward_ms backward_ms optimizer_ms first_step_s start_cold_s "
        "start_warm_s times_plain ddp fsdp skipped error"
    ),
    "optimizers": (
        "size optimizer mode ms worst_ms times_fused floor_ms times_floor of_step state_bytes "
        "product whole_ms blocks_256 blocks_512 kernel without skipped error"
    ),
    "claims": "claim seconds skipped error",
    "training": (
        "optimizer step tokens val_loss val_bits_per_byte bigram_bits_per_byte tokens_per_s "
        "memory_gb stopped_by skipped error"
    ),
}


@dataclass(frozen=True)
class Target:
    what: str
    limit: float
    least: bool  # else at most
    value: Callable[[Rows], float | None]  # None: not measured

    def verdict(self, rows: Rows) -> Row:
        value = self.value(rows)
        outcome = "not measured"
        if value is not None:
            reached = value >= self.limit if self.least else value <= self.limit
            outcome = "pass" if reached else "fail"
        sign = ">=" if self.least else "<="
        return {
            "what": self.what,
            "target": f"{sign} {short(self.limit)}",
            "measured": value,
            "verdict": outcome,
        }


def find(rows: Rows, part: str, column: str, **match: Any) -> float | None:
    """The column of the part's first row that has these values and it."""
    for row in rows.get(part, []):
        if column in row and all(row.get(key) == value for key, value in match.items()):
            return row[column]
    return None


def speed(column: str, size: str, **match: Any) -> Callable[[Rows], float | None]:
    """Of the size's rows that have these values and the column, by default of our compiled step
    with AdamW, that of the fastest: a size may have been compiled in both ways."""
    wanted = {"setting": "ours", "optimizer": "adamw", "with": "", **match}

    def value(rows: Rows) -> float | None:
        found = [
            row
            for row in rows.get("speed", [])
            if all(row[key] == value for key, value in {"size": size, **wanted}.items())
            and column in row
            and (wanted["setting"] != "ours" or row["compile"] != "no")
        ]
        return max(found, key=lambda row: row.get("tokens_per_s", 0))[column] if found else None

    return value


def product(way: str, size: str, name: str) -> Callable[[Rows], float | None]:
    """Of the size's product whose name begins so."""

    def ratio(rows: Rows) -> float | None:
        of_size = [r for r in rows.get("optimizers", []) if r["size"] == size]
        found = (r for r in of_size if r.get("product", "").startswith(name))
        return next(found, {}).get(way)

    return ratio


def update(column: str, size: str, optimizer: str) -> Callable[[Rows], float | None]:
    return lambda rows: find(rows, "optimizers", column, size=size, optimizer=optimizer)


def against_plain(rows: Rows) -> float | None:
    """Tokens per second of ours as a multiple of the plain step's, GPT-2 small, both compiled as a
    whole."""
    ours = speed("tokens_per_s", "small", compile="whole")(rows)
    plain = speed("tokens_per_s", "small", setting="plain")(rows)
    return None if ours is None or plain is None else ours / plain


def large_memory(rows: Rows) -> float | None:
    """Of GPT-2 large, where the micro-batch is 32 at least."""
    micro = speed("micro_batch", "large")(rows)
    return speed("memory_gb", "large")(rows) if micro is not None and micro >= 32 else None


def broken_claims(rows: Rows) -> float | None:
    held = [row for row in rows.get("claims", []) if "skipped" not in row]
    return float(sum("error" in row for row in held)) if held else None


def runs(rows: Rows) -> float | None:
    """Real runs that ended with a lower loss than a byte-bigram model of the same text, or, where
    the text is not bytes, that ended."""
    ended = [row for row in rows.get("training", []) if "val_loss" in row]
    good = [
        row
        for row in ended
        if row["bigram_bits_per_byte"] is None
        or row["val_bits_per_byte"] < row["bigram_bits_per_byte"]
    ]
    return float(len(good)) if ended else None


TARGETS = (
    Target("GPT-2 small, tokens/s", 600e3, True, speed("tokens_per_s", "small")),
    Target("GPT-2 medium, tokens/s", 235e3, True, speed("tokens_per_s", "medium")),
    Target("GPT-2 large, tokens/s", 112e3, True, speed("tokens_per_s", "large")),
    Target("small, of the matrix-product rate", 0.65, True, speed("of_matmul", "small")),
    Target("medium, of the matrix-product rate", 0.65, True, speed("of_matmul", "medium")),
    Target("large, of the matrix-product rate", 0.65, True, speed("of_matmul", "large")),
    Target("small, times the plain step", 1.3, True, against_plain),
    Target(
        "a quarter of small, MARS-AdamW, times the plain step",
        3.0,
        True,
        speed("times_plain", "small", setting="mars pair", optimizer="mars_adamw"),
    ),
    *(
        Target(
            f"small, start of train.py to first update, {name} cache, s",
            limit,
            False,
            speed(f"start_{name}_s", "small", setting="start"),
        )
        for name, limit in (("cold", 60.0), ("warm", 15.0))
    ),
    Target("large at a micro-batch of 32 or more, GB", 80.0, False, large_memory),
    *(
        Target(f"{size}, {name}, times bytes / bandwidth", limit, False, update(column, size, name))
        for size in ("small", "large")
        for name, column, limit in (
            ("adamw", "times_floor", 1.2),
            ("mars_adamw", "times_floor", 1.25),
        )
    ),
    *(
        Target(f"{size}, {name}, share of the step", limit, False, update("of_step", size, name))
        for size in ("small", "large")
        for name, limit in (("muon", 0.01), ("shampoo", 0.1), ("soap", 0.15))
    ),
    *(
        Target(
            f"small, {name}, times fused AdamW", limit, False, update("times_fused", "small", name)
        )
        for name, limit in (("adamw", 1.1), ("mars_adamw", 1.7), ("lion", 0.85))
    ),
    Target(
        "large, x x^T by our kernel, times whole", 0.7, False, product("kernel", "large", "x x^T")
    ),
    *(
        Target(
            f"small, one process in {name.upper()}, of the unwrapped rate",
            0.98,
            True,
            speed(name, "small", setting="wrappers"),
        )
        for name in ("ddp", "fsdp")
    ),
    Target("claims that do not hold", 0.0, False, broken_claims),
    Target("real runs below the byte-bigram mark", 3.0, True, runs),
)


WHOLE, BLOCKS, EAGER = ({"compile": how} for how in ("whole", "blocks", "no"))
GAINED = ("what", "times_tokens_per_s", "times_memory_gb")
ONE = {"setting": "one micro-batch"}
GAINS: tuple[
    tuple[str, dict[str, str], dict[str, str]], ...
] = (  # and rows of small: with, without
    ("compiled as a whole", WHOLE, EAGER),
    ("compiled layer by layer", BLOCKS, EAGER),
    ("loss in 8 chunks", {**BLOCKS, "with": "model.loss_chunks=8"}, BLOCKS),
    ("vocabulary padded", BLOCKS, {**BLOCKS, "with": "model.vocab_multiple=1"}),
    ("bf16 instead of float32 (TF32)", BLOCKS, {**BLOCKS, "with": "train.precision=fp32"}),
    ("CUDA graphs, one micro-batch", {**ONE, "with": GRAPHS}, ONE),
)


def gains(rows: Rows) -> list[Row]:
    """What a technique that was measured with and without gained, as multiples of without."""
    found: list[Row] = []
    for what, having, without in GAINS:
        row: Row = {"what": what}
        for column in ("tokens_per_s", "memory_gb"):
            a, b = (figure(rows, column, match) for match in (having, without))
            if a is not None and b is not None:
                row[f"times_{column}"] = a / b
        found += [row] if len(row) > 1 else []
    return found


def figure(rows: Rows, column: str, match: dict[str, str]) -> float | None:
    """Of GPT-2 small with AdamW."""
    wanted = {"size": "small", "setting": "ours", "optimizer": "adamw", "with": "", **match}
    return find(rows, "speed", column, **wanted)


def verdicts(rows: Rows) -> list[Row]:
    """A row per target, in order."""
    return [target.verdict(rows) for target in TARGETS]


def text_table(columns: Sequence[str], rows: Iterable[Row]) -> str:
    return aligned([list(columns), *(cells(columns, row) for row in rows)])


def markdown_table(columns: Sequence[str], rows: Iterable[Row]) -> str:
    lines = [list(columns), ["---"] * len(columns), *(cells(columns, row) for row in rows)]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def cells(columns: Sequence[str], row: Row) -> list[str]:
    return [short(row[c]) if row.get(c) is not None else "" for c in columns]


def used(part: str, rows: Sequence[Row]) -> list[str]:
    """The part's columns that some row has."""
    return [c for c in COLUMNS[part].split() if any(row.get(c) not in (None, "") for row in rows)]


def document(result: Row) -> str:
    """Everything as Markdown, for docs/benchmarks.md."""
    parts: Rows = {name: part["rows"] for name, part in result["parts"].items()}
    card = parts["card"][0] if parts.get("card") else {}
    head = ", ".join(f"{key} {card[key]}" for key in ("torch", "cuda", "python") if card.get(key))
    toy = " Toy sizes: a trial of the script, no measurement." if result["smoke"] else ""
    lines = [
        f"{card.get('device', 'no device')}; {head}; {result['date_utc'][:10]}; "
        f"`bash scripts/gpu_check.sh`, {result['seconds']:.0f} s.{toy}",
        markdown_table(("what", "target", "measured", "verdict"), result["verdicts"]),
    ]
    if found := gains(parts):
        lines += ["### What each technique gained", markdown_table(list(GAINED), found)]
    for name, rows in parts.items():
        shown = [row for row in rows if not {"curves"} & row.keys()]
        if shown:
            lines += [f"### {name}", markdown_table(used(name, shown), shown)]
        if result["parts"][name]["failed"]:
            lines.append(f"The part did not end well: {result['parts'][name]['failed']}.")
    return "\n\n".join(lines) + "\n"
