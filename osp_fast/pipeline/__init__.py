"""Text to video: `VideoPipeline`."""

from osp_fast.pipeline.folders import ModelFolders
from osp_fast.pipeline.settings import ClipSettings, Parametrization, resolve_parametrization
from osp_fast.pipeline.video import GeneratedClip, VideoPipeline

__all__ = [
    "ClipSettings",
    "GeneratedClip",
    "ModelFolders",
    "Parametrization",
    "VideoPipeline",
    "resolve_parametrization",
]
