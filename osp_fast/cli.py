"""The command line: one flag per field of `config.py`, with upstream's names, and a parser that speaks in sentences."""

import argparse
import dataclasses
import difflib
import json
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

from osp_fast.checks import check_sample, check_train
from osp_fast.config import (
    SAMPLE_PRESETS,
    TRAIN_PRESETS,
    ReconstructConfig,
    SampleConfig,
    ServeConfig,
    TrainConfig,
    as_dict,
)
from osp_fast.errors import UserError

# Flags of upstream's scripts that have no effect of their own: name -> (takes a value, the line that is printed).
ACCEPTED = {
    "use_decord": (False, "videos are decoded by PyAV, exact to the frame"),
    "trained_data_global_step": (True, "the place in the data comes from the checkpoint"),
    "foreach_ema": (False, "the moving average always uses multi-tensor operations"),
    "extra_save_mem": (False, "--gradient_checkpointing, --enable_tiling and --offload_ema are what saves memory here"),
    "enable_profiling": (False, "metrics.jsonl has the time of every step and of its wait for data"),
}
ConfigT = TypeVar("ConfigT")


class SentenceParser(argparse.ArgumentParser):
    """argparse whose errors are `UserError`s: one sentence, no usage dump, with the nearest flag suggested."""

    def error(self, message: str) -> NoReturn:
        prefix = "unrecognized arguments: "
        if message.startswith(prefix):
            given = message[len(prefix) :].split()[0]
            near = difflib.get_close_matches(given.split("=")[0], self._option_string_actions, n=1)
            hint = f"did you mean {near[0]}?" if near else f"see python -m {self.prog} --help"
            raise UserError(f"{given} is not a flag of {self.prog}: {hint}")
        raise UserError(message.removeprefix("argument "))


def train_parser(prog: str = "osp_fast.train") -> argparse.ArgumentParser:
    """The parser of `python -m osp_fast.train`; other entry points add their own flags to it."""
    parser = _parser(prog, "Train an Open-Sora-Plan v1.3 model.")
    for group in dataclasses.fields(TrainConfig):
        doc = group.type.__doc__.strip()
        _add_flags(parser.add_argument_group(f"{group.name}: {doc}"), group.type)
    accepted = parser.add_argument_group("accepted from upstream's scripts; the engine does these anyway or otherwise")
    for name, (takes_value, reason) in ACCEPTED.items():
        options = dict(type=str) if takes_value else dict(action="store_true")
        accepted.add_argument(f"--{name}", help=reason, **options)
    return parser


def parse_train(
    argv: Sequence[str] | None = None, parser: argparse.ArgumentParser | None = None
) -> tuple[TrainConfig, argparse.Namespace]:
    """Parse, resolve and check a training command line.

    Returns the configuration and the namespace (for flags that the caller added to `parser`). `--print_config` prints
    the resolved configuration as JSON and exits with code 0. Raises `UserError`.
    """
    parser = parser or train_parser()
    space = _parse_with_preset(parser, argv, TRAIN_PRESETS)
    groups = {group.name: _fill(group.type, space) for group in dataclasses.fields(TrainConfig)}
    config = TrainConfig(**groups)
    notices = [f"--{name}: {reason}" for name, (_, reason) in ACCEPTED.items() if getattr(space, name)]
    _finish(as_dict(config), notices + check_train(config), space.print_config)
    return config, space


def sample_parser() -> argparse.ArgumentParser:
    """The parser of `python -m osp_fast.sample`."""
    parser = _parser("osp_fast.sample", "Sample videos and images from an Open-Sora-Plan v1.3 model.")
    _add_flags(parser, SampleConfig)
    return parser


def parse_sample(argv: Sequence[str] | None = None) -> SampleConfig:
    """Parse, resolve and check a sampling command line; `--print_config` as for training. Raises `UserError`."""
    space = _parse_with_preset(sample_parser(), argv, SAMPLE_PRESETS)
    config = _fill(SampleConfig, space)
    _finish(as_dict(config), check_sample(config), space.print_config)
    return config


def serve_parser() -> argparse.ArgumentParser:
    """The parser of `python -m osp_fast.serve`: the flags of sampling, and where the page is."""
    parser = _parser("osp_fast.serve", "A web page that samples from an Open-Sora-Plan v1.3 model.")
    _add_flags(parser, SampleConfig)
    _add_flags(parser, ServeConfig)
    return parser


def parse_serve(argv: Sequence[str] | None = None) -> tuple[SampleConfig, ServeConfig]:
    """Parse, resolve and check a web page's command line; `--print_config` as for training. Raises `UserError`.

    `--text_prompt` is what the page's field for the prompt begins with.
    """
    space = _parse_with_preset(serve_parser(), argv, SAMPLE_PRESETS)
    config, serve = _fill(SampleConfig, space), _fill(ServeConfig, space)
    if not config.text_prompt:
        config.text_prompt = [""]
    _finish({**as_dict(config), **as_dict(serve)}, check_sample(config), space.print_config)
    return config, serve


def reconstruct_parser() -> argparse.ArgumentParser:
    """The parser of `python -m osp_fast.reconstruct`."""
    parser = _parser("osp_fast.reconstruct", "Encode and decode a video, and say how much of it is lost.")
    parser.add_argument("video", metavar="VIDEO", help="a video, or an image, which is a video of one frame")
    _add_flags(parser, ReconstructConfig)
    return parser


def parse_reconstruct(argv: Sequence[str] | None = None) -> tuple[str, ReconstructConfig]:
    """Parse a reconstruction's command line: (video, settings); `--print_config` as for training.

    Raises `UserError`.
    """
    space = reconstruct_parser().parse_args(argv)
    config = _fill(ReconstructConfig, space)
    if not config.ae_path:
        raise UserError("--ae_path is missing: name the folder of the VAE's weights")
    _finish(as_dict(config), [], space.print_config)
    return space.video, config


def _parser(prog: str, description: str) -> argparse.ArgumentParser:
    parser = SentenceParser(prog=prog, description=description, allow_abbrev=False)
    parser.add_argument(
        "--print_config", action="store_true", help="print what all flags resolve to, as JSON, and exit"
    )
    return parser


def _parse_with_preset(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, presets: dict[str, dict[str, Any]]
) -> argparse.Namespace:
    """Two passes: the first finds `--preset`, whose values become the defaults of the second."""
    argv = sys.argv[1:] if argv is None else list(argv)
    finder = SentenceParser(prog=parser.prog, allow_abbrev=False, add_help=False)
    finder.add_argument("--preset", choices=tuple(presets))
    name = finder.parse_known_args(argv)[0].preset
    if name:
        parser.set_defaults(**presets[name])
    return parser.parse_args(argv)


def _finish(settings: dict[str, Any], notices: list[str], print_config: bool) -> None:
    if print_config:
        print(json.dumps({**settings, "notices": notices}, indent=2))
        sys.exit(0)
    for line in notices:
        print(f"note: {line}", file=sys.stderr)


def _fill(group: type[ConfigT], space: argparse.Namespace) -> ConfigT:
    return group(**{f.name: getattr(space, f.name) for f in dataclasses.fields(group)})


def _add_flags(parser: Any, group: type) -> None:
    for field in dataclasses.fields(group):
        kind = _plain_type(field.type)
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        options: dict[str, Any] = dict(default=default, help=_help(field.metadata, default))
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction  # --no-FLAG takes back what a preset sets
        else:
            options["type"] = memory_size if field.metadata["memory"] else _converter(kind, field.metadata)
            kind_name = "BYTES|auto" if field.metadata["memory"] else kind.__name__.upper()
            options["metavar"] = "|".join(field.metadata["choices"]) or kind_name
            if field.metadata["many"]:
                options["nargs"] = "+" if default is not None else "*"
        parser.add_argument(f"--{field.name}", **options)


def _plain_type(annotation: Any) -> type:
    """`int | None` -> int; `list[str]`, `list[str] | None` -> str; `bool` -> bool."""
    if typing.get_origin(annotation) in (types.UnionType, list):
        return _plain_type(next(part for part in typing.get_args(annotation) if part is not types.NoneType))
    return annotation


def _help(metadata: Any, default: Any) -> str:
    shown = "" if default in (None, False, []) else f" (default: {default})"
    return (metadata["help"] + shown).replace("%", "%%")


def memory_size(text: str) -> int | None:
    """ "4GiB", "500 MiB" or plain bytes -> bytes; "auto" -> None."""
    if text.lower() == "auto":
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?)b?|b)?", text.strip().lower())
    if not match or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not an amount of memory: write bytes, 500MiB, 4GiB or auto")
    unit = 1024 if match[3] else 1000
    return int(float(match[1]) * unit ** (" kmgt".index(match[2]) if match[2] else 0))


def check_value(group: type, name: str, value: Any) -> Any:
    """A value for a field of a configuration, checked as its flag's would be. Raises `UserError`."""
    field = next(field for field in dataclasses.fields(group) if field.name == name)
    try:
        return _converter(_plain_type(field.type), field.metadata)(str(value))
    except argparse.ArgumentTypeError as error:
        raise UserError(f"--{name}: {error}") from None


def _converter(kind: type, metadata: Any) -> Callable[[str], Any]:
    """Text -> value of `kind` within the field's bounds or, case-insensitively, among its choices."""

    def convert(text: str) -> Any:
        if metadata["choices"]:
            for choice in metadata["choices"]:
                if text.lower() == choice.lower():
                    return choice
            raise argparse.ArgumentTypeError(f"{text!r} is unknown; choose from {', '.join(metadata['choices'])}")
        try:
            value = kind(text)
        except ValueError:
            noun = {int: "a whole number", float: "a number"}[kind]
            raise argparse.ArgumentTypeError(f"{text!r} is not {noun}") from None
        if kind is float and not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
        for bound, holds, words in (
            ("at_least", lambda v, b: v >= b, "at least"),
            ("above", lambda v, b: v > b, "greater than"),
            ("at_most", lambda v, b: v <= b, "at most"),
            ("below", lambda v, b: v < b, "less than"),
        ):
            limit = metadata[bound]
            if limit is not None and not holds(value, limit):
                raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {words} {limit}")
        return value

    return convert
