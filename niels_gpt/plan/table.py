"""A plan for people: the candidates in one table, and what the chosen one will take"""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from niels_gpt.plan.candidates import Candidate
from niels_gpt.plan.planning import Plan
from niels_gpt.train.report import duration


def show(console: Console, plan: Plan, shown: int) -> None:
    """Print the table and the chosen run."""
    text, chosen = plan.text, plan.chosen
    names = ", ".join(f"{source.name} {source.train_bytes / 1e6:,.1f} MB" for source in text.pretrain)
    console.print(
        f"{plan.hours:g} hours on {plan.machine.device} ({plan.machine.name}, {plan.machine.precision});"
        f" text: {names}: {text.unique_tokens / 1e6:,.2f} M tokens",
        markup=False,
    )
    console.print(_table(plan, shown))
    seconds = chosen.seconds
    parts = ", ".join(f"{name} {clock(seconds[name])}" for name in seconds)
    console.print(f"time {clock(chosen.total_seconds)}: {parts}", markup=False)
    for line in remarks(plan):
        console.print(line, markup=False)


def _table(plan: Plan, shown: int) -> Table:
    source = plan.settings.data.val_pretrain_source
    table = Table(title=f"candidates, best first (bits per byte of held-out {source})", title_justify="left")
    columns = ("", "model", "parameters", "bits per byte", "tokens", "epochs", "steps", "batch", "rate", "memory")
    for column in (*columns, "disk", "tokens/s", "time"):
        table.add_column(column, justify="left" if column in ("", "model") else "right", no_wrap=True)
    for candidate in plan.candidates[:shown]:
        table.add_row("*" if candidate is plan.chosen else "", *_cells(candidate))
    return table


def _cells(c: Candidate) -> tuple[str, ...]:
    p = c.prediction
    batch = f"{c.micro_B}" + (f"x{c.accum_steps}" if c.accum_steps > 1 else "") + ("c" if c.checkpointing else "")
    return (
        c.shape.name,
        f"{c.size.parameters / 1e6:,.2f} M",
        f"{p.bpb:.3f} ({p.low:.3f}-{p.high:.3f})",
        f"{c.tokens / 1e6:,.2f} M",
        f"{c.epochs:.1f}",
        f"{c.steps['pretrain']:,}+{c.steps['sft']:,}",
        batch,
        f"{c.base_lr:.3g}",
        f"{c.peak_bytes / 1e9:.2f} GB",
        f"{c.disk_bytes / 1e6:,.0f} MB",
        f"{c.tokens_per_s:,.0f}" + ("" if c.measured else "~"),
        clock(c.total_seconds),
    )


def remarks(plan: Plan) -> list[str]:
    """What a reader of the table should know."""
    chosen, said = plan.chosen, []
    if chosen.total_seconds < 0.95 * 3600 * plan.hours:
        said.append(
            f"more time would not make it better: the text is read {chosen.epochs:.0f} times by then; more text would"
        )
    elif chosen.epochs > 4:
        said.append(f"the text is read {chosen.epochs:.1f} times; more text would help (--sources)")
    if not plan.known_text:
        said.append("the curve was fitted to other text, so the band is wide")
    if any(not c.measured for c in plan.candidates):
        said.append("~ not measured: carried over from other sizes by arithmetic")
    return said


def clock(seconds: float) -> str:
    """`1:02:05`, `3:07`, `42 s`."""
    return f"{seconds:.0f} s" if seconds < 60 else duration(seconds)
