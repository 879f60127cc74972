"""Train and sample the Open-Sora-Plan v1.3 family of text-to-video models."""

__version__ = "0.1.0"
