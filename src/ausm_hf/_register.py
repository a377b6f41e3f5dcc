"""Makes transformers know this package's classes, without importing transformers (or torch) for it.

The Auto classes and `pipeline` ask plain dictionaries. `import ausm_hf` replaces these dictionaries, as soon as the
module of transformers that owns one is imported, by ones that register the real classes the first time they are asked
for one of ours. Doing it any earlier would import torch for everybody who only imports the package, and would import
the model in the middle of transformers' own imports: Mask2Former, which the model builds on, imports the Auto classes.
"""

import sys
import threading
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path

MODEL_TYPES = ("ausm", "efficientnet_lite")
TASK = "video-segmentation"
BUNDLED_CHECKPOINT = Path(__file__).parent / "checkpoints" / "ausm-nano"


class _FilledWhenAsked(dict):
    """A dictionary that calls `fill` before it is first asked for something of ours or listed.

    Who asks meanwhile in another thread fills it too, which does no harm: waiting could be for ever, as both import.
    """

    def __init__(self, content: dict, fill: Callable[[], None]):
        super().__init__(content)
        self._fill: Callable[[], None] | None = fill
        self._thread = threading.local()  # `filling`: filling asks too

    def _ask(self):
        fill = self._fill
        if fill is not None and not getattr(self._thread, "filling", False):
            self._thread.filling = True
            try:
                fill()
            finally:
                self._thread.filling = False
            self._fill = None

    def __contains__(self, key) -> bool:
        if key in MODEL_TYPES or key == TASK or getattr(key, "__module__", "").startswith("ausm_hf."):
            self._ask()
        return super().__contains__(key)

    def __getitem__(self, key):
        if key in self:
            return super().__getitem__(key)
        raise KeyError(key)

    def get(self, key, default=None):
        return self[key] if key in self else default

    def __iter__(self):
        self._ask()
        return super().__iter__()

    def __len__(self) -> int:
        self._ask()
        return super().__len__()

    def keys(self):
        self._ask()
        return super().keys()

    def values(self):
        self._ask()
        return super().values()

    def items(self):
        self._ask()
        return super().items()


def _register_configs():
    from transformers import AutoConfig

    from .model.backbone_efficientnet_lite import EfficientNetLiteConfig
    from .model.configuration_ausm import AusmConfig

    AutoConfig.register("ausm", AusmConfig, exist_ok=True)
    AutoConfig.register("efficientnet_lite", EfficientNetLiteConfig, exist_ok=True)


def _register_models():
    from transformers import AutoBackbone, AutoModel, AutoModelForUniversalSegmentation

    from .model.backbone_efficientnet_lite import EfficientNetLiteBackbone, EfficientNetLiteConfig
    from .model.modeling_ausm import AusmConfig, AusmForUniversalSegmentation, AusmModel

    AutoModel.register(AusmConfig, AusmModel, exist_ok=True)
    AutoModelForUniversalSegmentation.register(AusmConfig, AusmForUniversalSegmentation, exist_ok=True)
    AutoBackbone.register(EfficientNetLiteConfig, EfficientNetLiteBackbone, exist_ok=True)


def _register_image_processor():
    from transformers import AutoImageProcessor

    from .model.configuration_ausm import AusmConfig
    from .model.image_processing_ausm import AusmImageProcessor

    AutoImageProcessor.register(AusmConfig, image_processor_classes={"pil": AusmImageProcessor}, exist_ok=True)


def _register_processor():
    from transformers import AutoProcessor

    from .model.configuration_ausm import AusmConfig
    from .model.processing_ausm import AusmProcessor

    AutoProcessor.register(AusmConfig, AusmProcessor, exist_ok=True)


def _register_pipeline():
    from transformers import AutoModelForUniversalSegmentation
    from transformers.pipelines import PIPELINE_REGISTRY

    from .model.pipeline_ausm import VideoSegmentationPipeline

    # Not `register_pipeline`: it would also write the path of the default checkpoint into every saved pipeline.
    PIPELINE_REGISTRY.supported_tasks[TASK] = {
        "impl": VideoSegmentationPipeline,
        "pt": (AutoModelForUniversalSegmentation,),
        "type": "video",
        "default": {"model": (str(BUNDLED_CHECKPOINT), "main")},
    }


class _LocalPipeline:
    """`config.custom_pipelines` as seen where this package is installed: empty, but saved as it is.

    A checkpoint says there which of the files saved with it is its pipeline; `pipeline` would insist on running that
    file, hence on `trust_remote_code=True`, although the task is registered here.
    """

    def __get__(self, config, owner=None) -> dict:
        return {}

    def __set__(self, config, value: dict):
        config.__dict__["custom_pipelines"] = value


def _travel(*auto_classes: tuple[str, str]) -> Callable:
    """Says that the code of classes is saved along with their checkpoints, for `trust_remote_code`."""

    def after_import(module):
        for name, auto_class in auto_classes:
            getattr(module, name).register_for_auto_class(auto_class)

    return after_import


def _after_configuration_ausm(module):
    module.AusmConfig.register_for_auto_class()
    module.AusmConfig.custom_pipelines = _LocalPipeline()


def _after_pipeline_ausm(module):
    def read_video(source):
        """See `ausm_hf.read_video`."""
        from .video import read_video

        return read_video(source)

    module.VideoSegmentationPipeline.read_video = staticmethod(read_video)


def _fill_later(fill: Callable[[], None], *names: str, attribute: str = "_extra_content") -> Callable:
    def after_import(module):
        for name in names:
            owner = getattr(module, name)
            setattr(owner, attribute, _FilledWhenAsked(getattr(owner, attribute), fill))

    return after_import


_AFTER_IMPORT = {
    "transformers.models.auto.configuration_auto": _fill_later(_register_configs, "CONFIG_MAPPING"),
    "transformers.models.auto.modeling_auto": _fill_later(
        _register_models, "MODEL_MAPPING", "MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING", "MODEL_FOR_BACKBONE_MAPPING"
    ),
    "transformers.models.auto.image_processing_auto": _fill_later(
        _register_image_processor, "IMAGE_PROCESSOR_MAPPING"
    ),
    "transformers.models.auto.processing_auto": _fill_later(_register_processor, "PROCESSOR_MAPPING"),
    "transformers.pipelines": _fill_later(_register_pipeline, "PIPELINE_REGISTRY", attribute="supported_tasks"),
    "ausm_hf.model.configuration_ausm": _after_configuration_ausm,
    "ausm_hf.model.modeling_ausm": _travel(
        ("AusmModel", "AutoModel"), ("AusmForUniversalSegmentation", "AutoModelForUniversalSegmentation")
    ),
    "ausm_hf.model.image_processing_ausm": _travel(("AusmImageProcessor", "AutoImageProcessor")),
    "ausm_hf.model.processing_ausm": _travel(("AusmProcessor", "AutoProcessor")),
    "ausm_hf.model.pipeline_ausm": _after_pipeline_ausm,
}


class _AfterImport:
    """Import finder that runs something right after one of the modules above has been executed."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        after_import = _AFTER_IMPORT.get(name)
        spec = PathFinder.find_spec(name, path, target) if after_import else None
        if spec is None or spec.loader is None:
            return None
        exec_module = spec.loader.exec_module

        def exec_module_and_then(module):
            exec_module(module)
            after_import(module)

        spec.loader.exec_module = exec_module_and_then  # type: ignore[method-assign]
        return spec


def register():
    """Registers everything; what is imported already at once, the rest when it is imported."""
    if _AfterImport in sys.meta_path:
        return
    sys.meta_path.insert(0, _AfterImport)
    for name, after_import in _AFTER_IMPORT.items():
        if name in sys.modules:
            after_import(sys.modules[name])
