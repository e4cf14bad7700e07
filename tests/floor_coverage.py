"""Lines and branches that the tests reach on each floor of the package: python -m tests.floor_coverage

Reads what `coverage run -m pytest` and `coverage combine` left behind (`make coverage` does all three). The exit code
is 1 if less than 90 % of the lines of floors 0 to 4 are reached; floor 5 holds the programs.
"""

import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import coverage
from rich.console import Console
from rich.table import Table

from tests.test_floors import FLOORS, PACKAGE, dotted, floor

LEAST = 90.0  # percent of lines
HIGHEST = max(FLOORS) - 1


def measured() -> dict[Path, dict[str, int]]:
    """file of the package -> what coverage counted in it."""
    data = coverage.Coverage()
    data.load()
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "report.json"
        data.json_report(outfile=str(target), include=[f"{PACKAGE}/*"], ignore_errors=True)
        found = json.loads(target.read_text())["files"]
    return {Path(name).resolve(): file["summary"] for name, file in found.items()}


def share(reached: int, there: int) -> float:
    return 100 * reached / there if there else 100.0


def main() -> int:
    floors: dict[int, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    files = measured()
    for path, counted in files.items():
        for key in ("covered_lines", "num_statements", "covered_branches", "num_branches"):
            floors[floor(dotted(path)) if path.name != "__init__.py" else 0][key] += counted[key]
    table = Table("floor", "statements", "lines reached", "branches reached", title="coverage", title_justify="left")
    lines = {"covered_lines": 0, "num_statements": 0, "covered_branches": 0, "num_branches": 0}

    def row(name: str, counted: dict[str, int]) -> None:
        reached = share(counted["covered_lines"], counted["num_statements"])
        branches = share(counted["covered_branches"], counted["num_branches"])
        table.add_row(name, str(counted["num_statements"]), f"{reached:.1f} %", f"{branches:.1f} %")

    for number in sorted(floors):
        row(str(number), floors[number])
        if number <= HIGHEST:
            lines = {key: lines[key] + floors[number][key] for key in lines}
    row(f"0 to {HIGHEST}", lines)
    console = Console(highlight=False, width=100)
    console.print(table)
    lowest = sorted((share(c["covered_lines"], c["num_statements"]), dotted(p)) for p, c in files.items())[:10]
    console.print("least reached: " + ", ".join(f"{name} {percent:.0f} %" for percent, name in lowest))
    return 0 if share(lines["covered_lines"], lines["num_statements"]) >= LEAST else 1


if __name__ == "__main__":
    sys.exit(main())
