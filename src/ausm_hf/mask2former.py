"""Start AUSM from a Mask2Former checkpoint, as the paper does: a strong image model that then learns history."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, Mask2FormerConfig, Mask2FormerForUniversalSegmentation

from .model.configuration_ausm import COCO_LABELS, AusmConfig
from .model.modeling_ausm import AusmForUniversalSegmentation

# Mask2Former's checkpoints for COCO instances on the Hub spell six labels as Pascal VOC does.
VOC_SPELLING = {
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
}


def from_mask2former(
    source: str | os.PathLike | Mask2FormerForUniversalSegmentation, preset: str = "base", **overrides
) -> AusmForUniversalSegmentation:
    """
    An AUSM network with the weights of a Mask2Former. On a single image without history it gives the same masks and,
    for labels that both have, the same class logits.

    Backbone, pixel encoder, detection queries, pixel decoder and class head come from the Mask2Former, and so do
    their sizes. The history modules are new; their gate starts at zero. ID vectors are new. The foreground head, for
    which Mask2Former has no counterpart, starts at "mean label against no object".

    Args:
        source: Folder, Hub id or loaded model.
        preset: Where the sizes of the history come from, `"tiny"` or `"base"`.
        overrides: Fields of [`AusmConfig`]. With `label_sets` of one's own the class head of the default set is
            filled label by label, by name; labels that Mask2Former does not have start at random. A Mask2Former for
            COCO has COCO's names here, however its checkpoint spells them.

    Raises:
        ValueError: If the checkpoint is not a Mask2Former, has a layout that AUSM does not (pre-norm, input
            projections, activations other than ReLU, strides other than 4, 8, 16, 32), or an override contradicts it.
    """
    if not isinstance(source, Mask2FormerForUniversalSegmentation):
        config = AutoConfig.from_pretrained(source)
        if not isinstance(config, Mask2FormerConfig):
            raise ValueError(f"{str(source)!r} is a {config.model_type!r} checkpoint, not a Mask2Former.")
        source = Mask2FormerForUniversalSegmentation.from_pretrained(source, dtype="auto")
    theirs = source.config
    if theirs.pre_norm or theirs.enforce_input_projection or theirs.feature_size != theirs.hidden_dim:
        raise ValueError(
            "A Mask2Former with `pre_norm`, `enforce_input_projection` or `feature_size` other than `hidden_dim` "
            "can't be turned into AUSM."
        )
    if theirs.activation_function != "relu":
        raise ValueError(f"AUSM's decoder has ReLUs; the Mask2Former has {theirs.activation_function!r}.")
    if list(theirs.feature_strides) != [4, 8, 16, 32] or theirs.common_stride != 4:
        raise ValueError(f"AUSM wants feature strides 4, 8, 16, 32; the Mask2Former has {theirs.feature_strides}.")
    sizes = {
        "backbone_config": theirs.backbone_config,
        "pixel_encoder": "msdeform",
        "pixel_encoder_layers": theirs.encoder_layers,
        "pixel_encoder_feedforward_size": theirs.encoder_feedforward_dim,
        "hidden_size": theirs.hidden_dim,
        "mask_feature_size": theirs.mask_feature_size,
        "num_attention_heads": theirs.num_attention_heads,
        # Mask2Former counts the prediction before the first layer.
        "num_decoder_layers": theirs.decoder_layers - 1,
        "decoder_feedforward_size": theirs.dim_feedforward,
        "num_detection_queries": theirs.num_queries,
        "query_selection": False,
    }
    for name, value in sizes.items():
        if name in overrides and overrides[name] != value:
            raise ValueError(f"`{name}` comes from the Mask2Former, {value!r}; it can't be {overrides[name]!r}.")
    their_labels = {int(index): label for index, label in (theirs.id2label or {}).items()}
    in_coco = {index: VOC_SPELLING.get(label, label) for index, label in their_labels.items()}
    if set(in_coco.values()) <= set(COCO_LABELS):  # not of another data set
        their_labels = in_coco
    label_sets = {"coco": [their_labels[index] for index in range(len(their_labels))]}
    config = AusmConfig.from_preset(preset, **{"label_sets": label_sets, **overrides, **sizes})
    model = AusmForUniversalSegmentation(config)

    weights = _model_weights(source)
    head: Any = model.class_heads[config.default_label_set]
    weight, bias = source.class_predictor.weight, source.class_predictor.bias
    known = {label: index for index, label in their_labels.items()}
    head_weight, head_bias = head.weight.detach().clone(), head.bias.detach().clone()
    # With `mask_pooling` a head reads more than theirs did.
    rows = F.pad(weight.detach(), (0, head_weight.shape[1] - weight.shape[1]))
    for index, label in enumerate(config.label_sets[config.default_label_set]):
        if label in known:
            head_weight[index], head_bias[index] = rows[known[label]], bias[known[label]].detach()
    head_weight[-1], head_bias[-1] = rows[-1], bias[-1].detach()
    weights[f"class_heads.{config.default_label_set}.weight"] = head_weight
    weights[f"class_heads.{config.default_label_set}.bias"] = head_bias
    weights["foreground_head.weight"] = (weight[:-1].mean(dim=0) - weight[-1])[None].detach()
    weights["foreground_head.bias"] = (bias[:-1].mean() - bias[-1])[None].detach()

    missing, unexpected = model.load_state_dict(weights, strict=False)
    new = ("model.history_encoder.", "model.id_vectors.", "model.id_positions.", "class_heads.")
    left_out = [name for name in missing if not name.startswith(new)]
    if left_out or unexpected:
        raise ValueError(f"The Mask2Former lacks {left_out} and has {unexpected} that AUSM does not know.")
    return model.eval()


def _model_weights(source: Mask2FormerForUniversalSegmentation) -> dict[str, Tensor]:
    """The weights of everything but the heads, by AUSM's names."""
    decoder = "model.transformer_module.decoder."
    prefixes = {
        "model.pixel_level_module.encoder.": "model.backbone.",
        "model.pixel_level_module.decoder.": "model.pixel_encoder.",
        "model.transformer_module.queries_features.": "model.detection_queries.",
        "model.transformer_module.queries_embedder.": "model.detection_positions.",
        "model.transformer_module.level_embed.": "model.pixel_decoder.level_embed.",
        f"{decoder}layernorm.": "model.pixel_decoder.layernorm.",
        f"{decoder}mask_predictor.mask_embedder.0.0.": "model.pixel_decoder.mask_embedder.0.",
        f"{decoder}mask_predictor.mask_embedder.1.0.": "model.pixel_decoder.mask_embedder.2.",
        f"{decoder}mask_predictor.mask_embedder.2.0.": "model.pixel_decoder.mask_embedder.4.",
        f"{decoder}layers.": "model.pixel_decoder.layers.",
    }
    weights = {}
    for name, tensor in source.state_dict().items():
        prefix = next((p for p in prefixes if name.startswith(p)), None)
        if prefix is None:
            continue  # heads and the loss's constants
        name = prefixes[prefix] + name.removeprefix(prefix)
        if ".cross_attn.in_proj_" in name:
            kind = name.rsplit("_", 1)[1]
            for projection, part in zip("qkv", tensor.chunk(3)):
                weights[name.replace(f"in_proj_{kind}", f"{projection}_proj.{kind}")] = part
        elif name.startswith("model.pixel_decoder.layers.") and ".fc" in name:
            weights[name.replace(".fc", ".feedforward.fc")] = tensor
        else:
            weights[name] = tensor
    return {name: tensor.detach().to(torch.float32) for name, tensor in weights.items()}


__all__ = ["from_mask2former"]
