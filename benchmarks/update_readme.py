"""Put the measured tables into README.md, between their markers: `python benchmarks/update_readme.py`."""

import json
import re
import sys
from pathlib import Path

from harness import RESULTS, markdown_table

README = Path(__file__).parent.parent / "README.md"


def cpu_table() -> str:
    """Speed and memory against the released form, from benchmarks/results/cpu.json."""
    content = json.loads((RESULTS / "cpu.json").read_text())
    by_key = {(row["model"], row["what"], row["peer"]): row for row in content["rows"]}
    rows = []
    for model, what in dict.fromkeys((row["model"], row["what"]) for row in content["rows"]):
        released, plain, ours = (by_key[model, what, peer] for peer in ("released", "ours, oneDNN off", "ours"))
        rows.append(
            {
                "CPU, fp32": f"{model}, {what}, batch {ours['batch']}",
                "released, ms": released["latency_ms"],
                "ours, ms": ours["latency_ms"],
                "ours": f"**{ours['speed']:.2f}×**",
                "without oneDNN": f"{plain['speed']:.2f}×",
                "released, peak MiB": released["peak_mib"],
                "ours, peak MiB": ours["peak_mib"],
            }
        )
    note = (
        f"{content['device']}, torch {content['torch']}, commit {content['commit']}; same weights, outputs and "
        "gradients compared first."
    )
    return f"{markdown_table(rows, list(rows[0]))}\n{note}\n"


def updated(text: str) -> str:
    """The README with its tables made anew."""
    pattern = r"(<!-- cpu-table:begin -->\n).*(<!-- cpu-table:end -->)"
    return re.sub(pattern, lambda match: match[1] + cpu_table() + match[2], text, flags=re.S)


def main() -> int:
    """Rewrite README.md."""
    README.write_text(updated(README.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
