"""AUSM, the Autoregressive Universal Video Segmentation Model, for Hugging Face transformers.

`import ausm_hf` makes `AutoModel`, `AutoProcessor` and their kin, and `pipeline("video-segmentation")`, know the
model. It imports neither torch nor transformers: names are imported when they are first used.
"""

import importlib

from ._register import register

__version__ = "0.1.0.dev0"

_MODULE_OF = {
    name: module
    for module, names in {
        "model.configuration_ausm": ["AusmConfig"],
        "model.modeling_ausm": ["AusmForUniversalSegmentation", "AusmModel", "AusmPreTrainedModel"],
        "model.history_ausm": ["AusmHistory"],
        "model.session_ausm": ["AusmInferenceSession"],
        "model.image_processing_ausm": ["AusmImageProcessor"],
        "model.processing_ausm": ["AusmProcessor"],
        "model.backbone_efficientnet_lite": ["EfficientNetLiteBackbone", "EfficientNetLiteConfig"],
        "model.pipeline_ausm": ["VideoSegmentationPipeline"],
        "checkpoint": ["write_checkpoint"],
        "mask2former": ["from_mask2former"],
        "segment": ["FrameSegments", "load_model", "save_segments", "segment_video", "segment_videos"],
        "export": ["to_coco", "to_supervision", "to_youtube_vis", "to_youtube_vis_data"],
        "video": ["VideoSource", "VideoWriter", "read_video"],
    }.items()
    for name in names
}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


register()
