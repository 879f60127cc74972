"""Model folders: config.json, weights in safetensors (one file, or shards with an index), recipe.json.

Loading is strict: every name and shape of the file must be the model's, and the other way round. Models are built on
the meta device and take the loaded tensors as their own, so nothing is initialised twice.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from osp_fast.config import Recipe
from osp_fast.errors import UserError
from osp_fast.files import sync

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = WEIGHTS + ".index.json"
RECIPE = "recipe.json"
SHARD_BYTES = 8 << 30
ModelT = TypeVar("ModelT", bound="PretrainedModel")


class PretrainedModel(nn.Module):
    """A network that lives in a model folder. Subclasses name their config class and map their parameter names."""

    class_name: ClassVar[str]  # `_class_name` in config.json
    config_class: ClassVar[type]  # a dataclass; its fields are the keys of config.json that matter
    fixed_config: ClassVar[dict[str, Any]] = {}  # keys that have one supported value

    config: Any

    def to_checkpoint(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This model's state dict -> tensors under the names and shapes of a checkpoint file."""
        return dict(state)

    def from_checkpoint(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `to_checkpoint`."""
        return dict(tensors)

    @classmethod
    def from_pretrained(
        cls: type[ModelT],
        folder: str | Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        **overrides: Any,
    ) -> ModelT:
        """Load a model folder; `overrides` replace values of its config.json. Raises `UserError`."""
        folder = Path(folder)
        config = dataclasses.replace(cls.read_config(folder), **overrides)
        with torch.device("meta"):
            model = cls(config)
        tensors = read_tensors(folder, dtype, device)
        check_tensors(folder, tensors, model.to_checkpoint(model.state_dict()))
        model.load_state_dict(model.from_checkpoint(tensors), assign=True)
        return model.requires_grad_(True)

    @classmethod
    def on_meta(cls: type[ModelT], folder: str | Path, dtype: torch.dtype = torch.float32) -> ModelT:
        """The model of a folder's config.json without weights: shapes and types only. Raises `UserError`."""
        with torch.device("meta"):
            return cls(cls.read_config(folder, quiet=True)).to(dtype)

    @classmethod
    def check_pretrained(cls, folder: str | Path) -> None:
        """Raise the `UserError` that `from_pretrained` would, as far as the heads of the files tell: at once."""
        model = cls.on_meta(folder)
        check_tensors(Path(folder), read_shapes(Path(folder)), model.to_checkpoint(model.state_dict()))

    @classmethod
    def read_config(cls, folder: str | Path, quiet: bool = False) -> Any:
        """config.json of a model folder as this model's config dataclass. Raises `UserError`.

        quiet: say nothing of keys that have no effect
        """
        path = Path(folder) / "config.json"
        values = read_json(path)
        found = values.get("_class_name")
        if found != cls.class_name:
            raise UserError(f"{path}: _class_name is {found!r}, but a folder of {cls.class_name} is needed here")
        fields = {field.name: field for field in dataclasses.fields(cls.config_class)}
        for key, supported in cls.fixed_config.items():
            if values.get(key, supported) != supported:
                raise UserError(f"{path}: {key} is {values[key]!r}, but only {supported!r} is supported")
        ignored = sorted(k for k in values if k not in fields and k not in cls.fixed_config and not k.startswith("_"))
        if ignored and not quiet:
            print(f"note: {path}: keys without effect: {', '.join(ignored)}", file=sys.stderr)
        missing = [name for name, f in fields.items() if name not in values and f.default is dataclasses.MISSING]
        if missing:
            raise UserError(f"{path}: {missing[0]} is missing; add it as it was when the weights were trained")
        for name, field in fields.items():
            if name in values and not _fits(values[name], field.type):
                kind = getattr(field.type, "__name__", field.type)
                raise UserError(f"{path}: {name} is {values[name]!r}, not a valid {kind}; restore the file")
        try:
            return cls.config_class(**{name: values[name] for name in fields if name in values})
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}: {error}") from None

    def save_pretrained(
        self, folder: str | Path, recipe: Recipe | None = None, state: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write this model (or `state`, e.g. averaged weights, under its names) as a model folder, synced to disk."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.save_config(folder, recipe)
        write_tensors(folder, self.to_checkpoint(self.state_dict() if state is None else state))

    def save_config(self, folder: Path, recipe: Recipe | None = None) -> None:
        """Write config.json, and recipe.json if there is a recipe, to a folder; synced to disk."""
        values = {"_class_name": self.class_name, **dataclasses.asdict(self.config), **self.fixed_config}
        write_json(folder / "config.json", values)
        if recipe is not None:
            write_json(folder / RECIPE, dataclasses.asdict(recipe))


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value from a JSON file can be a field of type `kind`: numbers are positive and of a sensible size."""
    if kind is bool:
        return isinstance(value, bool)
    if kind in (int, float):
        number = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 10**6
        return number and (kind is float or value == int(value))
    return not isinstance(value, str) if kind is not str else isinstance(value, str)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises `UserError` if it is missing or broken."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: name a model folder with config.json and {WEIGHTS}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): restore the file") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} does not hold a JSON object: restore the file")
    return values


def write_json(path: Path, values: Any) -> None:
    """Write JSON and sync it to disk."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(values, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def read_recipe(folder: str | Path) -> Recipe | None:
    """The recipe beside the weights, or None for folders without one (releases). Raises `UserError` if it is broken."""
    path = Path(folder) / RECIPE
    if not path.exists():
        return None
    values = read_json(path)
    fields = {field.name: field.type for field in dataclasses.fields(Recipe)}
    fix = "restore the file, or delete it and give the flags by hand"
    for name in sorted(fields.keys() ^ values.keys()):
        raise UserError(f"{path}: {name} is {'missing' if name in fields else 'unknown'}; {fix}")
    for name, kind in fields.items():
        if not _fits(values[name], kind):
            raise UserError(f"{path}: {name} is {values[name]!r}, not a valid {kind.__name__}; {fix}")
    return Recipe(**values)


def read_tensors(folder: Path, dtype: torch.dtype, device: torch.device | str) -> dict[str, Tensor]:
    """All tensors of a model folder, floating point ones as dtype. Raises `UserError` on missing or broken files."""

    def read(opened: Any, name: str) -> Tensor:
        tensor = opened.get_tensor(name)
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return _read_files(folder, str(device), read)


def read_shapes(folder: Path) -> dict[str, Tensor]:
    """The same on the meta device, from the heads of the files; floating point tensors as float32, others as int8."""

    def read(opened: Any, name: str) -> Tensor:
        head = opened.get_slice(name)
        dtype = torch.float32 if "F" in head.get_dtype() else torch.int8
        return torch.empty(head.get_shape(), dtype=dtype, device="meta")

    return _read_files(folder, "cpu", read)


def _read_files(folder: Path, device: str, read: Callable[[Any, str], Tensor]) -> dict[str, Tensor]:
    if (folder / INDEX).exists():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise UserError(f"{folder / INDEX}: weight_map is missing or broken; restore the file")
        files = [folder / Path(name).name for name in sorted(set(weight_map.values()))]
    else:
        weight_map, files = None, [folder / WEIGHTS]
    tensors: dict[str, Tensor] = {}
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is missing: copy the weights there, or name another model folder")
        try:
            with safe_open(file, framework="pt", device=device) as opened:
                for name in opened.keys():  # noqa: SIM118 - the handle is no dict
                    tensors[name] = read(opened, name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is not a complete safetensors file ({error}): copy it again") from None
    if weight_map is not None and set(weight_map) != set(tensors):
        name = sorted(set(weight_map) ^ set(tensors))[0]
        raise UserError(f"{folder / INDEX}: {name} stands in only one of index and shards; copy the folder again")
    return tensors


def check_tensors(folder: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise `UserError` unless names and shapes of a file's tensors are those of the model."""
    for words, names in (("lacks", expected.keys() - found.keys()), ("has in excess", found.keys() - expected.keys())):
        if names:
            first = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            raise UserError(f"{folder}: {len(names)} tensors that the file {words}: {first}; is it another model's?")
    for name, tensor in expected.items():
        if not found[name].is_floating_point():
            raise UserError(f"{folder}: {name} holds {found[name].dtype}, not floating point numbers; is it quantised?")
        if found[name].shape != tensor.shape:
            raise UserError(
                f"{folder}: {name} has shape {tuple(found[name].shape)}, the model of its config.json "
                f"{tuple(tensor.shape)}; is it another model's?"
            )


def plan_files(tensors: Mapping[str, Tensor], shard_bytes: int = SHARD_BYTES) -> dict[str, str]:
    """Which file of a model folder each tensor goes to: one, or shards of at most about `shard_bytes`.

    Only sizes are looked at, so meta tensors do.
    """
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    stem = WEIGHTS.removesuffix(".safetensors")
    names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    files = names if len(shards) > 1 else [WEIGHTS]
    return {name: file for file, shard in zip(files, shards, strict=True) for name in shard}


def write_index(folder: Path, weight_map: Mapping[str, str], total_size: int) -> None:
    """Write the index of a folder whose tensors are in several files; synced. total_size: of all tensors, bytes."""
    if len(set(weight_map.values())) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total_size}, "weight_map": dict(weight_map)})


def write_weights_file(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as a safetensors file; synced."""
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"}
    )
    sync(file)


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], shard_bytes: int = SHARD_BYTES) -> None:
    """Write tensors as one safetensors file, or as shards of at most about shard_bytes with an index; synced."""
    weight_map = plan_files(tensors, shard_bytes)
    files = set(weight_map.values())
    write_index(folder, weight_map, sum(tensor.nbytes for tensor in tensors.values()))
    for file in sorted(files):
        write_weights_file(folder / file, {name: tensors[name] for name in tensors if weight_map[name] == file})
    # What an earlier save in another number of shards has left would be read instead of, or beside, the new files.
    for stale in folder.glob(WEIGHTS.replace(".safetensors", "*.safetensors*")):
        if stale.name not in files and not (stale.name == INDEX and len(files) > 1):
            stale.unlink()
    sync(folder)
