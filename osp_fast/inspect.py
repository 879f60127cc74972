"""Dry run of a data set: which entries a training run would use, in which buckets, and why it drops the others.

python -m osp_fast.inspect --data data.txt <training flags> [--json OUT]
"""

import json
import os
import sys
from collections.abc import Sequence

from osp_fast.assets.shapes import ensure_data
from osp_fast.cli import parse_train, train_parser
from osp_fast.data.buckets import Plan, by_count, load_plan
from osp_fast.errors import UserError, run_entry_point


def main(argv: Sequence[str] | None = None) -> None:
    """Plan the data set that the training flags describe, print the plan, and write it as JSON if asked to.

    Raises `UserError` for bad flags, broken files, an empty plan, and a JSON file that cannot be written.
    """
    parser = train_parser("osp_fast.inspect")
    parser.add_argument("--json", metavar="OUT", help="write the kept entries and the drops by reason to this file")
    config, extra = parse_train(argv, parser)
    ensure_data(config.data.data)
    plan = load_plan(config.data, config.run.seed, report=lambda line: print(line, file=sys.stderr, flush=True))
    print(format_plan(plan))
    if extra.json is not None:
        write_json(plan_as_json(plan), extra.json)


def format_plan(plan: Plan) -> str:
    """The plan as a table for people: totals, drops by reason with a first example, and the size of every bucket."""
    kept, dropped = len(plan.clips), sum(plan.dropped.values())
    lines = [f"{kept + dropped} entries: {kept} kept, {dropped} dropped"]
    if plan.dropped:
        rows = [(reason, str(count), plan.first_dropped[reason]) for reason, count in by_count(plan.dropped)]
        lines += ["", *_table(("dropped because", "entries", "the first one"), rows)]
    rows = []
    for bucket in sorted(plan.buckets):
        clips = len(plan.buckets[bucket])
        rows.append((str(bucket), str(clips), f"{clips / kept:.1%}"))
    lines += ["", *_table(("bucket", "clips", "share"), rows)]
    return "\n".join(lines)


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Left-aligned columns; the second one, a count, is aligned right."""
    cells = [header, *rows]
    first, second = (max(len(row[column]) for row in cells) for column in (0, 1))
    return [f"  {row[0]:<{first}}  {row[1]:>{second}}  {row[2]}" for row in cells]


def plan_as_json(plan: Plan) -> dict:
    """{"kept": [{"path", "bucket": "TxHxW"}] in annotation order, "dropped": {reason: count}}."""
    kept = [{"path": clip.entry.path, "bucket": str(clip.bucket)} for clip in plan.clips]
    return {"kept": kept, "dropped": plan.dropped}


def write_json(content: dict, path: str) -> None:
    """Write `content` to `path` in one step: the file is the old one or the whole new one, never a part of it.

    Raises `UserError` if the file cannot be written.
    """
    unfinished = f"{path}.{os.getpid()}.tmp"
    try:
        with open(unfinished, "w", encoding="utf-8") as file:
            json.dump(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        raise UserError(
            f"--json {path} cannot be written ({error.strerror}); give a file in a writable folder"
        ) from error
    finally:
        if os.path.exists(unfinished):
            os.unlink(unfinished)


if __name__ == "__main__":
    run_entry_point(main)
