"""Tables for terminals and for Markdown, and numbers as people read them."""

from collections.abc import Sequence

MISSING = "-"


def format_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """An aligned table: numbers to the right, everything else to the left. None is shown as "-"."""
    cells = [[MISSING if value is None else str(value) for value in row] for row in rows]
    widths = [max(len(header), *(len(row[i]) for row in cells), 0) for i, header in enumerate(headers)]
    to_right = [bool(cells) and all(_is_figure(row[i]) for row in cells) for i in range(len(headers))]

    def line(values: Sequence[str]) -> str:
        parts = [
            value.rjust(width) if right else value.ljust(width)
            for value, width, right in zip(values, widths, to_right, strict=True)
        ]
        return "  ".join(parts).rstrip()

    return "\n".join([line(headers), line(["-" * width for width in widths]), *map(line, cells)])


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """The same as a Markdown table."""
    lines = [list(headers), ["---"] * len(headers)]
    lines += [[MISSING if value is None else str(value).replace("|", "\\|") for value in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def milliseconds(seconds: float | None) -> str | None:
    """0.0123 -> "12.30 ms", with three digits or more at every size."""
    if seconds is None:
        return None
    value = seconds * 1e3
    return f"{value:.4f} ms" if value < 0.1 else f"{value:.3f} ms" if value < 10 else f"{value:.2f} ms"


def percent(fraction: float | None) -> str | None:
    """0.734 -> "73.4 %"."""
    return None if fraction is None else f"{fraction:.1%}".replace("%", " %")


def _is_figure(cell: str) -> bool:
    return cell == MISSING or cell[:1].isdigit() or (cell[:1] in "+-" and cell[1:2].isdigit())
