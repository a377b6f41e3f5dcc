"""AUSM model configuration."""

import copy
from typing import TYPE_CHECKING, Any, Literal

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from .backbone_efficientnet_lite import EfficientNetLiteConfig

CUSTOM_PIPELINES = {
    "video-segmentation": {
        "impl": "pipeline_ausm.VideoSegmentationPipeline",
        "pt": ["AutoModelForUniversalSegmentation"],
        "type": "video",
    }
}

COCO_LABELS = (
    "person|bicycle|car|motorcycle|airplane|bus|train|truck|boat|traffic light|fire hydrant|stop sign|parking meter|"
    "bench|bird|cat|dog|horse|sheep|cow|elephant|bear|zebra|giraffe|backpack|umbrella|handbag|tie|suitcase|frisbee|"
    "skis|snowboard|sports ball|kite|baseball bat|baseball glove|skateboard|surfboard|tennis racket|bottle|"
    "wine glass|cup|fork|knife|spoon|bowl|banana|apple|sandwich|orange|broccoli|carrot|hot dog|pizza|donut|cake|"
    "chair|couch|potted plant|bed|dining table|toilet|tv|laptop|mouse|remote|keyboard|cell phone|microwave|oven|"
    "toaster|sink|refrigerator|book|clock|vase|scissors|teddy bear|hair drier|toothbrush"
).split("|")

# Swin as Mask2Former uses it. Four stages, strides 4, 8, 16, 32.
_SWIN_STAGES = {"model_type": "swin", "out_features": ["stage1", "stage2", "stage3", "stage4"], "drop_path_rate": 0.3}

PRESETS: dict[str, dict[str, Any]] = {
    # At most 7.5 M parameters, made for a laptop CPU.
    "nano": {
        "backbone_config": {"model_type": "efficientnet_lite"},
        "pixel_encoder": "fpn",
        "hidden_size": 128,
        "mask_feature_size": 64,
        "mask_refinement_layers": 1,
        "num_attention_heads": 4,
        "temporal_mixer": "mamba2",
        "mamba_expand": 1,
        "mamba_head_dim": 32,
        "num_compressor_layers": 1,
        "num_history_decoder_layers": 1,
        "history_feedforward_size": 256,
        "history_stride": 16,
        "history_key_stride": 2,
        "history_self_attention": False,
        "history_local_kernel": 5,
        "history_gate_init": 1.0,
        "mask_propagation_radius": 4,
        "remember_appearance": True,
        "likeness_scale": 16.0,
        "likeness_offset": 0.96,
        "num_decoder_layers": 2,
        "decoder_feedforward_size": 512,
        "mask_pooling": True,
        "num_id_vectors": 32,
        "num_detection_queries": 20,
        "query_selection": True,
        "foreground_threshold": 0.45,
        "max_age": 300,
        "train_num_points": None,
        "no_object_weight": 0.3,
        "label_sets": {"coco": COCO_LABELS, "object": ["object"]},
    },
    # The paper's sizes.
    "tiny": {
        "backbone_config": {
            **_SWIN_STAGES,
            "embed_dim": 96,
            "depths": [2, 2, 6, 2],
            "num_heads": [3, 6, 12, 24],
            "window_size": 7,
        },
    },
    "base": {
        "backbone_config": {
            **_SWIN_STAGES,
            "embed_dim": 128,
            "depths": [2, 2, 18, 2],
            "num_heads": [4, 8, 16, 32],
            "window_size": 12,
        },
    },
}


# The smallest and the largest value of each number. A broken or hostile file must not take all memory, and no network
# of use comes near the largest sizes.
MAX_SIZE = 2**14
BOUNDS = {
    **dict.fromkeys(
        (
            "pixel_encoder_feedforward_size",
            "hidden_size",
            "mask_feature_size",
            "num_attention_heads",
            "mamba_state_size",
            "mamba_conv_kernel",
            "mamba_expand",
            "mamba_head_dim",
            "history_feedforward_size",
            "history_key_stride",
            "decoder_feedforward_size",
            "num_id_vectors",
            "num_detection_queries",
        ),
        (1, MAX_SIZE),
    ),
    **dict.fromkeys(("num_compressor_layers", "num_history_decoder_layers", "num_decoder_layers"), (1, 2**8)),
    **dict.fromkeys(("pixel_encoder_layers", "mask_refinement_layers"), (0, 2**8)),
    "history_local_kernel": (0, MAX_SIZE),
    "mask_propagation_radius": (0, 32),
    "likeness_scale": (0, 10**6),
    "likeness_offset": (-1, 1),
    "history_gate_init": (-(10**6), 10**6),
    "duplicate_overlap": (0, 1),
    "max_age": (1, 2**62),
    **dict.fromkeys(
        (f"{part}_weight" for part in ("class", "mask", "dice", "foreground", "selection", "reach", "no_object")),
        (0, 10**6),
    ),
    "train_num_points": (1, 2**24),
    "oversample_ratio": (1, 100),
    "importance_sample_ratio": (0, 1),
}


def _largest(values: Any) -> int:
    """The largest integer in nested lists and dictionaries."""
    if isinstance(values, (list, tuple, dict)):
        return max(map(_largest, values.values() if isinstance(values, dict) else values), default=0)
    return values if type(values) is int else 0


def _in_order(id2label: dict) -> list[str]:
    """The labels of `id2label`, whose keys JSON makes strings."""
    labels = {int(index): label for index, label in id2label.items()}
    if sorted(labels) != list(range(len(labels))):
        raise ValueError(f"`id2label` must number the labels from 0 on, got the numbers {sorted(labels)}.")
    return [labels[index] for index in range(len(labels))]


@strict
class AusmConfig(PreTrainedConfig):
    r"""
    Configuration of the Autoregressive Universal Segmentation Model (arXiv 2508.19242). The defaults are the paper's
    sizes with a Swin-B backbone; `AusmConfig.from_preset` gives the ready-made ones.

    Args:
        backbone_config (`dict` or `PreTrainedConfig`, *optional*):
            The frame-independent backbone. It must give four feature maps at strides 4, 8, 16 and 32.
        pixel_encoder (`str`, *optional*, defaults to `"msdeform"`):
            How the backbone's maps become features of `hidden_size` channels. `"msdeform"` is Mask2Former's
            multi-scale deformable attention (COCO weights of Mask2Former load into it), `"fpn"` a light top-down
            pyramid.
        pixel_encoder_layers (`int`, *optional*, defaults to 6):
            Layers of deformable attention. Ignored by `"fpn"`.
        pixel_encoder_feedforward_size (`int`, *optional*, defaults to 1024):
            Hidden size of the feed-forward of those layers. Ignored by `"fpn"`.
        hidden_size (`int`, *optional*, defaults to 256):
            D: channels of the features `X_t`, of ID vectors and of queries.
        mask_feature_size (`int`, *optional*, defaults to 256):
            Channels of the stride-4 map that a query's mask embedding is multiplied with.
        mask_refinement_layers (`int`, *optional*, defaults to 0):
            Convolutions that sharpen this map for `"fpn"`, whose own are few. Ignored by `"msdeform"`.
        num_attention_heads (`int`, *optional*, defaults to 8):
            Heads of every attention of the compressor, the history decoder and the pixel decoder.
        temporal_mixer (`str`, *optional*, defaults to `"mamba"`):
            The mixer over time, `"mamba"` (Mamba-1) or `"mamba2"`. The paper says "Mamba" and prints no sizes.
            `"mamba2"` is many times faster on a CPU.
        mamba_state_size (`int`, *optional*, defaults to 16):
            Numbers kept per channel of the mixer; with `mamba_expand` this sets the memory of a stream.
        mamba_conv_kernel (`int`, *optional*, defaults to 4):
            Frames that the causal convolution before the scan sees.
        mamba_expand (`int`, *optional*, defaults to 2):
            Inner channels of the mixer as a multiple of `hidden_size`.
        mamba_head_dim (`int`, *optional*, defaults to 64):
            Channels that share one decay. Only `"mamba2"` has heads.
        num_compressor_layers (`int`, *optional*, defaults to 6):
            Layers of the History Compressor (Mamba over time, attention over space, feed-forward).
        num_history_decoder_layers (`int`, *optional*, defaults to 6):
            Layers of the History Decoder.
        history_feedforward_size (`int`, *optional*, defaults to 1024):
            Hidden size of the feed-forwards of both. Not stated in the paper.
        history_stride (`int`, *optional*, defaults to 8):
            Stride of the map on which the history is kept: 8, 16 or 32. 8 is the paper's, that of the features `X_t`;
            16 makes the Mamba state of a stream, and the work of compressor and history decoder, four times smaller.
        history_key_stride (`int`, *optional*, defaults to 1):
            Keys and values of the attention over space are averaged over squares of this side, in cells of that map.
            1 is the paper's full attention; 2 makes attention four times cheaper.
        history_self_attention (`bool`, *optional*, defaults to `True`):
            Whether a History Decoder layer attends within the frame before it asks the history, as a standard
            Transformer decoder layer does. The paper only says "Transformer decoder layers".
        history_local_kernel (`int`, *optional*, defaults to 0):
            Side of a depthwise convolution that brings the compressed past to the same place of the current frame,
            before the History Decoder looks further; odd. Marks then pass a linear layer of their own, and what the
            history says of a pixel is read out again with the ID vector of each followed object, as a start for the
            logits of its mask. 0, the paper's form, has none of this. Without it a small network that is trained
            briefly hardly learns to heed its history, and confuses objects.
        mask_propagation_radius (`int`, *optional*, defaults to 0):
            How many stride-8 pixels far, in each direction, a pixel looks in the previous frame for what is like it.
            The masks of followed objects come along and become a start for the logits of their masks, so their
            outlines need not pass through ID vectors. 0, the paper's form, has none of this.
        remember_appearance (`bool`, *optional*, defaults to `False`):
            Whether a stream remembers what each followed object looks like, as a linear classifier of pixels that is
            fitted to the frames so far; a pixel that looks like an object then gives its mask a higher logit, wherever
            it is. The paper's form has none of this.
        likeness_scale, likeness_offset (`float`, *optional*, default to 0.0):
            In a stream, `likeness_scale * (cosine - likeness_offset)` is added to the foreground logit of a followed
            object, with the cosine between what its mask covers and what is most like it of what the object has
            looked like. So its id is away rather than on something else. The paper's form has none of this.
        history_gate_init (`float`, *optional*, defaults to 0.0):
            Initial gate of what the history adds to the frame's features. 0 makes a fresh network reproduce the
            Mask2Former that it was initialised from; networks that start without one start at 1.
        num_decoder_layers (`int`, *optional*, defaults to 9):
            Layers of the Pixel Decoder (Mask2Former's Transformer decoder with masked attention).
        decoder_feedforward_size (`int`, *optional*, defaults to 2048):
            Hidden size of its feed-forward.
        mask_pooling (`bool`, *optional*, defaults to `False`):
            Whether the classification heads read, beside a query's state, the mean of the frame's features at strides
            8, 16 and 32 over the query's mask, as OpenSeg's do. The paper's form has none of this.
        num_id_vectors (`int`, *optional*, defaults to 100):
            N_id: ID vectors in the buffer `B`, hence objects that can be followed at the same time.
        num_detection_queries (`int`, *optional*, defaults to 100):
            N_det: queries `V` that look for objects which nobody follows yet.
        query_selection (`bool`, *optional*, defaults to `False`):
            Whether these queries are features of the frame, from where objects seem to be, as in FastInst, and their
            masks lie around that place. In the paper's form they are learned vectors, the same in every frame; a small
            network that is trained briefly then finds hardly more than what stands out.
        label_sets (`dict[str, list[str]]`, *optional*):
            Name of a label set -> its labels. There is one classification head per label set, as in the paper.
            COCO's by default, or one called "labels" with those of `id2label` or `num_labels` if these are given.
        default_label_set (`str`, *optional*):
            The label set used when none is asked for, the first one by default. Its labels are `id2label`: setting
            `id2label` or `num_labels` replaces them; assign, editing the dict in place changes nothing.
        foreground_threshold (`float`, *optional*, defaults to 0.5):
            Foreground above which a detection becomes an object (the IoU that its mask may have), and below which a
            followed object that was not prompted counts as absent (the probability that it is there). A prompted one
            counts as absent below 0.5.
        duplicate_overlap (`float`, *optional*, defaults to 0.5):
            A detection of which followed objects cover more than this share is no new object, and one that covers more
            than this share of one found object, under the same name, is that object with more of it. A followed object
            that was not prompted, and whose mask comes to have a larger IoU than this with that of an older or a
            prompted one, is let go. Not in the paper.
        max_age (`int`, *optional*, defaults to 60):
            Frames after which an unprompted object that has not been seen gives its ID vector back; sooner where all
            of them are taken and something new is found. `None`: only then.
        class_weight, mask_weight, dice_weight, foreground_weight (`float`, *optional*):
            Weights of the losses, and of the costs of the matching. The paper does not print them; these are
            Mask2Former's, and the class weight for the foreground. The sums of all losses are divided by the number of
            objects; Mask2Former divides that of the classes by the sum of its weights, so it weighs less there.
        selection_weight (`float`, *optional*, defaults to 2.0):
            Weight of the loss of `query_selection`.
        reach_weight (`float`, *optional*, defaults to 1.0):
            Weight of the loss of the ellipses that the masks of selected queries lie in.
        no_object_weight (`float`, *optional*, defaults to 0.1):
            Weight of unmatched detections in the classification and foreground losses.
        train_num_points (`int`, *optional*, defaults to 12544):
            Points at which the mask losses are computed, drawn as in Mask2Former. `None`: all pixels at stride 4.
        oversample_ratio, importance_sample_ratio (`float`, *optional*):
            Mask2Former's point sampling: candidates per point, and the share taken where the mask is most uncertain.
        importance_sampling (`str`, *optional*, defaults to `"uncertain"`):
            `"wrong"` takes them where the mask is most wrong instead: also where it is sure, as in the middle of an
            object that another one's mask has taken over.

    Example:

    ```python
    >>> from ausm_hf import AusmConfig, AusmForUniversalSegmentation

    >>> config = AusmConfig.from_preset("nano")
    >>> model = AusmForUniversalSegmentation(config)
    ```
    """

    model_type = "ausm"
    sub_configs = {"backbone_config": AutoConfig}
    keys_to_ignore_at_inference = ["loss_dict", "history"]  # what Trainer can't gather
    attribute_map = {"num_hidden_layers": "num_decoder_layers"}

    # What is not given is filled in at once.
    if TYPE_CHECKING:
        backbone_config: PreTrainedConfig = None  # type: ignore[assignment]
        label_sets: dict[str, list[str]] = None  # type: ignore[assignment]
        default_label_set: str = None  # type: ignore[assignment]
    else:
        backbone_config: dict | PreTrainedConfig | None = None
        label_sets: dict[str, list[str]] | None = None
        default_label_set: str | None = None
    pixel_encoder: Literal["msdeform", "fpn"] = "msdeform"
    pixel_encoder_layers: int = 6
    pixel_encoder_feedforward_size: int = 1024
    hidden_size: int = 256
    mask_feature_size: int = 256
    mask_refinement_layers: int = 0
    num_attention_heads: int = 8
    temporal_mixer: Literal["mamba", "mamba2"] = "mamba"
    mamba_state_size: int = 16
    mamba_conv_kernel: int = 4
    mamba_expand: int = 2
    mamba_head_dim: int = 64
    num_compressor_layers: int = 6
    num_history_decoder_layers: int = 6
    history_feedforward_size: int = 1024
    history_stride: Literal[8, 16, 32] = 8
    history_key_stride: int = 1
    history_self_attention: bool = True
    history_local_kernel: int = 0
    mask_propagation_radius: int = 0
    remember_appearance: bool = False
    likeness_scale: float | int = 0.0
    likeness_offset: float | int = 0.0
    history_gate_init: float | int = 0.0
    num_decoder_layers: int = 9
    decoder_feedforward_size: int = 2048
    mask_pooling: bool = False
    num_id_vectors: int = 100
    num_detection_queries: int = 100
    query_selection: bool = False
    foreground_threshold: float | int = 0.5
    duplicate_overlap: float | int = 0.5
    max_age: int | None = 60
    class_weight: float | int = 2.0
    mask_weight: float | int = 5.0
    dice_weight: float | int = 5.0
    foreground_weight: float | int = 2.0
    selection_weight: float | int = 2.0
    reach_weight: float | int = 1.0
    no_object_weight: float | int = 0.1
    train_num_points: int | None = 12544
    oversample_ratio: float | int = 3.0
    importance_sample_ratio: float | int = 0.75
    importance_sampling: Literal["uncertain", "wrong"] = "uncertain"

    def __post_init__(self, **kwargs):
        legacy = {"backbone", "use_timm_backbone", "use_pretrained_backbone", "backbone_kwargs"}
        if old := sorted(name for name in legacy & set(kwargs) if kwargs[name]):
            raise ValueError(f"`{old[0]}` is no setting of AUSM; name the backbone in `backbone_config`.")
        if self.backbone_config is None:
            self.backbone_config = PRESETS["base"]["backbone_config"]
        if isinstance(self.backbone_config, dict):
            values = copy.deepcopy(self.backbone_config)  # its lists may be a preset's
            model_type = values.pop("model_type", None)
            if model_type == EfficientNetLiteConfig.model_type:
                self.backbone_config = EfficientNetLiteConfig(**values)
            elif model_type in CONFIG_MAPPING:
                self.backbone_config = CONFIG_MAPPING[model_type](**values)
            else:
                raise ValueError(f"`backbone_config` needs a known `model_type`, got {model_type!r}.")
        num_labels = kwargs.pop("num_labels", None)
        if self.label_sets is None:
            if self.id2label is not None:
                self.label_sets = {"labels": _in_order(self.id2label)}
            elif num_labels is not None:
                self.label_sets = {"labels": [f"LABEL_{index}" for index in range(num_labels)]}
            else:
                self.label_sets = {"coco": list(COCO_LABELS)}
        if num_labels is not None:
            self.num_labels = num_labels
        # Which of the files saved beside it is the pipeline, for where this package isn't installed.
        kwargs.setdefault("custom_pipelines", CUSTOM_PIPELINES)
        # The class that is saved names its own Auto class; the bare network loads from the same file.
        kwargs.setdefault("auto_map", {"AutoModel": "modeling_ausm.AusmModel"})
        super().__post_init__(**kwargs)

    def __setattr__(self, name: str, value: Any):
        """Keeps `label_sets`, `default_label_set` and the labels that all of transformers knows of in agreement."""
        if name == "id2label" and self.default_label_set in (self.label_sets or {}):
            self.label_sets = {**self.label_sets, self.default_label_set: _in_order(value)}
            return
        if name == "label_sets" and value and "label_sets" not in self.__dict__ and self.id2label is not None:
            if _in_order(self.id2label) not in value.values():
                raise ValueError("`id2label` and `label_sets` have different labels: give one, or the same in both.")
        was_known = self.default_label_set in (self.label_sets or {})
        super().__setattr__(name, value)
        if name in ("label_sets", "default_label_set") and self.label_sets:
            gone = name == "label_sets" and was_known and self.default_label_set not in self.label_sets
            if self.default_label_set is None or gone:
                super().__setattr__("default_label_set", next(iter(self.label_sets)))
            labels = self.label_sets.get(self.default_label_set, [])
            super().__setattr__("id2label", dict(enumerate(labels)))
            super().__setattr__("label2id", {label: index for index, label in enumerate(labels)})

    def validate_architecture(self):
        """Refuses sizes that do not fit together, before anything is allocated."""
        for name, (low, high) in BOUNDS.items():
            value = getattr(self, name)
            if value is None and name in ("train_num_points", "max_age"):
                continue
            if not low <= value <= high:
                raise ValueError(f"`{name}` must lie in {low} .. {high}, got {value}.")
        sizes = {k: v for k, v in self.backbone_config.to_dict().items() if k not in ("id2label", "label2id")}
        if (largest := _largest(sizes)) > MAX_SIZE:
            raise ValueError(f"`backbone_config` must have sizes of at most {MAX_SIZE}, got {largest}.")
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"`hidden_size` must be a multiple of twice `num_attention_heads`, got {self.hidden_size} and "
                f"{self.num_attention_heads}."
            )
        if self.hidden_size % 4:
            raise ValueError(f"`hidden_size` must be a multiple of 4 for 2-D sine positions, got {self.hidden_size}.")
        # Channels are normalised in groups: 32 in Mask2Former's pixel decoder, 8 in the pyramid.
        of_fpn = {"hidden_size": 8, "mask_feature_size": 8}
        for name, group in (of_fpn if self.pixel_encoder == "fpn" else {"hidden_size": 32}).items():
            if getattr(self, name) % group:
                raise ValueError(
                    f"`{name}` must be a multiple of {group} with {self.pixel_encoder!r}, got {getattr(self, name)}."
                )
        if self.temporal_mixer == "mamba2" and (self.mamba_expand * self.hidden_size) % self.mamba_head_dim:
            raise ValueError(
                f"`mamba_head_dim` must divide mamba_expand x hidden_size = {self.mamba_expand * self.hidden_size}, "
                f"got {self.mamba_head_dim}."
            )
        if self.history_local_kernel and self.history_local_kernel % 2 == 0:
            raise ValueError(f"`history_local_kernel` must be 0 or odd, got {self.history_local_kernel}.")
        if self.pixel_encoder == "msdeform" and self.pixel_encoder_layers < 1:
            raise ValueError(f"`pixel_encoder_layers` must be at least 1, got {self.pixel_encoder_layers}.")
        if not self.label_sets:
            raise ValueError("`label_sets` must name at least one label set.")
        for name, labels in self.label_sets.items():
            if not labels:
                raise ValueError(f"`label_sets[{name!r}]` has no labels.")
            if not name.isidentifier() or hasattr(nn.ModuleDict, name) or name == "training":  # heads are attributes
                raise ValueError(
                    f"The name of a label set must be an identifier that torch doesn't use, got {name!r}."
                )
        if self.default_label_set not in self.label_sets:
            raise ValueError(
                f"`default_label_set` must be one of {sorted(self.label_sets)}, got {self.default_label_set!r}."
            )
        if not 0 < self.foreground_threshold < 1:
            raise ValueError(f"`foreground_threshold` must lie between 0 and 1, got {self.foreground_threshold}.")

    @classmethod
    def from_preset(cls, preset: str, **overrides) -> "AusmConfig":
        """
        The configuration of a preset, `"nano"`, `"tiny"` (Swin-T) or `"base"` (Swin-B), with fields overridden.
        `id2label` names the labels of its default label set.

        Raises:
            ValueError: If there is no such preset.
        """
        if preset not in PRESETS:
            raise ValueError(f"There is no preset {preset!r}; choose one of {', '.join(PRESETS)}.")
        id2label = overrides.pop("id2label", None)
        config = cls(**{**PRESETS[preset], **overrides})
        if id2label is not None:
            config.id2label = id2label
        return config


__all__ = ["AusmConfig"]
