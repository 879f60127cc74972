"""A small data set and text encoder, and encoding or training with them in this process."""

import shutil
import sys
from pathlib import Path

import pytest

from osp_fast.models import dit as dit_module

sys.path.insert(0, str(Path(__file__).parent))

from encoding import small


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("assets")
    return dict(
        data=small.write_data(root / "data", images=4, videos=4),
        text_encoder=small.write_text_encoder(root / "text_encoder"),
    )


@pytest.fixture
def assets(originals, tmp_path) -> dict[str, Path]:
    """The data and the text encoder, in a folder that a test may change."""
    shutil.copytree(originals["data"].parent, tmp_path / "data")
    shutil.copytree(originals["text_encoder"], tmp_path / "text_encoder")
    data = tmp_path / "data" / "data.txt"
    data.write_text(f"{data.parent},{data.parent / 'clips.json'}\n")
    return dict(data=data, text_encoder=tmp_path / "text_encoder")


@pytest.fixture
def run(assets, tmp_path, monkeypatch, capfd):
    """Run encode or train in this process with --latent_cache; keyword arguments change flags. Returns stderr."""
    from osp_fast import encode as encode_module
    from osp_fast import train as train_module

    monkeypatch.setitem(dit_module.DIT_CONFIGS, "tiny", small.SMALL)

    def call(program: str, output: str = "run", **changed: object) -> str:
        values = {**assets, "output": tmp_path / output, "latent_cache": tmp_path / "cache", **changed}
        capfd.readouterr()
        (encode_module if program == "encode" else train_module).main(small.flags(**values))
        return capfd.readouterr().err

    return call
