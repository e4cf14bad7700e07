"""`niels-gpt doctor`: will training work here? Every choice for this machine with its reason, and a small try.

    niels-gpt doctor [--json] [--device auto|cuda|mps|cpu] [--config FILE] [--no-self-test]

Without --config it is about `niels-gpt quickstart` in the current folder. The self-test takes 20 seconds at most.
Exit code 0 if training will work, 1 if it will not, 2 for wrong usage.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from niels_gpt import paths
from niels_gpt.command import exit_status
from niels_gpt.console import OutputConsole
from niels_gpt.device import resolve_device
from niels_gpt.doctor.checks import Check, all_checks, device_of
from niels_gpt.doctor.look import look_around
from niels_gpt.doctor.trying import Outcome, try_it
from niels_gpt.machine import probe
from niels_gpt.plan.recipe import CONFIG
from niels_gpt.settings import Settings, load_overrides, validate_overrides

MARKS = {"ok": ("✓", "green"), "note": ("!", "yellow"), "problem": ("✗", "red")}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="niels-gpt doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the screen")
    parser.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    parser.add_argument("--config", metavar="FILE", help="look at a run of these settings instead of the quickstart's")
    parser.add_argument("--no-self-test", action="store_true", help="only look")
    args = parser.parse_args(argv)
    try:
        settings = settings_of(args.config)
        device = resolve_device(args.device) if args.device != "auto" else None
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return exit_status(lambda: examine(args, settings, device))


def examine(args: argparse.Namespace, settings: Settings, device: str | None) -> int:
    """Look, try, and say it; the exit code. device: None for the one that training would choose."""
    with Console(stderr=True).status("looking around; compiles native code if that was never done"):
        machine = probe()
        device = device or device_of(machine)
        checks = all_checks(machine, look_around(settings, args.config), device)
    outcome = None
    if not args.no_self_test:
        with Console(stderr=True).status("self-test: train, save, load, decode"):
            outcome = try_it(device)
    checks.append(check_of(outcome))
    works = all(check.status != "problem" for check in checks)
    if args.json:
        record = {"works": works, "device": device, "machine": asdict(machine)}
        record |= {"checks": [asdict(check) for check in checks], "self_test": asdict(outcome) if outcome else None}
        print(json.dumps(record, indent=2))
    else:
        show(OutputConsole(soft_wrap=False), checks, works)
    return 0 if works else 1


def settings_of(config: str | None) -> Settings:
    return validate_overrides(load_overrides(Path(config) if config else paths.shipped(CONFIG)))


def check_of(outcome: Outcome | None) -> Check:
    """The self-test as a check."""
    if outcome is None:
        return Check("self-test", "note", "left out", "--no-self-test was given", "", "niels-gpt doctor")
    if outcome.status == "ok":
        return Check("self-test", "ok", f"{outcome.seconds.get('all', 0):.1f} s", outcome.message)
    value = "failed" if outcome.status == "problem" else "not finished"
    return Check(
        "self-test", outcome.status, value, outcome.message, "", "niels-gpt quickstart --minutes 0.05 --out try"
    )


def show(console: Console, checks: list[Check], works: bool) -> None:
    """One screen: every check with its reason and what there is instead, then what to run, then the verdict."""
    table = Table.grid(padding=(0, 1))
    for _ in range(3):
        table.add_column(overflow="fold")  # in a narrow terminal a long name goes on below, and is not cut
    for check in checks:
        mark, colour = MARKS[check.status]
        line = Text.assemble((check.value, "bold"), f": {check.reason}")
        if check.fallback:
            line.append(f" (or: {check.fallback})", style="dim")
        table.add_row(Text(mark, style=colour), Text(check.name), line)
    console.print(table)
    for check in checks:
        if check.command and check.status != "ok":
            why = "needed" if check.status == "problem" else "to improve"
            console.print(Text.assemble(f"{why}, {check.name}: ", (check.command, "bold")), soft_wrap=True)
    verdict = "Training will work here." if works else "Training will not work here as it is."
    console.print(Text(verdict, style="bold green" if works else "bold red"))


if __name__ == "__main__":
    sys.exit(main())
