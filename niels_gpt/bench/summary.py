"""What a sweep has found: the table that ranks configurations, as Markdown and as a page with plots for any browser."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from niels_gpt.files import write_text
from niels_gpt.plan.law import Prediction, shipped_law
from niels_gpt.plan.recipe import Size
from niels_gpt.settings import Settings
from niels_gpt.train.chart import PAGE, Points, panel

SECONDS = 8 * 3600  # a night
CLOSE = 0.9  # of the best throughput: worth a star
COLUMNS = ("Rank", "V", "T", "C", "L", "H", "d_ff", "AMP", "Ckpt", "micro_B", "ms/step", "tok/s", "tok_8h", "params")
QUALITY = "bpb_8h"
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Configuration:
    """One configuration of a sweep, with every row that was measured of it."""

    rows: tuple[Row, ...]

    @property
    def sizes(self) -> dict[int, Row]:
        """Rows of a microbatch -> what came of it, in order."""
        return dict(sorted((row["micro_B"], row) for row in self.rows))

    @property
    def working(self) -> list[Row]:
        return [row for row in self.sizes.values() if row["status"] == "ok"]

    @property
    def best(self) -> Row:
        """The fastest row; of equally fast ones the largest. Only where one works."""
        return max(self.working, key=lambda row: (row["tokens_per_sec"], row["micro_B"]))

    @property
    def tokens(self) -> float:
        """In a night."""
        return float(self.best["tokens_per_sec"]) * SECONDS

    @property
    def name(self) -> str:
        model, row = self.rows[0]["model"], self.rows[0]
        marks = [f"{row['amp_dtype']}"] if row["amp"] else []
        marks += ["checkpointing"] if row["activation_checkpointing"] else []
        return ", ".join([f"T{model['T']} C{model['C']} L{model['L']}", *marks])

    @property
    def fate(self) -> str:
        """How it went, in a few words."""
        if not self.working:
            row = self.rows[-1]
            return {"oom": "out of memory with one row", "timeout": "too slow with one row"}.get(
                row["status"], f"failed: {row.get('message', '?')}"
            )
        larger = [
            row for size, row in self.sizes.items() if row["status"] != "ok" and size > self.working[-1]["micro_B"]
        ]
        if not larger:
            return f"fits up to {self.working[-1]['micro_B']} rows, the largest tried"
        why = {"oom": "out of memory", "timeout": "too slow"}.get(larger[0]["status"], "failed")
        return f"fits up to {self.working[-1]['micro_B']} rows; {why} with {larger[0]['micro_B']}"


def configurations(rows: Iterable[Row]) -> list[Configuration]:
    """Rows by configuration, the last of each size, in the order of their beginning."""
    found: dict[str, dict[int, Row]] = {}
    for row in rows:
        if "key" in row:
            found.setdefault(row["key"], {})[row["micro_B"]] = row
    return [Configuration(tuple(sizes.values())) for sizes in found.values()]


def ranked(found: Iterable[Configuration]) -> list[Configuration]:
    """Those that work: most tokens in a night first; of equal ones the larger model."""
    return sorted((c for c in found if c.working), key=lambda c: (c.tokens, c.best["params"]), reverse=True)


def prediction(configuration: Configuration) -> Prediction:
    """Validation bits per byte after a night, if the text does not run out."""
    model, tokens = configuration.best["model"], configuration.tokens
    size = Size(configuration.best["params"], model["V"] * model["C"], flops=math.nan)
    return shipped_law().predict(size, tokens, unique=tokens)


def cells(rank: int, configuration: Configuration, most: float) -> list[str]:
    """A row of the table."""
    row, model = configuration.best, configuration.best["model"]
    star = " ⭐" if configuration.tokens >= CLOSE * most else ""
    bits = prediction(configuration)
    return [
        f"{rank}{star}",
        *(str(model[name]) for name in ("V", "T", "C", "L", "H", "d_ff")),
        str(row["amp"]) if row["amp"] is not True or row["amp_dtype"] == "fp16" else f"True ({row['amp_dtype']})",
        str(row["activation_checkpointing"]),
        str(row["micro_B"]),
        f"{row['ms_per_step']:.1f}",
        f"{row['tokens_per_sec']:.0f}",
        f"{configuration.tokens:.2e}",
        str(row["params"]),
        f"{bits.bpb:.3f} ({bits.low:.2f}-{bits.high:.2f})",
    ]


def markdown(device: str, found: list[Configuration], settings: Settings, machine: str) -> str:
    """The content of summary.md."""
    order = ranked(found)
    lines = ["# Benchmark Summary", "", f"**Device:** {device}", "", f"**Machine:** {machine}", ""]
    if not order:
        lines += ["No configuration works here.", ""]
    else:
        lines += ["## Top Configurations", "", "Ranked by estimated 8-hour throughput, then parameter count.", ""]
        lines.append("| " + " | ".join([*COLUMNS, QUALITY]) + " |")
        lines.append("|" + "---|" * (len(COLUMNS) + 1))
        for rank, configuration in enumerate(order, start=1):
            lines.append("| " + " | ".join(cells(rank, configuration, order[0].tokens)) + " |")
        lines += [
            "",
            "⭐ = Within 90% of best throughput",
            "",
            EXPLANATION,
            "",
            *advice(best_predicted(order), settings),
        ]
    lines += ["## How large a microbatch fits", ""]
    lines += [f"- {configuration.name}: {configuration.fate}" for configuration in found]
    return "\n".join(lines) + "\n"


EXPLANATION = (
    f"{QUALITY}: predicted validation bits per byte after these 8 hours, between which they should lie, with the"
    " quickstart's recipe on text that does not run out; less is better. It is what counts: the fastest model is often"
    " too small to become good."
)


def best_predicted(order: list[Configuration]) -> Configuration:
    """The one with the fewest predicted bits."""
    return min(order, key=lambda c: prediction(c).bpb)


def advice(chosen: Configuration, settings: Settings) -> list[str]:
    """How to train a configuration overnight."""
    row, model, phase = chosen.best, chosen.best["model"], settings.training.pretrain
    accum = max(1, round(phase.rows / row["micro_B"]))
    per_step = row["micro_B"] * accum * model["T"]
    steps = int(chosen.tokens / per_step)
    shape = ", ".join(f'"{name}": {model[name]}' for name in ("T", "C", "L", "H", "d_ff"))
    knobs = {name: row[name] for name in ("micro_B", "amp", "amp_dtype", "activation_checkpointing")}
    knobs |= {"accum_steps": accum, "total_steps": steps, "warmup_steps": min(phase.warmup_steps, steps)}
    training = ", ".join(f'"{name}": {_json(value)}' for name, value in knobs.items())
    return [
        f"## Train {chosen.name} overnight",
        "",
        f"effective_batch = micro_B * accum_steps = {row['micro_B']} * {accum} = {row['micro_B'] * accum} rows"
        f" (the settings ask for {phase.rows});"
        f" steps_8h = tokens/sec * 8 * 3600 / (micro_B * accum_steps * T) = {steps:,}. As settings:",
        "",
        "```json",
        f'{{"model": {{{shape}}},\n "training": {{"pretrain": {{{training}}}}}}}',
        "```",
        "",
    ]


def _json(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else str(value)


def page(device: str, found: list[Configuration], machine: str) -> str:
    """The content of summary.html: the table and three plots, with nothing from outside."""
    order = ranked(found)
    body = ""
    if order:
        rows = [cells(rank, c, order[0].tokens) for rank, c in enumerate(order, start=1)]
        head = "".join(f"<th>{name}</th>" for name in (*COLUMNS, QUALITY))
        lines = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        body += f"<table style='font-size:12px;text-align:right'><tr>{head}</tr>{lines}</table>"
        body += f"<p>⭐ = within 90% of best throughput. {html.escape(EXPLANATION)}</p>"
    speed = {c.name: _curve(c, "tokens_per_sec", 1) for c in order}
    memory = {c.name: _curve(c, "peak_bytes", 1e-6) for c in order}
    bits = {c.name: [(c.best["params"] / 1e6, prediction(c).bpb)] for c in order}
    body += panel("tokens per second", speed, by="rows of a microbatch", doubling=True)
    body += panel("peak memory, MB", memory, by="rows of a microbatch", doubling=True)
    body += panel("predicted bits per byte after 8 hours", bits, by="million parameters")
    body += "<ul>" + "".join(f"<li>{html.escape(f'{c.name}: {c.fate}')}</li>" for c in found) + "</ul>"
    return PAGE.format(title="Benchmark", summary=html.escape(f"{device}: {machine}"), body=body)


def table(order: list[Configuration]) -> Table:
    """The ranking for a terminal."""
    shown = Table(title="most tokens in 8 hours first", title_justify="left")
    chosen = [0, *range(len(COLUMNS) - 5, len(COLUMNS) + 1)]
    names = [*COLUMNS, QUALITY]
    shown.add_column("configuration")
    for column in chosen:
        shown.add_column(names[column], justify="right")
    for rank, configuration in enumerate(order, start=1):
        row = cells(rank, configuration, order[0].tokens)
        shown.add_row(configuration.name, *(row[column] for column in chosen))
    return shown


def _curve(configuration: Configuration, name: str, scale: float) -> Points:
    return [(row["micro_B"], row[name] * scale) for row in configuration.working if row.get(name)]


def write(folder: Path, device: str, rows: Iterable[Row], settings: Settings, machine: str) -> list[Configuration]:
    """Replace summary.md and summary.html; returns what they are about."""
    found = configurations(rows)
    write_text(folder / "summary.md", markdown(device, found, settings, machine))
    write_text(folder / "summary.html", page(device, found, machine))
    return found
