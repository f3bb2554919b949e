"""All benchmarks, or those named, each in a process of its own; then one page of the results that are there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from shared.report import page
from tests.benchmarks.harness import RESULTS

HERE = Path(__file__).parent
NO_SCRIPTS = ("__init__", "__main__", "harness")


def scripts() -> list[str]:
    return sorted(path.stem for path in HERE.glob("*.py") if path.stem not in NO_SCRIPTS)


def main() -> int:
    wanted = sys.argv[1:] or scripts()
    if unknown := [name for name in wanted if name not in scripts()]:
        print(f"no benchmark {unknown[0]!r}; there are: {', '.join(scripts())}", file=sys.stderr)
        return 2
    failed = []
    for name in wanted:
        print(f"== {name}", flush=True)
        if subprocess.run([sys.executable, "-m", f"tests.benchmarks.{name}"], check=False).returncode:
            failed.append(name)
    told = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]
    page.write(RESULTS / "page.html", page.page("Benchmarks", *(_section(each) for each in told)))
    print(f"page: {RESULTS / 'page.html'}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def _section(told: dict[str, Any]) -> str:
    about = ", ".join(f"{key} {value}" for key, value in told["machine"].items() if value is not None)
    rows = [
        (
            row["case"],
            row["measure"],
            f"{row['value']:.3g}",
            f"{row['low']:.3g} to {row['high']:.3g}",
            "" if row["target"] is None else f"{'≤' if row['below'] else '≥'} {row['target']:g}",
            {None: "", True: "yes", False: "no"}[row["reached"]],
            row["note"],
        )
        for row in told["rows"]
    ]
    heads = ("case", "measure", "median", "quartiles", "asked", "reached", "note")
    return page.section(told["script"].replace("_", " "), page.note(about), page.table(heads, rows, numbers=2))


if __name__ == "__main__":
    sys.exit(main())
