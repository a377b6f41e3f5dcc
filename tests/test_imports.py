"""`import ausm_hf`: light, and everything it promises is there."""

import subprocess
import sys

import pytest

import ausm_hf


def run(code: str) -> str:
    """What `code` prints in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def modules_after(code: str) -> set[str]:
    return set(run(f"{code}\nimport sys\nprint(*sys.modules)").split())


@pytest.mark.parametrize("others", ["pass", "import transformers"])
def test_import_is_light(others):
    added = modules_after(f"{others}\nimport ausm_hf") - modules_after(others)
    assert {name for name in added if name.split(".")[0] not in sys.stdlib_module_names} == {
        "ausm_hf",
        "ausm_hf._register",
    }


@pytest.mark.parametrize("name", ausm_hf.__all__)
def test_every_public_name_exists(name):
    assert getattr(ausm_hf, name).__name__ == name
    assert name in dir(ausm_hf)


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'AusmForNothing'"):
        ausm_hf.AusmForNothing  # noqa: B018


@pytest.mark.parametrize(
    "imports",
    [
        "import ausm_hf; from transformers import Mask2FormerForUniversalSegmentation",
        "from transformers import AutoModel, AutoProcessor, pipeline; import ausm_hf",
        "from ausm_hf.model.pipeline_ausm import VideoSegmentationPipeline; import ausm_hf",
    ],
)
def test_registered_whatever_is_imported_first(imports):
    """Mask2Former imports the Auto classes, and the model imports Mask2Former: no order may end in a circle."""
    lines = [imports]
    lines += [
        "from transformers import AutoConfig, AutoModel, AutoModelForUniversalSegmentation, AutoBackbone",
        "from transformers.pipelines import PIPELINE_REGISTRY",
        "from transformers.models.auto.processing_auto import processor_class_from_name",
        "from transformers.models.auto.image_processing_auto import get_image_processor_class_from_name",
        "config = AutoConfig.for_model('ausm')",
        "print(AutoModel._model_mapping[type(config)].__name__)",
        "print(AutoModelForUniversalSegmentation._model_mapping[type(config)].__name__)",
        "print(AutoBackbone._model_mapping[ausm_hf.EfficientNetLiteConfig].__name__)",
        "print(processor_class_from_name('AusmProcessor').__name__)",
        "print(get_image_processor_class_from_name('AusmImageProcessor').__name__)",
        "print(PIPELINE_REGISTRY.check_task('video-segmentation')[1]['impl'].__name__)",
        "print('video-segmentation' in PIPELINE_REGISTRY.get_supported_tasks())",
    ]
    assert run("\n".join(lines)).split() == [
        "AusmModel",
        "AusmForUniversalSegmentation",
        "EfficientNetLiteBackbone",
        "AusmProcessor",
        "AusmImageProcessor",
        "VideoSegmentationPipeline",
        "True",
    ]


def test_other_models_do_not_import_ours():
    code = """
import sys, ausm_hf
from transformers import AutoConfig, AutoModel
AutoModel.from_config(AutoConfig.for_model("bert", num_hidden_layers=1, hidden_size=8, num_attention_heads=1,
                                           intermediate_size=8, vocab_size=8))
print([m for m in sys.modules if m.startswith("ausm_hf.model")])
"""
    assert run(code).strip() == "[]"
