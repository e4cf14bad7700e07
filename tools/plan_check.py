"""Plan against fact: plan, carry the plan out in a fresh folder, and compare time, memory, disk and bits per byte

    python tools/plan_check.py --hours 0.05 [--device cpu] [--memory-gb 4] [--out FOLDER]
    python tools/plan_check.py --all-candidates --hours 0.15     # is the chosen model the best of those in its table?

The first exits with 1 unless wall time is within 10 %, peak memory within 15 %, disk within 5 % and the bits per byte
inside the band, which at half an hour and more is at most 5 % to either side; with --memory-gb, also unless the run
stays below that. The second trains every candidate of the table for the same time and ranks them; it exits with 1
unless all this holds of the chosen one, it is within 1 % of the best measured, and better than the one with the most
tokens per second. Called again with the same --out it goes on with the candidates that are missing. Leave the machine
alone meanwhile.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from niels_gpt import files, paths
from niels_gpt.console import OutputConsole
from niels_gpt.plan.running import KEPT, comparison

WITHIN = {"seconds": 0.10, "peak_bytes": 0.15, "disk_bytes": 0.05}
WIDEST_BAND, WIDE_UNTIL = 0.05, 0.5  # half of the band over its middle; hours from which it must hold
NEAR_BEST = 0.01
MEASURED = "measured.json"
GB = 1e9


def niels(*arguments: str, cwd: Path) -> None:
    """Run a command of this checkout; CalledProcessError if it fails."""
    path = os.pathsep.join(filter(None, (str(paths.PROJECT_ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "niels_gpt.cli", *arguments]
    subprocess.run(command, cwd=cwd, env={**os.environ, "PYTHONPATH": path}, check=True)


def make_plan(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A plan as the command makes it."""
    given = ["--device", args.device] if args.device else []
    given += ["--memory-gb", f"{args.memory_gb:g}"] if args.memory_gb else []
    niels("plan", "--hours", f"{args.hours:g}", "--out", KEPT, *given, cwd=folder)
    plan: dict[str, Any] = files.read_json(folder / KEPT)
    return plan


def carry_out(folder: Path, device: str | None) -> dict[str, Any]:
    """What came of the plan in this folder."""
    niels("train", "--plan", KEPT, *(["--device", device] if device else []), cwd=folder)
    kept = [files.read_json(path) for path in sorted((folder / "runs").glob(f"*/{KEPT}"))]
    actual: dict[str, Any] = next(record["actual"] for record in reversed(kept) if "actual" in record)
    return actual


def verdicts(plan: Mapping[str, Any], actual: Mapping[str, Any]) -> dict[str, bool]:
    """What must hold, and whether it does."""
    chosen = plan["chosen"]
    planned = {**chosen, "seconds": chosen["total_seconds"]}
    found = {
        f"{name.split('_')[0]} within {share:.0%}": abs(actual[name] / planned[name] - 1) <= share
        for name, share in WITHIN.items()
    }
    band = chosen["prediction"]
    found["bits per byte inside the band"] = band["low"] <= actual["bpb"] <= band["high"]
    if plan["hours"] >= WIDE_UNTIL:
        wide = (band["high"] - band["low"]) / (2 * band["bpb"])
        found[f"band at most {WIDEST_BAND:.0%} to either side"] = wide <= WIDEST_BAND
    return found


def check_one(args: argparse.Namespace, folder: Path, console: Console) -> bool:
    plan = make_plan(args, folder)
    return held(args, plan, carry_out(folder, args.device), console)


def held(args: argparse.Namespace, plan: Mapping[str, Any], actual: Mapping[str, Any], console: Console) -> bool:
    """Show plan and fact side by side, and what of it holds."""
    console.print(comparison(plan["chosen"], actual))
    found = verdicts(plan, actual)
    if args.memory_gb:
        found[f"memory below {args.memory_gb:g} GB"] = actual["peak_bytes"] < args.memory_gb * GB
    for name, holds in found.items():
        console.print(f"{'yes' if holds else 'NO ':<4}{name}", markup=False)
    return all(found.values())


def check_all(args: argparse.Namespace, folder: Path, console: Console) -> bool:
    """Train every candidate that the table shows, the chosen one first."""
    begun = folder / MEASURED
    plan = files.read_json(folder / KEPT) if (folder / KEPT).is_file() else make_plan(args, folder)
    measured: dict[str, dict[str, Any]] = files.read_json(begun) if begun.is_file() else {}
    shown = plan["candidates"][: plan["settings"]["plan"]["shown"]]
    for candidate in shown:
        if candidate["name"] in measured:
            continue
        place = folder / candidate["name"]
        shutil.rmtree(place, ignore_errors=True)  # begun and broken off: its clock has run out
        place.mkdir()
        record = {**plan, "chosen": candidate, "settings": candidate["settings"]}
        files.write_json(place / KEPT, record)
        measured[candidate["name"]] = carry_out(place, args.device)
        files.write_json(begun, measured)
    as_planned = held(args, plan, measured[shown[0]["name"]], console)
    table = Table(title=f"every candidate trained for {args.hours:g} hours", title_justify="left")
    for column in ("model", "predicted", "measured", "difference", "tokens/s"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for candidate in sorted(shown, key=lambda c: measured[c["name"]]["bpb"]):
        name, bits = candidate["name"], measured[candidate["name"]]["bpb"]
        said = candidate["prediction"]["bpb"]
        figures = (f"{said:.4f}", f"{bits:.4f}", f"{bits / said - 1:+.1%}", f"{candidate['tokens_per_s']:,.0f}")
        table.add_row(("* " if candidate is shown[0] else "  ") + name, *figures)
    console.print(table)
    best = min(m["bpb"] for m in measured.values())
    chosen = measured[shown[0]["name"]]["bpb"]
    fastest = max(shown, key=lambda c: c["tokens_per_s"])["name"]
    near = chosen <= (1 + NEAR_BEST) * best
    beats = chosen < measured[fastest]["bpb"] or fastest == shown[0]["name"]
    console.print(f"{'yes' if near else 'NO ':<4}the chosen one is within {NEAR_BEST:.0%} of the best", markup=False)
    console.print(f"{'yes' if beats else 'NO ':<4}it beats the fastest, {fastest}, or is it", markup=False)
    return as_planned and near and beats


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Plan, carry out, compare.")
    parser.add_argument("--hours", type=float, required=True)
    parser.add_argument("--device")
    parser.add_argument("--memory-gb", type=float, metavar="X", help="plan for so much; the run must stay below it")
    parser.add_argument("--all-candidates", action="store_true", help="train every candidate of the table")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="an empty folder to work in (default: a temporary one)"
    )
    args = parser.parse_args(argv)
    folder = args.out or Path(tempfile.mkdtemp(prefix="niels-plan-"))
    folder.mkdir(parents=True, exist_ok=True)
    if args.all_candidates and (folder / KEPT).is_file():
        if (hours := files.read_json(folder / KEPT)["hours"]) != args.hours:
            parser.error(f"{folder} holds a comparison of {hours:g} hours")
    elif any(folder.iterdir()):
        parser.error(f"{folder} is not empty")
    console = OutputConsole(width=120)
    check = check_all if args.all_candidates else check_one
    try:
        return 0 if check(args, folder.resolve(), console) else 1
    except subprocess.CalledProcessError as error:
        print(f"error: {' '.join(error.cmd[2:])} ended with exit code {error.returncode}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
