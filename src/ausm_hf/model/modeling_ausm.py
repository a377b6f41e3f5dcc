"""
The AUSM network (arXiv 2508.19242).

    X_t = frame encoder(I_t)
    G_t = X_t + what the history says (history_ausm.py)
    tracked_t, detected_t = pixel decoder(queries [A_{t-1}; V], G_t)

Letters: B batch, T frames, n objects followed, Q = n + N_det queries in the order [A; V], D hidden size; H, W frame
size, h = H / 4 and w = W / 4 size of the masks.

One set of modules runs in two forms: `forward` takes all frames of a clip at once with a given history (training),
`step` one frame and the history so far (streaming). `step` is `forward` with T = 1 and a carried history.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoBackbone, PreTrainedModel
from transformers import initialization as init
from transformers.models.mask2former.modeling_mask2former import Mask2FormerPixelDecoder
from transformers.utils import logging
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .backbone_efficientnet_lite import EfficientNetLiteBackbone, EfficientNetLiteConfig
from .configuration_ausm import AusmConfig
from .history_ausm import (
    AusmAppearance,
    AusmAttention,
    AusmHistory,
    AusmHistoryEncoder,
    AusmMaskPropagation,
    mark_history,
)
from .loss_ausm import AusmLoss, TeacherForcing, pad_instances, plan_teacher_forcing
from .maps_ausm import average_maps, resize_maps, to_tokens
from .outputs_ausm import AusmForUniversalSegmentationOutput, AusmModelOutput
from .pixels_ausm import (
    AusmDeformablePixelEncoder,
    AusmFrameFeatures,
    AusmPixelDecoder,
    AusmPixelDecoderLayer,
    AusmPyramidPixelEncoder,
    AusmQuerySelection,
    check_strides,
    pool_in_masks,
    sine_positions,
)
from .session_ausm import AusmInferenceSession, AusmVideoSegmentationOutput
from .streaming_ausm import preview_prompts, propagate_in_video_iterator, step_session, step_sessions
from .temporal_mamba import TemporalMamba, TemporalMamba2

if TYPE_CHECKING:  # what a model's file imports is saved with a model, so the pipeline is
    from .pipeline_ausm import VideoSegmentationPipeline  # noqa: F401

logger = logging.get_logger(__name__)

FRAME_DIVISOR = 32  # the coarsest stride of the backbone


class AusmPreTrainedModel(PreTrainedModel):
    """What both models share: configuration, initial weights, and what of transformers they support."""

    config_class = AusmConfig
    config: AusmConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values_videos"
    input_modalities = ["video"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    # Those of the parts are added. FSDP takes them for its units, so each must be called whole.
    _no_split_modules = ["AusmCompressorLayer", "AusmHistoryDecoderLayer", "AusmPixelDecoderLayer"]

    def get_input_embeddings(self) -> None:
        """There are none; Accelerate asks before it shards a network."""

    @property
    def device(self) -> torch.device:
        """Where the network computes, also when Accelerate keeps its weights elsewhere."""
        device = super().device
        if device.type == "meta" and (device_map := getattr(self, "hf_device_map", None)):
            return torch.device(next((x for x in device_map.values() if x not in ("cpu", "disk")), "cpu"))
        return device

    def init_history(self, batch_size: int = 1) -> AusmHistory:
        """The history of `batch_size` streams before their first frame."""
        return AusmHistory.empty(batch_size, self.device, self.dtype)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight, gain=getattr(module, "init_gain", 1.0))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="linear")
            if (gain := getattr(module, "init_gain", 1.0)) != 1.0:
                init.copy_(module.weight, gain * module.weight)
            if module.bias is not None:
                init.constant_(module.bias, getattr(module, "init_bias", 0.0))
        elif isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight)
        elif isinstance(module, (TemporalMamba, TemporalMamba2)):
            module.reset_parameters()
        elif isinstance(module, AusmHistoryEncoder):
            init.normal_(module.initial_features)
            init.constant_(module.gate, self.config.history_gate_init)
            encoder: Any = module  # of its parts some may be None
            for layer in encoder.decoder:
                # Frames start by looking at what is alike in the past, and near.
                init.copy_(layer.cross_attention.k_proj.weight, layer.cross_attention.q_proj.weight)
            if self.config.history_local_kernel:
                # Marks start with something in common, and reach the same place of the next frame, and what looks
                # alike, unchanged: a network learns to heed quickly what it can't overlook.
                identity = torch.eye(self.config.hidden_size)
                init.copy_(encoder.mark_projection.weight, 1.5 * identity)
                init.normal_(encoder.mark_projection.bias)
                init.dirac_(encoder.local_read.weight, groups=self.config.hidden_size)
                init.copy_(encoder.local_read.weight, 3 * encoder.local_read.weight)
                init.zeros_(encoder.local_read.bias)
                for layer in encoder.decoder:
                    init.copy_(layer.cross_attention.v_proj.weight, identity)
                    init.copy_(layer.cross_attention.out_proj.weight, identity)
                init.copy_(encoder.output_projection.weight, 2 * identity)
                # About 8 where the vector was painted, whatever the hidden size; 5 with the offset.
                init.copy_(encoder.mark_readout.projection.weight, 8 * encoder.mark_readout.scaling * identity)
                init.constant_(encoder.mark_readout.offset, -3.0)
        elif isinstance(module, AusmMaskPropagation):
            init.copy_(module.projection.weight, torch.eye(self.config.hidden_size))
            init.constant_(module.log_sharpness, math.log(33.0))
            init.constant_(module.scale, 8.0)
            init.constant_(module.offset, -4.0)
        elif isinstance(module, AusmAppearance):
            init.constant_(module.scale, 4.0)
        elif isinstance(module, Mask2FormerPixelDecoder):
            init.normal_(module.level_embed)
            # Deformable attention looks in n_heads directions, n_points far. (Transformers passes over its own class.)
            for layer in module.encoder.layers:
                attention: Any = layer.self_attn
                angles = torch.arange(attention.n_heads, dtype=torch.float32) * (2.0 * math.pi / attention.n_heads)
                directions = torch.stack([angles.cos(), angles.sin()], -1)
                directions = directions / directions.abs().amax(-1, keepdim=True)
                steps = torch.arange(1, attention.n_points + 1, dtype=torch.float32)
                offsets = directions[:, None, None, :] * steps[None, None, :, None]
                init.zeros_(attention.sampling_offsets.weight)
                init.copy_(attention.sampling_offsets.bias, offsets.expand(-1, attention.n_levels, -1, -1).flatten())
                init.zeros_(attention.attention_weights.weight)
                init.zeros_(attention.attention_weights.bias)


def _make_backbone(config: Any) -> Any:
    # By name: code loaded from a checkpoint may hold a second copy of the class.
    if config.model_type == EfficientNetLiteConfig.model_type:
        return EfficientNetLiteBackbone(config)
    return AutoBackbone.from_config(config)


class AusmModel(AusmPreTrainedModel):
    """The bare network: frames and history to query states and masks, without foreground and class heads."""

    _keys_to_ignore_on_load_unexpected = [r"^class_heads\.", r"^foreground_head\."]
    _can_record_outputs = {
        "hidden_states": AusmPixelDecoderLayer,
        "attentions": OutputRecorder(AusmAttention, index=1, layer_name="self_attn"),
        "cross_attentions": OutputRecorder(AusmAttention, index=1, layer_name="cross_attn"),
    }

    def __init__(self, config: AusmConfig):
        super().__init__(config)
        try:
            self.backbone = _make_backbone(config.backbone_config)
        except ValueError:
            # A backbone that doesn't know the kind of attention that was asked for takes the one that it knows.
            config.backbone_config._attn_implementation = None
            self.backbone = _make_backbone(config.backbone_config)
        if len(self.backbone.channels) != 4:
            raise ValueError(
                "`backbone_config` must give four feature maps, at strides 4, 8, 16 and 32; got "
                f"{len(self.backbone.channels)}. Set its `out_features`."
            )
        encoders = {"msdeform": AusmDeformablePixelEncoder, "fpn": AusmPyramidPixelEncoder}
        self.pixel_encoder: Any = encoders[config.pixel_encoder](config, self.backbone.channels)
        # B and V, each with the positions that Mask2Former's queries have. An ID vector is mark and query in one.
        self.id_vectors = nn.Embedding(config.num_id_vectors, config.hidden_size)
        self.id_positions = nn.Embedding(config.num_id_vectors, config.hidden_size)
        if config.query_selection:
            self.query_selection = AusmQuerySelection(config)
        else:
            self.detection_queries = nn.Embedding(config.num_detection_queries, config.hidden_size)
            self.detection_positions = nn.Embedding(config.num_detection_queries, config.hidden_size)
        self.history_encoder = AusmHistoryEncoder(config)
        self.pixel_decoder = AusmPixelDecoder(config)
        self.post_init()
        self.train()

    def train(self, mode: bool = True) -> AusmModel:
        """
        As of any module; but batch norms of the backbone keep their statistics, as in DETR. With those of a batch the
        frames of a clip would see one another, the later ones too.
        """
        super().train(mode)
        for module in self.backbone.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def encode_frames(self, pixel_values: Tensor) -> AusmFrameFeatures:
        """
        What the network sees in each frame alone: backbone and pixel encoder.

        Args:
            pixel_values (`torch.Tensor` of shape `(N, 3, H, W)`): The frames; H and W multiples of 32.

        Raises:
            ValueError: If the shape is wrong.
        """
        _check_frames(pixel_values.unsqueeze(1))
        # Channels last: convolutions are faster so, and maps become tokens without a copy.
        images = pixel_values.to(self.dtype, memory_format=torch.channels_last)
        feature_maps = self.backbone(images).feature_maps
        check_strides(feature_maps, images)
        return AusmFrameFeatures(tuple(self.pixel_encoder(feature_maps)), feature_maps[0])

    def step(
        self,
        pixel_values: Tensor | AusmFrameFeatures,
        history: AusmHistory | None = None,
    ) -> AusmModelOutput:
        """
        One frame of a stream, the recurrent form.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)` or `AusmFrameFeatures`): The frame, H and W multiples
                of 32, or what `encode_frames` made of it.
            history (`AusmHistory`, *optional*): What the previous step returned, with `A_{t-1}` and `M_{t-1}` filled
                in by `history.replace_objects`; a fresh one by default.

        Returns:
            [`AusmModelOutput`] without the T axis. It is the caller who decides what `A_t` and `M_t` are.
        """
        frames = pixel_values if isinstance(pixel_values, AusmFrameFeatures) else self.encode_frames(pixel_values)
        output = self(frame_features=frames, history=history, return_dict=True)
        of_frame: dict[str, Any] = {k: v.squeeze(1) if isinstance(v, Tensor) else v for k, v in output.items()}
        return AusmModelOutput(**of_frame)

    @capture_outputs
    def forward(
        self,
        pixel_values_videos: Tensor | None = None,
        history_masks: Tensor | None = None,
        id_slots: Tensor | None = None,
        taken: Tensor | None = None,
        history: AusmHistory | None = None,
        output_intermediate: bool = False,
        frame_features: AusmFrameFeatures | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> AusmModelOutput:
        """
        All frames of a clip at once, the parallel form.

        Args:
            pixel_values_videos (`torch.Tensor` of shape `(B, T, 3, H, W)`): Frames; H and W multiples of 32.
            history_masks (`torch.Tensor` of shape `(B, T, n, height, width)`, *optional*): `M_0 .. M_{T-1}`: entry t
                is what the network may know when it sees frame t + 1.
            id_slots (`torch.LongTensor` of shape `(B, n)`, *optional*): The ID vector of each object.
            taken (`torch.BoolTensor` of shape `(B, T, n)`, *optional*): Whether the object is followed in that frame.
            history (`AusmHistory`, *optional*): Where the streams stand before the first of these frames.
            output_intermediate (`bool`): Also give the predictions of every layer.
            frame_features (`AusmFrameFeatures`, *optional*): What `encode_frames` made of B frames, instead of
                `pixel_values_videos`; T is 1.
            output_hidden_states, output_attentions (`bool`, *optional*): Also give what the Pixel Decoder's layers
                compute; as the configuration says by default. There are attentions with the eager implementation only.
            return_dict (`bool`, *optional*): False for a plain tuple; as the configuration says by default.

        Raises:
            ValueError: If a shape is not as above.
        """
        # `capture_outputs` gathers hidden states and attentions, and makes the tuple.
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_attentions and self.config._attn_implementation != "eager":
            logger.warning_once(
                f"Attention {self.config._attn_implementation!r} never computes the weights that `output_attentions` "
                "asks for; call `model.set_attn_implementation('eager')` to get them."
            )
        if (pixel_values_videos is None) == (frame_features is None):
            raise ValueError("Give either `pixel_values_videos` or `frame_features`.")
        if pixel_values_videos is not None:
            _check_frames(pixel_values_videos)
            frame_features = self.encode_frames(pixel_values_videos.flatten(0, 1))
        assert frame_features is not None
        features, device = frame_features.levels[0], frame_features.stride_4.device
        frames = 1 if pixel_values_videos is None else pixel_values_videos.shape[1]
        batch = len(features) // frames
        if history is None:
            history = AusmHistory.empty(batch, device, self.dtype)
        if history.features is not None and history.features.shape[-2:] != features.shape[-2:]:
            raise ValueError(
                f"`history` is of frames whose stride-8 maps have the size {tuple(history.features.shape[-2:])}; "
                f"theirs is {tuple(features.shape[-2:])}."
            )
        given = [x is not None for x in (history_masks, id_slots, taken)]
        if any(given) != all(given):
            raise ValueError("`history_masks`, `id_slots` and `taken` go together: give all of them or none.")
        if history_masks is None or id_slots is None or taken is None:
            history_masks = history.masks.unsqueeze(1).expand(-1, frames, -1, -1, -1)
            id_slots, taken = history.slots, history.taken.unsqueeze(1).expand(-1, frames, -1)
        if taken.shape != (batch, frames, id_slots.shape[1]) or history_masks.shape[:3] != taken.shape:
            raise ValueError(
                f"For {batch} clips of {frames} frames, `id_slots` (B, n), `taken` (B, T, n) and `history_masks` "
                f"(B, T, n, height, width) are wanted; got {tuple(id_slots.shape)}, {tuple(taken.shape)} and "
                f"{tuple(history_masks.shape)}."
            )

        # What the history says of the frame
        size = features.shape[-2], features.shape[-1]

        def over_frames(x: Tensor) -> Tensor:
            return x.unsqueeze(1).expand(-1, frames, *x.shape[1:]).flatten(0, 1)

        id_vectors = self.id_vectors(id_slots)
        seen_masks = history_masks * taken[..., None, None]
        seen_masks_per_frame = seen_masks.flatten(0, 1)
        history_size = size[0] * 8 // self.config.history_stride, size[1] * 8 // self.config.history_stride
        marks = over_frames(self.history_encoder.mark_vectors(id_vectors))
        marks = mark_history(marks, seen_masks_per_frame, history_size)
        positions = sine_positions(history_size, features.shape[1], features)
        change, followed, states, appearance = self.history_encoder(
            features, seen_masks, id_slots, taken, marks, positions, history
        )
        changes = [resize_maps(change, (level.shape[-2], level.shape[-1])) for level in frame_features.levels]
        levels = [level + change for level, change in zip(frame_features.levels, changes)]
        mask_features = self.pixel_encoder.mask_features(levels[0], frame_features.stride_4)

        tracked_logits = self.history_encoder.read_marks(over_frames(id_vectors), changes[0])
        if followed is not None:
            tracked_logits = followed + (0 if tracked_logits is None else tracked_logits)

        # Who is where
        places = selection_logits = None
        if self.config.query_selection:
            selected = self.query_selection(levels[1])
            detections, detection_positions, places = selected.queries, selected.positions, selected.places
            selection_logits = selected.logits.unflatten(0, (batch, frames))
        else:
            # Called, not read: see `HeldConv1d`.
            numbers = torch.arange(self.config.num_detection_queries, device=device)
            detections = self.detection_queries(numbers).expand(batch * frames, -1, -1)
            detection_positions = self.detection_positions(numbers).expand(batch * frames, -1, -1)
        query_mask = F.pad(taken.flatten(0, 1), (0, detections.shape[1]), value=True)[:, None, None, :]
        states_per_layer, masks_per_layer = self.pixel_decoder(
            torch.cat([over_frames(id_vectors), detections], dim=1),
            torch.cat([over_frames(self.id_positions(id_slots)), detection_positions], dim=1),
            query_mask if id_slots.shape[1] else None,
            levels,
            mask_features,
            seen_masks_per_frame,
            tracked_logits,
            places,
            output_intermediate,
        )
        hidden_states = [x.unflatten(0, (batch, frames)) for x in states_per_layer]
        masks = [x.unflatten(0, (batch, frames)) for x in masks_per_layer]
        class_features = hidden_states
        if self.config.mask_pooling:
            pooled = [pool_in_masks(frame_features.levels, x).unflatten(0, (batch, frames)) for x in masks_per_layer]
            class_features = [torch.cat(parts, dim=-1) for parts in zip(hidden_states, pooled)]
        return AusmModelOutput(
            masks_queries_logits=masks[-1],
            query_hidden_states=hidden_states[-1],
            class_features=class_features[-1],
            history=AusmHistory(
                features.unflatten(0, (batch, frames))[:, -1],
                states,
                id_slots,
                taken[:, -1],
                history_masks[:, -1],
                appearance,
            ),
            selection_logits=selection_logits,
            selection_places=None if places is None else places.unflatten(0, (batch, frames)),
            intermediate_masks_queries_logits=tuple(masks[:-1]) if output_intermediate else None,
            intermediate_query_hidden_states=tuple(hidden_states[:-1]) if output_intermediate else None,
            intermediate_class_features=tuple(class_features[:-1]) if output_intermediate else None,
        )


def _check_frames(frames: Tensor):
    shape = tuple(getattr(frames, "shape", ()))
    if len(shape) != 5 or shape[2] != 3:
        raise ValueError(f"`pixel_values_videos` must have shape (B, T, 3, H, W), got {shape or type(frames)}.")
    if 0 in shape or shape[3] % FRAME_DIVISOR or shape[4] % FRAME_DIVISOR:
        raise ValueError(
            f"`pixel_values_videos` needs at least one frame, and H and W that are multiples of {FRAME_DIVISOR}; got "
            f"{shape}. AusmProcessor resizes frames so."
        )


def _recorded(output: AusmModelOutput) -> dict[str, Any]:
    """Hidden states and attentions, where they were asked for."""
    return {name: output[name] for name in AusmModel._can_record_outputs if name in output}


class AusmForUniversalSegmentation(AusmPreTrainedModel):
    """AUSM with its heads: foreground, one classification head per label set, the losses, and the streaming loop."""

    def __init__(self, config: AusmConfig):
        super().__init__(config)
        self.model = AusmModel(config)
        self.foreground_head = nn.Linear(config.hidden_size, 1)
        # One more than labels: the last one is "no object", as in Mask2Former.
        size = config.hidden_size * (4 if config.mask_pooling else 1)
        self.head_sizes = {name: len(labels) for name, labels in config.label_sets.items()}
        self.class_heads = nn.ModuleDict(
            {name: nn.Linear(size, len(labels) + 1) for name, labels in config.label_sets.items()}
        )
        self.criterion = AusmLoss(config)
        self.post_init()

    def _class_head(self, label_set: str | None) -> nn.Linear:
        name = self.config.default_label_set if label_set is None else label_set
        if name not in self.class_heads:
            raise ValueError(f"`label_set` must be one of {sorted(self.class_heads)}, got {label_set!r}.")
        if len(labels := self.config.label_sets[name]) != self.head_sizes[name]:
            raise ValueError(
                f"`config.label_sets[{name!r}]` has {len(labels)} labels, the head for it {self.head_sizes[name]}; "
                "give other labels to `from_pretrained`, which makes a new head."
            )
        return cast(nn.Linear, self.class_heads[name])

    def layer_predictions(self, output: AusmModelOutput) -> list[dict]:
        """The heads on the query states of every layer that `output` has, as the loss takes them."""
        states = (*(output.intermediate_query_hidden_states or ()), output.query_hidden_states)
        masks = (*(output.intermediate_masks_queries_logits or ()), output.masks_queries_logits)
        class_features = (*(output.intermediate_class_features or ()), output.class_features)
        predictions = [
            {
                "masks": layer_masks,
                "foreground": self.foreground_head(layer_states).squeeze(-1),
                "classes": {name: head(layer_features) for name, head in self.class_heads.items()},
            }
            for layer_states, layer_masks, layer_features in zip(states, masks, class_features)
        ]
        if output.selection_logits is not None:
            predictions[0]["selection"] = output.selection_logits  # it is done before the first layer
            for prediction, layer_states in zip(predictions, states):
                found = layer_states[:, :, -self.config.num_detection_queries :]
                prediction["ellipses"] = self.model.pixel_decoder.reach.ellipses(found, output.selection_places)
        return predictions

    def encode_frames(self, pixel_values: Tensor) -> AusmFrameFeatures:
        """
        What the network sees in each frame alone, which doesn't depend on any history: the first half of its work.

        Args:
            pixel_values (`torch.Tensor` of shape `(N, 3, H, W)`): The frames; H and W multiples of 32.

        Raises:
            ValueError: If the shape is wrong.
        """
        return self.model.encode_frames(pixel_values)

    def step(
        self,
        pixel_values: Tensor | AusmFrameFeatures,
        history: AusmHistory | None = None,
        label_set: str | None = None,
    ) -> AusmForUniversalSegmentationOutput:
        """
        One frame of a stream, the recurrent form: `(frame, history) -> (predictions, history)`.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)` or `AusmFrameFeatures`): The frame, H and W multiples
                of 32, or what `encode_frames` made of it.
            history (`AusmHistory`, *optional*): What the previous step returned, with `A_{t-1}` and `M_{t-1}` filled
                in by `history.replace_objects`; a fresh one by default.
            label_set (`str`, *optional*): Which label set to classify by; the configuration's default one otherwise.

        Returns:
            [`AusmForUniversalSegmentationOutput`] without the T axis.

        Raises:
            ValueError: If a shape is wrong or the label set is unknown.
        """
        head = self._class_head(label_set)
        return self._last_predictions(self.model.step(pixel_values, history), head)

    @torch.no_grad()
    def describe_objects(self, history: AusmHistory, masks: Tensor) -> Tensor:
        """
        What objects look like in a frame: the mean direction of the features of the pixels under each mask.

        Args:
            history (`AusmHistory`): That after the frame, as `step` returns it.
            masks (`torch.Tensor` of shape `(B, n, height, width)`): Masks of the frame, or their logits.

        Returns:
            float32 `(B, n, D)` of length 1, so that their products are cosines; zeros where nothing is above 0.
        """
        assert history.features is not None  # a frame has passed
        size = (history.features.shape[-2], history.features.shape[-1])
        shares = average_maps((masks > 0).float(), size).flatten(2)
        return F.normalize(shares @ F.normalize(to_tokens(history.features).float(), dim=-1), dim=-1)

    def _last_predictions(self, output: AusmModelOutput, head: nn.Linear) -> AusmForUniversalSegmentationOutput:
        return AusmForUniversalSegmentationOutput(
            masks_queries_logits=output.masks_queries_logits,
            class_queries_logits=head(output.class_features),
            foreground_queries_logits=self.foreground_head(output.query_hidden_states).squeeze(-1),
            history=output.history,
            **_recorded(output),
        )

    def forward(
        self,
        pixel_values_videos: Tensor | None = None,
        mask_labels: list[Tensor] | None = None,
        class_labels: list[Tensor] | None = None,
        switch_frames: list[Tensor] | None = None,
        id_slots: list[Tensor] | None = None,
        history_masks: list[Tensor] | None = None,
        prompt_masks: list[Tensor] | None = None,
        class_sets: list[str | None] | None = None,
        exhaustive: list[bool] | None = None,
        detect: list[bool] | None = None,
        annotated_frames: Tensor | None = None,
        ignore_masks: Tensor | None = None,
        history: AusmHistory | None = None,
        generator: torch.Generator | None = None,
        num_instances: Tensor | float | None = None,
        inference_session: AusmInferenceSession | None = None,
        frame: Tensor | AusmFrameFeatures | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> AusmForUniversalSegmentationOutput | AusmVideoSegmentationOutput | tuple:
        """
        All frames of a clip at once with teacher forcing (the parallel form, for training), or, with
        `inference_session` and `frame`, the next frame of a stream.

        Without `mask_labels` every frame is searched with the detection queries alone, unless a `history` is given
        that holds objects. To follow objects through a video use an inference session.

        Args:
            pixel_values_videos (`torch.Tensor` of shape `(B, T, 3, H, W)`):
                Frames; H and W multiples of 32.
            mask_labels (`list[torch.Tensor]`, one of shape `(N_b, T, H, W)` per clip):
                True masks of each instance, empty where it is not in the frame: bool, integers of which those that
                are not 0 belong to it, or floating point in 0..1.
            class_labels (`list[torch.LongTensor]`, one of shape `(N_b,)` per clip, *optional*):
                Index into the clip's label set, -100 where no class is known. All -100 by default.
            switch_frames (`list[torch.LongTensor]`, one of shape `(N_b,)` per clip, *optional*):
                `s_i` in 0 .. T: the instance is detected up to frame `s_i`, tracked after it. Drawn by default.
            id_slots (`list[torch.LongTensor]`, one of shape `(N_b,)` per clip, *optional*):
                Which ID vector each instance gets. Drawn uniformly without replacement by default.
            history_masks (`list[torch.Tensor]`, shaped as `mask_labels`, *optional*):
                Masks to build the history from instead of the true ones: corrupted ones, or the network's own.
            prompt_masks (`list[torch.Tensor]`, one of shape `(N_b, H, W)` per clip, *optional*):
                What is given of the instances of switch frame 0 before the first frame, `M_0`: boxes filled, points
                stamped. By default what the history shows of the first frame.
            class_sets (`list[str | None]`, *optional*):
                Label set of each clip's classes; `None` trains no class. By default the default label set for all,
                and `None` for all without `class_labels`.
            exhaustive (`list[bool]`, *optional*):
                Whether every object of the clip is annotated, so that unmatched detections are wrong; where not, only
                those are that draw a part or a copy of what is annotated. True by default.
            detect (`list[bool]`, *optional*):
                Whether detection is trained on the clip at all. Where it is not, each object is given at the first
                frame in which it appears. True by default.
            annotated_frames (`torch.BoolTensor` of shape `(B, T)`, *optional*):
                Frames that have annotation. All by default.
            ignore_masks (`torch.BoolTensor` of shape `(B, T, H, W)`, *optional*):
                Pixels without annotation, left out of the mask losses.
            history (`AusmHistory`, *optional*):
                Features and state to go on from, as an earlier clip of the same video returned them. Who is followed
                and where they were is for the arguments above to say: its objects are not used with `mask_labels`.
            generator (`torch.Generator`, *optional*):
                Draws switch frames and ID vectors.
            num_instances (`float` or `torch.Tensor` of shape `(1,)`, *optional*):
                What the losses are divided by, where the batch is a part of an optimizer step; see `count_targets`.
                By default the number of instances to be seen in the batch.
            inference_session (`AusmInferenceSession`, *optional*), frame (`torch.Tensor`, *optional*):
                A stream and its next frame, `(3, H, W)` or `(1, 3, H, W)`, or what `encode_frames` made of it.
            output_hidden_states, output_attentions, return_dict (`bool`, *optional*):
                As for [`AusmModel`].

        Raises:
            ValueError: If arguments are missing, do not fit together, or have wrong shapes.
        """
        of_objects = (class_labels, switch_frames, id_slots, history_masks, prompt_masks, class_sets)
        of_clips = (exhaustive, detect, annotated_frames, ignore_masks, num_instances)
        if mask_labels is None and any(argument is not None for argument in of_objects + of_clips):
            raise ValueError("Arguments about labels, from `class_labels` to `ignore_masks`, want `mask_labels` too.")
        if inference_session is not None:
            if frame is None or pixel_values_videos is not None or mask_labels is not None:
                raise ValueError("With `inference_session` give `frame`, no `pixel_values_videos` and no labels.")
            if history is not None or generator is not None:
                raise ValueError("A stream has its own history and its own `seed`: give no `history`, no `generator`.")
            if output_hidden_states or output_attentions or return_dict is False:
                raise ValueError("A stream gives an output with names, without hidden states or attentions.")
            return step_session(self, inference_session, frame)
        if pixel_values_videos is None:
            raise ValueError("Give `pixel_values_videos`, or `inference_session` and `frame`.")
        _check_frames(pixel_values_videos)
        if return_dict is None:
            return_dict = self.config.return_dict
        recording = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        recording = {name: value for name, value in recording.items() if value is not None}
        if mask_labels is None:
            output = self.model(pixel_values_videos, history=history, return_dict=True, **recording)
            result = self._last_predictions(output, self._class_head(None))
            return result if return_dict else result.to_tuple()

        default = None if class_labels is None else self.config.default_label_set
        names = [default] * len(mask_labels) if class_sets is None else class_sets
        if len(names) != len(mask_labels):
            raise ValueError(f"`class_sets` needs one entry per clip: {len(mask_labels)}, got {len(names)}.")
        for name in names:
            if name is not None:
                self._class_head(name)
        instances = pad_instances(
            pixel_values_videos, mask_labels, class_labels, history_masks, annotated_frames, ignore_masks, prompt_masks
        )
        plan: TeacherForcing = plan_teacher_forcing(
            instances,
            self.config.num_id_vectors,
            switch_frames=switch_frames,
            id_slots=id_slots,
            detect=detect,
            exhaustive=exhaustive,
            generator=generator,
        )
        output = self.model(
            pixel_values_videos,
            history_masks=plan.history_masks.to(self.dtype),
            id_slots=plan.id_slots,
            taken=plan.taken,
            history=history,
            output_intermediate=True,
            return_dict=True,
            **recording,
        )
        predictions = self.layer_predictions(output)
        label_set = names[0] if len({*names}) == 1 and names[0] is not None else self.config.default_label_set
        loss, loss_dict = self.criterion(predictions, instances, plan, names, generator, num_instances)
        result = AusmForUniversalSegmentationOutput(
            loss=loss,
            loss_dict=loss_dict,
            masks_queries_logits=output.masks_queries_logits,
            class_queries_logits=predictions[-1]["classes"][label_set],
            foreground_queries_logits=predictions[-1]["foreground"],
            history=output.history,
            **_recorded(output),
        )
        return result if return_dict else result.to_tuple()

    propagate_in_video_iterator = propagate_in_video_iterator
    preview_prompts = preview_prompts
    step_sessions = step_sessions


__all__ = ["AusmForUniversalSegmentation", "AusmModel", "AusmPreTrainedModel"]
