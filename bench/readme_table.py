"""The table of results in the README, made from the newest results that are committed; losses are in bold."""

from collections.abc import Sequence
from pathlib import Path

from bench.report import Cases, losses
from bench.results import Row, best_of, folder_name, newest_cases, read_results
from bench.table import markdown_table, milliseconds, percent
from osp_fast.errors import UserError

BEGIN, END = "<!-- bench results -->", "<!-- /bench results -->"
# What a table of a GPU shows, where it was measured.
HEADLINES = (
    ("kernels", "skiparse_attention 93x640x640 group forward"),
    ("kernels", "skiparse_attention 93x640x640 group backward"),
    ("kernels", "skiparse_attention 93x640x640 single forward"),
    ("kernels", "skiparse_attention 93x640x640 full forward"),
    ("kernels", "adaln 93x640x640 gate norm forward"),
    ("kernels", "adaln 93x640x640 gate norm backward"),
    ("kernels", "rope3d 93x640x640 forward"),
    ("kernels", "causal_conv3d decode 128 17x320x320 forward"),
    ("vae", "encode 93x768x768"),
    ("vae", "decode 93x640x640"),
    ("train", "93x640x640"),
    ("sample", "93x640x640"),
)
HEADERS = ("case", "ours", "of peak", "reference", "strong", "best of the others", "ratio")
CPU_SUITES = ("train", "sample", "vae", "data")


def readme_block(folder: Path) -> str:
    """The README's part between the two comments, of the results in `folder`."""
    devices = newest_cases(read_results(folder))
    gpus = sorted((name for name in devices if name != "cpu"), key=lambda name: _date(devices[name]), reverse=True)
    parts = [_gpu_part(name, devices[name]) for name in gpus]
    if not gpus:
        parts.append(
            "**Not yet measured on a GPU.** What is expected of one H100 SXM, plots and all, is in "
            "[bench/results/predicted](bench/results/predicted/report.md)."
        )
    if "cpu" in devices:
        parts.append(_cpu_part(devices["cpu"]))
    return "\n\n".join([BEGIN, *parts, END])


def write_readme(path: Path, folder: Path) -> None:
    """Put the block of `folder` into a README. Raises `UserError` if it has no place for it."""
    try:
        text = path.read_text()
    except OSError as error:
        raise UserError(f"--readme {path}: cannot be read ({error.strerror}): name the README") from None
    path.write_text(with_block(text, readme_block(folder), path))
    print(f"written to {path}")


def with_block(text: str, block: str, path: Path) -> str:
    """`text` with the block in place of the one it has. Raises `UserError` if there is none."""
    begin, end = text.find(BEGIN), text.find(END)
    if not 0 <= begin < end:
        raise UserError(f"--readme {path}: has no lines {BEGIN} and {END}: put them where the table is to be")
    return text[:begin] + block + text[end + len(END) :]


def _gpu_part(name: str, cases: Cases) -> str:
    lines, runs = [], []
    for key in HEADLINES:
        if key in cases:
            result, rows = cases[key]
            lines.append(_line(" ".join(key), rows))
            runs.append(result)
    newest = max(runs or [result for result, _ in cases.values()], key=lambda result: result.env["date"]).env
    where = f"{name}, {newest['date'][:10]}, commit {newest['git']}, torch {newest['torch']}, Triton {newest['triton']}"
    where += f"; a matrix product {newest['matmul_tflops']:.0f} TFLOP/s, a copy {newest['copy_tbps']:.2f} TB/s."
    lost = losses(cases)
    words = f"{len(cases)} cases measured, {len(lost)} of them lost, wrong or not measured"
    report = f"[all of them](bench/results/{folder_name(name)}/report.md)"
    table = markdown_table(HEADERS, lines)
    return f"{where} Ratio: the time of the best of the others over ours.\n\n{table}\n\n{words}: {report}."


def _line(case: str, rows: Sequence[Row]) -> list[str | None]:
    by_role = {row.role: row for row in rows if row.role in ("ours", "reference", "strong")}
    ours, best = by_role.get("ours"), best_of(rows)
    if ours is None or not ours.timed:
        return [case, f"**{ours.note if ours else 'not measured'}**", *[None] * 5]
    cells = [_time(ours), percent(ours.of_peak)]
    cells += [_time(by_role[role]) if role in by_role else None for role in ("reference", "strong")]
    if best is None:
        return [case, *cells, None, None]
    ratio = best.ms / ours.ms
    return [case, *cells, f"{best.impl}, {_time(best)}", f"{ratio:.2f}" if ratio >= 1 else f"**{ratio:.2f}**"]


def _cpu_part(cases: Cases) -> str:
    """Ratios of small cases, all of one run each."""
    lines = []
    for (suite, case), (_, rows) in cases.items():
        ours, best = next((row for row in rows if row.role == "ours"), None), best_of(rows)
        if suite not in CPU_SUITES or ours is None or not ours.timed or best is None:
            continue
        roles = {row.role: ours.vs.get(row.impl) for row in rows if row.role in ("reference", "strong")}
        shown = [None if (ratio := roles.get(role)) is None else f"{ratio:.2f}" for role in ("reference", "strong")]
        ratio = best.ms / ours.ms
        lines.append([f"{suite} {case}", *shown, best.impl, f"{ratio:.2f}" if ratio >= 1 else f"**{ratio:.2f}**"])
    headers = ("case", "reference", "strong", "best of the others", "ratio")
    words = (
        "On a CPU, tiny models and the reader of videos; the time of others over ours, in one run each (bold: lost):"
    )
    return f"{words}\n\n{markdown_table(headers, lines)}"


def _time(row: Row) -> str | None:
    return milliseconds(row.ms / 1e3) if row.timed else f"**{row.note or 'not measured'}**"


def _date(cases: Cases) -> str:
    return max(result.env["date"] for result, _ in cases.values())
