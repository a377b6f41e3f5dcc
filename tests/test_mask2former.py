"""AUSM initialised from a Mask2Former is that Mask2Former until it has a history."""

import pytest
import torch
from tiny_backbones import TINY_SWIN
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, ResNetConfig, SwinConfig

from ausm_hf.mask2former import from_mask2former

STAGES = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
BACKBONES = {
    "swin": SwinConfig(**{name: value for name, value in TINY_SWIN.items() if name != "model_type"}),
    "resnet": ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], **STAGES),
}
LABELS = {0: "cat", 1: "dog", 2: "car"}


def mask2former(backbone: str = "swin", **overrides) -> Mask2FormerForUniversalSegmentation:
    torch.manual_seed(0)
    sizes = {
        "feature_size": 32,
        "mask_feature_size": 32,
        "hidden_dim": 32,
        "encoder_feedforward_dim": 32,
        "encoder_layers": 2,
        "decoder_layers": 5,
        "num_attention_heads": 2,
        "dim_feedforward": 48,
        "num_queries": 7,
        "id2label": LABELS,
    }
    config = Mask2FormerConfig(backbone_config=BACKBONES[backbone], **{**sizes, **overrides})
    model = Mask2FormerForUniversalSegmentation(config).eval()
    # Random masks are all but flat, how flat differs with the version; make them as decided as trained ones.
    last_layer = model.model.transformer_module.decoder.mask_predictor.mask_embedder.get_submodule("2.0")
    with torch.no_grad():
        spread = model(pixel_values=torch.randn(1, 3, 64, 96)).masks_queries_logits.std()
        last_layer.weight.div_(spread)
        last_layer.bias.div_(spread)
    return model


@pytest.mark.parametrize("backbone", ["swin", "resnet"])
@pytest.mark.parametrize("temporal_mixer", ["mamba", "mamba2"])
def test_same_masks_and_classes_without_history(backbone, temporal_mixer, tmp_path):
    theirs = mask2former(backbone)
    theirs.save_pretrained(tmp_path)
    ours = from_mask2former(
        tmp_path,
        temporal_mixer=temporal_mixer,
        num_compressor_layers=1,
        num_history_decoder_layers=1,
        mask_pooling=backbone == "resnet",
    )
    image = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = theirs(pixel_values=image)
        output = ours.step(image)
    torch.testing.assert_close(output.masks_queries_logits, expected.masks_queries_logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(output.class_queries_logits, expected.class_queries_logits, atol=1e-4, rtol=1e-4)
    assert expected.masks_queries_logits.std() > 0.5


def test_its_queries_are_learned_ones_whatever_the_preset_has():
    theirs = mask2former()
    ours = from_mask2former(theirs, preset="nano")
    queries = theirs.model.transformer_module.queries_features.weight
    assert not ours.config.query_selection and torch.equal(ours.model.detection_queries.weight, queries)
    with pytest.raises(ValueError, match="`query_selection` comes from the Mask2Former, False; it can't be True"):
        from_mask2former(theirs, query_selection=True)


def test_labels_are_matched_by_name():
    theirs = mask2former()
    ours = from_mask2former(theirs, label_sets={"mine": ["boat", "dog"]}, num_compressor_layers=1)
    assert ours.config.id2label == {0: "boat", 1: "dog"}
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = theirs(pixel_values=image).class_queries_logits
        output = ours.step(image).class_queries_logits
    torch.testing.assert_close(output[..., [1, 2]], expected[..., [1, 3]], atol=1e-4, rtol=1e-4)


def test_coco_labels_in_voc_spelling_get_coco_names():
    ours = from_mask2former(mask2former(id2label={0: "cat", 1: "sofa", 2: "tvmonitor"}), num_compressor_layers=1)
    assert ours.config.label_sets["coco"] == ["cat", "couch", "tv"]
    theirs = mask2former(id2label={0: "wall", 1: "sofa", 2: "tv"})  # not COCO's
    assert from_mask2former(theirs, num_compressor_layers=1).config.label_sets["coco"] == ["wall", "sofa", "tv"]
    theirs = mask2former(id2label={0: "cat", 1: "sofa", 2: "tvmonitor"})
    ours = from_mask2former(theirs, label_sets={"coco": ["tv", "couch"]}, num_compressor_layers=1)
    weight = theirs.class_predictor.weight
    assert torch.equal(ours.class_heads["coco"].weight[:2, : weight.shape[1]], weight[[2, 1]])


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`pre_norm`"):
        from_mask2former(mask2former(pre_norm=True))
    with pytest.raises(ValueError, match="has ReLUs; the Mask2Former has 'gelu'"):
        from_mask2former(mask2former(activation_function="gelu"))
    with pytest.raises(ValueError, match="`hidden_size` comes from the Mask2Former, 32"):
        from_mask2former(mask2former(), hidden_size=64)
    with pytest.raises(ValueError, match="no preset 'huge'"):
        from_mask2former(mask2former(), preset="huge")
    SwinConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a 'swin' checkpoint, not a Mask2Former"):
        from_mask2former(tmp_path)
