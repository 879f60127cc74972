"""Packaging. `kernels/` is installed as `osp_fast.kernels`: the bare name belongs to another project."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (HERE / "osp_fast/__init__.py").read_text()).group(1)

setup(
    name="osp_fast",
    version=VERSION,
    description="Train and sample the Open-Sora-Plan v1.3 family of text-to-video models",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=[*find_packages(include=["osp_fast", "osp_fast.*"]), "osp_fast.kernels"],
    package_data={"osp_fast": ["assets/tiny/*", "assets/tiny/*/*"]},
    package_dir={"osp_fast.kernels": "kernels"},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6",
        "numpy",
        "safetensors",
        "transformers",
        "tokenizers",
        "sentencepiece",
        "protobuf",
        "diffusers",
        "av",
        "pillow",
        "ftfy",
        "beautifulsoup4",
        "tensorboard",
        "tqdm",
        "nvidia-ml-py",
    ],
    extras_require={
        "test": [
            "pytest",
            "pytest-xdist",
            "pytest-benchmark",
            "hypothesis",
            "ruff",
            "matplotlib",
            "peft",
            "torchao",
            "gradio>=6",
            "playwright",
        ],
        "bench": ["matplotlib", "pytest-benchmark"],
        "lora": ["peft"],
        "serve": ["gradio>=6"],
        "optimizers": ["torchao"],
        "flash": ["flash-attn"],
    },
)
