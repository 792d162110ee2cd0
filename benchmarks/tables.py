"""Writes the README's tables from the committed records, so that no figure is typed by hand.

python -m benchmarks.tables          # rewrite the marked blocks of README.md
python -m benchmarks.tables --check  # fail where they differ from the records
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"


def lookup_text(row: dict[str, Any]) -> str:
    """The speed-up over prompt lookup, and on how many prompts that ran at all."""
    if row["speed_up_over_prompt_lookup"] is None:
        return "it fails on all prompts"
    return f"{row['speed_up_over_prompt_lookup']:.2f}x ({row['prompts_that_prompt_lookup_served']} prompts)"


def speed(record: dict[str, Any]) -> list[str]:
    """Speed over plain generation, and where a round's time goes."""
    lines = [
        "| dtype | tree (depth, top_k, nodes) | tau | tokens a round | over `generate` | over prompt lookup "
        "| ties | draft / verify / accept |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        tree = row["tree"]
        shares = " / ".join(f"{row[f'{name}_share']:.0%}" for name in ("draft", "verify", "accept"))
        lines.append(
            f"| {row['dtype']} | {tree['depth']}, {tree['top_k']}, {tree['total_tokens']} "
            f"| {row['tau']:.2f} | {row['tau'] + 1:.2f} "
            f"| {row['speed_up']:.2f}x | {lookup_text(row)} "
            f"| {row['ties']} of {row['prompts']} | {shares} |"
        )
    return lines


def memory(record: dict[str, Any]) -> list[str]:
    """Peak memory of one answer."""
    (row,) = record["rows"]
    return [
        "| | peak memory |",
        "|---|---|",
        *(
            f"| {name} | {row[f'{way}_peak_bytes'] / 2**20:.0f} MiB |"
            for way, name in (("load", "loading alone"), ("plain", "`generate`"), ("vispec", "`fast_generate`"))
        ),
    ]


# Block name in the README: the record's file and how it is shown.
BLOCKS = {
    "speed": ("generate_cpu.json", speed),
    "memory": ("memory_cpu.json", memory),
}


def source(record: dict[str, Any]) -> str:
    """One line that says where the figures come from."""
    about = record["circumstances"]
    hardware = about["gpu"] or f"{about['cpu']}, {about['cpu_threads']} threads"
    return (
        f"Measured on {hardware}; torch {about['torch']}, transformers {about['transformers']}, "
        f"commit {(about['commit'] or 'unknown')[:10]}."
    )


def rendered(text: str) -> str:
    """The README with every marked block written anew."""
    for name, (file, show) in BLOCKS.items():
        path = RESULTS / file
        if path.is_file():
            record = json.loads(path.read_text())
            body = "\n".join([*show(record), "", source(record)])
        else:
            body = "Not yet measured."
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"tables: README.md must hold the block <!-- {name} --> ... <!-- /{name} -->")
        text = pattern.sub(lambda match, body=body: match[1] + body + match[2], text)
    return text


def main() -> None:
    text = README.read_text()
    wanted = rendered(text)
    if "--check" in sys.argv[1:]:
        if text != wanted:
            raise SystemExit("tables: README.md differs from benchmarks/results; run python -m benchmarks.tables")
        return
    README.write_text(wanted)


if __name__ == "__main__":
    main()
