"""The rows as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["markdown_table"]

_HEAD = ("row", "what", "ratio", "target", "", "spread", "others' load")


def markdown_table(content: Mapping[str, Any]) -> str:
    """Return the table of all rows, and below it what each found equal and what else it measured.

    Args:
        content: ``machine`` (name -> value) and ``rows`` (`Row.to_dict`).
    """
    machine = ", ".join(f"{name} {value}" for name, value in content["machine"].items())
    lines = [f"Machine: {machine}.", "", _line(_HEAD), _line(["---"] * len(_HEAD))]
    for row in content["rows"]:
        lines.append(
            _line(
                (
                    f"`{row['name']}`",
                    row["what"],
                    _number(row["ratio"]),
                    f"≤ {row['target']:g}" if row.get("target") is not None else "",
                    row["verdict"],
                    f"{row['spread']:.1%}" if row.get("spread") is not None else "exact",
                    f"{row['load']:.2f}" if row.get("load") is not None else "",
                )
            )
        )
    lines.append("")
    for row in content["rows"]:
        if row["refused"]:
            lines.append(f"- `{row['name']}`: no ratio, {row['refused']}.")
            continue
        figures = "; ".join(f"{name} {_value(value)}" for name, value in row["figures"].items())
        lines.append(f"- `{row['name']}`: {row['equality']}. {figures}.")
    return "\n".join(lines) + "\n"


def _line(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        numbers = [item for item in value if isinstance(item, int | float)]
        if len(numbers) == len(value) and value:
            return f"{min(numbers):.4g} to {max(numbers):.4g}"
        return ", ".join(map(str, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_value(item)}" for name, item in value.items())
    return str(value)
