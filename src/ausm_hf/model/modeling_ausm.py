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

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoBackbone, Mask2FormerConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerPixelDecoder,
    Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention,
    Mask2FormerSinePositionEmbedding,
)
from transformers.utils import ModelOutput

from .backbone_efficientnet_lite import EfficientNetLiteBackbone, EfficientNetLiteConfig
from .configuration_ausm import AusmConfig
from .history_ausm import AusmAttention, AusmFeedForward, AusmHistory, AusmHistoryEncoder, mark_history
from .loss_ausm import AusmLoss, TeacherForcing, pad_instances, plan_teacher_forcing
from .session_ausm import (
    AusmInferenceSession,
    AusmVideoSegmentationOutput,
    propagate_in_video_iterator,
    step_session,
)
from .temporal_mamba import TemporalMamba, TemporalMamba2

FRAME_DIVISOR = 32  # the coarsest stride of the backbone


@dataclass
class AusmModelOutput(ModelOutput):
    """
    Output of [`AusmModel`]. `step` has no T axis.

    Attributes:
        masks_queries_logits (`torch.Tensor` of shape `(B, T, Q, h, w)`):
            Mask logits of every query, in the order [A; V].
        query_hidden_states (`torch.Tensor` of shape `(B, T, Q, D)`):
            Normalised hidden states of the queries after the last layer.
        history (`AusmHistory`):
            The history after the last frame. Its objects are the ones that were passed in.
        intermediate_masks_queries_logits (`tuple(torch.Tensor)`, *optional*):
            Masks before the first and after every layer but the last, when asked for with `output_intermediate`.
        intermediate_query_hidden_states (`tuple(torch.Tensor)`, *optional*):
            Query states belonging to them.
    """

    masks_queries_logits: Tensor | None = None
    query_hidden_states: Tensor | None = None
    history: AusmHistory | None = None
    intermediate_masks_queries_logits: tuple[Tensor, ...] | None = None
    intermediate_query_hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class AusmForUniversalSegmentationOutput(ModelOutput):
    """
    Output of [`AusmForUniversalSegmentation`]. `step` has no T axis.

    Attributes:
        loss (`torch.Tensor` of shape `(1,)`, *optional*):
            Weighted sum of `loss_dict`, when `mask_labels` are given.
        loss_dict (`dict[str, torch.Tensor]`, *optional*):
            Its terms, weighted, summed over layers; without gradient.
        masks_queries_logits (`torch.Tensor` of shape `(B, T, Q, h, w)`):
            Mask logits of every query, in the order [A; V].
        class_queries_logits (`torch.Tensor` of shape `(B, T, Q, num_labels + 1)`):
            Class logits; the last one is "no object".
        foreground_queries_logits (`torch.Tensor` of shape `(B, T, Q)`):
            Logit of "there is an object": a new one for a detection query, the followed one for an ID vector.
        history (`AusmHistory`):
            The history after the last frame. Its objects are the ones that were passed in.
    """

    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    masks_queries_logits: Tensor | None = None
    class_queries_logits: Tensor | None = None
    foreground_queries_logits: Tensor | None = None
    history: AusmHistory | None = None


@functools.lru_cache(maxsize=16)
def sine_positions(size: tuple[int, int], hidden_size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """2-D sine positions of shape (S, D), as in Mask2Former; computed once per frame size."""
    with torch.inference_mode(False), torch.no_grad():
        embed = Mask2FormerSinePositionEmbedding(num_position_features=hidden_size // 2, normalize=True)
        positions = embed(torch.Size((1, hidden_size, *size)), device, torch.float32)
        return positions[0].flatten(1).transpose(0, 1).to(dtype).contiguous()


class AusmDeformablePixelEncoder(Mask2FormerPixelDecoder):
    """
    Mask2Former's pixel decoder in two halves, so that the history can enter between them: `forward` gives the maps at
    strides 8, 16, 32; `mask_features` the stride-4 map from the stride-8 one.
    """

    def __init__(self, config: AusmConfig, feature_channels: list[int]):
        super().__init__(
            Mask2FormerConfig(
                feature_size=config.hidden_size,
                mask_feature_size=config.mask_feature_size,
                hidden_dim=config.hidden_size,
                encoder_feedforward_dim=config.pixel_encoder_feedforward_size,
                encoder_layers=config.pixel_encoder_layers,
                num_attention_heads=config.num_attention_heads,
                dropout=0.0,
            ),
            feature_channels,
        )
        self.num_fpn_levels = 0  # leaves the stride-4 level to `mask_features`

    def forward(self, feature_maps: list[Tensor]) -> list[Tensor]:
        output = super().forward(feature_maps, output_attentions=False, output_hidden_states=False, return_dict=True)
        return list(output.multi_scale_features)[::-1]

    def mask_features(self, features: Tensor, feature_map: Tensor) -> Tensor:
        lateral = self.adapter_1(feature_map)
        upsampled = F.interpolate(features, size=lateral.shape[-2:], mode="bilinear", align_corners=False)
        return self.mask_projection(self.layer_1(lateral + upsampled))


def separable_conv(channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, channels, kernel_size=3, padding=1, groups=channels, bias=False),
        nn.GroupNorm(8, channels),
        nn.ReLU(),
        nn.Conv2d(channels, channels, kernel_size=1),
    )


class AusmPyramidPixelEncoder(nn.Module):
    """A light top-down pyramid with the interface of [`AusmDeformablePixelEncoder`]."""

    def __init__(self, config: AusmConfig, feature_channels: list[int]):
        super().__init__()
        stride4, *coarser = feature_channels
        self.laterals = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(c, config.hidden_size, kernel_size=1, bias=False), nn.GroupNorm(8, config.hidden_size)
            )
            for c in coarser
        )
        self.smooth = nn.ModuleList(separable_conv(config.hidden_size) for _ in coarser)
        self.mask_lateral = nn.Conv2d(stride4, config.mask_feature_size, kernel_size=1)
        self.mask_top = nn.Conv2d(config.hidden_size, config.mask_feature_size, kernel_size=1)
        self.mask_smooth = separable_conv(config.mask_feature_size)

    def forward(self, feature_maps: list[Tensor]) -> list[Tensor]:
        top = None
        levels = []
        for lateral, smooth, feature_map in reversed(list(zip(self.laterals, self.smooth, feature_maps[1:]))):
            merged = lateral(feature_map)
            if top is not None:
                merged = merged + F.interpolate(top, size=merged.shape[-2:], mode="bilinear", align_corners=False)
            top = merged + smooth(merged)
            levels.insert(0, top)
        return levels

    def mask_features(self, features: Tensor, feature_map: Tensor) -> Tensor:
        lateral = self.mask_lateral(feature_map)
        top = F.interpolate(self.mask_top(features), size=lateral.shape[-2:], mode="bilinear", align_corners=False)
        merged = lateral + top
        return merged + self.mask_smooth(merged)


class AusmPixelDecoderLayer(GradientCheckpointingLayer):
    """Masked cross-attention, self-attention, feed-forward; post-norm, as in Mask2Former."""

    def __init__(self, config: AusmConfig):
        super().__init__()
        self.cross_attn = AusmAttention(config)
        self.cross_attn_layer_norm = nn.LayerNorm(config.hidden_size)
        self.self_attn = AusmAttention(config)
        self.self_attn_layer_norm = nn.LayerNorm(config.hidden_size)
        self.feedforward = AusmFeedForward(config.hidden_size, config.decoder_feedforward_size, "relu")
        self.final_layer_norm = nn.LayerNorm(config.hidden_size)

    def forward(
        self,
        queries: Tensor,
        query_positions: Tensor,
        pixels: Tensor,
        pixel_positions: Tensor,
        pixel_mask: Tensor,
        query_mask: Tensor | None,
    ) -> Tensor:
        attended = self.cross_attn(queries + query_positions, pixels + pixel_positions, pixels, pixel_mask)
        queries = self.cross_attn_layer_norm(queries + attended)
        positioned = queries + query_positions
        queries = self.self_attn_layer_norm(queries + self.self_attn(positioned, positioned, queries, query_mask))
        return self.final_layer_norm(queries + self.feedforward(queries))


class AusmPixelDecoder(nn.Module):
    """
    Mask2Former's Transformer decoder: each layer reads one of the maps at strides 32, 16, 8, only where the mask
    predicted so far is foreground.
    """

    def __init__(self, config: AusmConfig):
        super().__init__()
        size = config.hidden_size
        self.level_embed = nn.Embedding(3, size)
        self.layers = nn.ModuleList(AusmPixelDecoderLayer(config) for _ in range(config.num_decoder_layers))
        self.layernorm = nn.LayerNorm(size)
        self.mask_embedder = nn.Sequential(
            nn.Linear(size, size),
            nn.ReLU(),
            nn.Linear(size, size),
            nn.ReLU(),
            nn.Linear(size, config.mask_feature_size),
        )

    def forward(
        self,
        queries: Tensor,
        query_positions: Tensor,
        query_mask: Tensor | None,
        levels: list[Tensor],
        mask_features: Tensor,
        output_intermediate: bool,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """
        Args:
            queries, query_positions (`torch.Tensor` of shape `(N, Q, D)`): Queries of N frames.
            query_mask (`torch.BoolTensor` of shape `(N, 1, 1, Q)`, *optional*): False where a query is padding.
            levels (`list[torch.Tensor]`): Maps (N, D, ., .) at strides 8, 16, 32.
            mask_features (`torch.Tensor` of shape `(N, C, h, w)`): The map that masks are read from.
            output_intermediate (`bool`): Whether to give masks for every layer or only for the last one.

        Returns:
            Normalised query states and mask logits (N, Q, h, w), one entry per prediction.
        """
        maps, positions, small_mask_features = [], [], []
        for index, level in enumerate(reversed(levels)):
            size = tuple(level.shape[-2:])
            maps.append(level.flatten(2).transpose(1, 2) + self.level_embed.weight[index])
            positions.append(sine_positions(size, level.shape[1], level.device, level.dtype))
            # Interpolation is linear, so it may come before the product with the mask embeddings.
            small = F.interpolate(mask_features.detach(), size=size, mode="bilinear", align_corners=False)
            small_mask_features.append(small.flatten(2))

        all_states, all_masks = [], []
        for index in range(len(self.layers) + 1):
            normed = self.layernorm(queries)
            last = index == len(self.layers)
            if output_intermediate or last:
                mask_embeddings = self.mask_embedder(normed)
                all_states.append(normed)
                all_masks.append(torch.einsum("nqc,nchw->nqhw", mask_embeddings, mask_features))
            else:
                mask_embeddings = self.mask_embedder(normed)
            if last:
                return all_states, all_masks
            level = index % len(levels)
            foreground = torch.bmm(mask_embeddings.detach(), small_mask_features[level]) >= 0
            # A query whose mask is empty looks everywhere.
            foreground = foreground | ~foreground.any(dim=-1, keepdim=True)
            queries = self.layers[index](
                queries, query_positions, maps[level], positions[level], foreground.unsqueeze(1), query_mask
            )


class AusmPreTrainedModel(PreTrainedModel):
    config_class = AusmConfig
    config: AusmConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values_videos"
    input_modalities = ("video",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["AusmCompressorLayer", "AusmHistoryDecoderLayer", "AusmPixelDecoderLayer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="linear")
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight)
        elif isinstance(module, (TemporalMamba, TemporalMamba2)):
            module.reset_parameters()
        elif isinstance(module, AusmPixelDecoder):
            # Small, or the first masks are so decided that training starts by undoing them.
            init.xavier_uniform_(module.mask_embedder[-1].weight, gain=0.1)
        elif isinstance(module, AusmHistoryEncoder):
            init.normal_(module.initial_features)
            init.constant_(module.gate, self.config.history_gate_init)
        elif isinstance(module, Mask2FormerPixelDecoder):
            init.normal_(module.level_embed)
        elif isinstance(module, Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention):
            # Deformable attention starts by looking in n_heads directions, n_points steps far.
            angles = torch.arange(module.n_heads, dtype=torch.float32) * (2.0 * math.pi / module.n_heads)
            directions = torch.stack([angles.cos(), angles.sin()], -1)
            directions = directions / directions.abs().amax(-1, keepdim=True)
            steps = torch.arange(1, module.n_points + 1, dtype=torch.float32)
            offsets = directions[:, None, None, :] * steps[None, None, :, None]
            init.zeros_(module.sampling_offsets.weight)
            init.copy_(module.sampling_offsets.bias, offsets.expand(-1, module.n_levels, -1, -1).reshape(-1))
            init.zeros_(module.attention_weights.weight)
            init.zeros_(module.attention_weights.bias)


class AusmModel(AusmPreTrainedModel):
    """The bare network: frames and history to query states and masks, without foreground and class heads."""

    _keys_to_ignore_on_load_unexpected = [r"^class_heads\.", r"^foreground_head\."]

    def __init__(self, config: AusmConfig):
        super().__init__(config)
        # By name: code loaded from a checkpoint may hold a second copy of the class.
        if config.backbone_config.model_type == EfficientNetLiteConfig.model_type:
            self.backbone = EfficientNetLiteBackbone(config.backbone_config)
        else:
            self.backbone = AutoBackbone.from_config(config.backbone_config)
        if len(self.backbone.channels) != 4:
            raise ValueError(
                "`backbone_config` must give four feature maps, at strides 4, 8, 16 and 32; got "
                f"{len(self.backbone.channels)}. Set its `out_features`."
            )
        encoders = {"msdeform": AusmDeformablePixelEncoder, "fpn": AusmPyramidPixelEncoder}
        self.pixel_encoder = encoders[config.pixel_encoder](config, self.backbone.channels)
        # B and V, each with the positions that Mask2Former's queries have. An ID vector is mark and query in one.
        self.id_vectors = nn.Embedding(config.num_id_vectors, config.hidden_size)
        self.id_positions = nn.Embedding(config.num_id_vectors, config.hidden_size)
        self.detection_queries = nn.Embedding(config.num_detection_queries, config.hidden_size)
        self.detection_positions = nn.Embedding(config.num_detection_queries, config.hidden_size)
        self.history_encoder = AusmHistoryEncoder(config)
        self.pixel_decoder = AusmPixelDecoder(config)
        self.post_init()

    def init_history(self, batch_size: int = 1) -> AusmHistory:
        """The history of `batch_size` streams before their first frame."""
        return AusmHistory.empty(batch_size, self.device, self.dtype)

    def step(
        self, pixel_values: Tensor, history: AusmHistory | None = None, output_intermediate: bool = False
    ) -> AusmModelOutput:
        """
        One frame of a stream, the recurrent form.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): The frame; H and W multiples of 32.
            history (`AusmHistory`, *optional*): What the previous step returned, with `A_{t-1}` and `M_{t-1}` filled
                in by `history.replace_objects`; a fresh one by default.

        Returns:
            [`AusmModelOutput`] without the T axis. It is the caller who decides what `A_t` and `M_t` are.
        """
        history = self.init_history(pixel_values.shape[0]) if history is None else history
        output = self(
            pixel_values.unsqueeze(1),
            history_masks=history.masks.unsqueeze(1),
            id_slots=history.slots,
            taken=history.taken.unsqueeze(1),
            history=history,
            output_intermediate=output_intermediate,
        )
        return AusmModelOutput(**{k: _drop_time(v) for k, v in output.items()})

    def forward(
        self,
        pixel_values_videos: Tensor,
        history_masks: Tensor | None = None,
        id_slots: Tensor | None = None,
        taken: Tensor | None = None,
        history: AusmHistory | None = None,
        output_intermediate: bool = False,
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

        Raises:
            ValueError: If a shape is not as above.
        """
        _check_frames(pixel_values_videos)
        batch, frames = pixel_values_videos.shape[:2]
        history = self.init_history(batch) if history is None else history
        given = [x is not None for x in (history_masks, id_slots, taken)]
        if any(given) != all(given):
            raise ValueError("`history_masks`, `id_slots` and `taken` go together: give all of them or none.")
        if history_masks is None:
            history_masks = history.masks.unsqueeze(1).expand(-1, frames, -1, -1, -1)
            id_slots, taken = history.slots, history.taken.unsqueeze(1).expand(-1, frames, -1)
        if taken.shape != (batch, frames, id_slots.shape[1]) or history_masks.shape[:3] != taken.shape:
            raise ValueError(
                f"For {batch} clips of {frames} frames, `id_slots` (B, n), `taken` (B, T, n) and `history_masks` "
                f"(B, T, n, height, width) are wanted; got {tuple(id_slots.shape)}, {tuple(taken.shape)} and "
                f"{tuple(history_masks.shape)}."
            )

        # The frame alone
        # Channels last: convolutions are faster so, and maps become tokens without a copy.
        images = pixel_values_videos.flatten(0, 1).to(self.dtype, memory_format=torch.channels_last)
        feature_maps = self.backbone(images).feature_maps
        levels = self.pixel_encoder(feature_maps)
        features = levels[0]
        size = tuple(features.shape[-2:])

        # What the history says of it
        id_vectors = self.id_vectors(id_slots)
        marks = mark_history(
            id_vectors.unsqueeze(1).expand(-1, frames, -1, -1).flatten(0, 1),
            (history_masks * taken[..., None, None]).flatten(0, 1),
            size,
        )
        positions = sine_positions(size, features.shape[1], features.device, features.dtype)
        stacked = features.unflatten(0, (batch, frames))
        change, states = self.history_encoder(stacked, marks.unflatten(0, (batch, frames)), positions, history)
        change = change.flatten(0, 1)
        levels = [level + F.interpolate(change, size=level.shape[-2:], mode="area") for level in levels]
        mask_features = self.pixel_encoder.mask_features(levels[0], feature_maps[0])

        # Who is where
        def over_frames(x: Tensor) -> Tensor:
            return x.unsqueeze(1).expand(-1, frames, *x.shape[1:]).flatten(0, 1)

        detections = self.detection_queries.weight.expand(batch, -1, -1)
        detection_positions = self.detection_positions.weight.expand(batch, -1, -1)
        query_mask = F.pad(taken.flatten(0, 1), (0, detections.shape[1]), value=True)[:, None, None, :]
        states_per_layer, masks_per_layer = self.pixel_decoder(
            over_frames(torch.cat([id_vectors, detections], dim=1)),
            over_frames(torch.cat([self.id_positions(id_slots), detection_positions], dim=1)),
            query_mask if id_slots.shape[1] else None,
            levels,
            mask_features,
            output_intermediate,
        )
        hidden_states = [x.unflatten(0, (batch, frames)) for x in states_per_layer]
        masks = [x.unflatten(0, (batch, frames)) for x in masks_per_layer]
        output = AusmModelOutput(
            masks_queries_logits=masks[-1],
            query_hidden_states=hidden_states[-1],
            history=AusmHistory(stacked[:, -1], states, id_slots, taken[:, -1], history_masks[:, -1]),
            intermediate_masks_queries_logits=tuple(masks[:-1]) if output_intermediate else None,
            intermediate_query_hidden_states=tuple(hidden_states[:-1]) if output_intermediate else None,
        )
        return output if return_dict is not False else output.to_tuple()


def _check_frames(pixel_values_videos: Tensor):
    shape = tuple(pixel_values_videos.shape)
    if len(shape) != 5 or shape[2] != 3:
        raise ValueError(f"`pixel_values_videos` must have shape (B, T, 3, H, W), got {shape}.")
    if 0 in shape or shape[3] % FRAME_DIVISOR or shape[4] % FRAME_DIVISOR:
        raise ValueError(
            f"`pixel_values_videos` needs at least one frame, and H and W that are multiples of {FRAME_DIVISOR}; got "
            f"{shape}. AusmProcessor resizes frames so."
        )


def _drop_time(value):
    """Removes the T axis of length 1 from a tensor or a tuple of tensors."""
    if isinstance(value, Tensor):
        return value.squeeze(1)
    return tuple(x.squeeze(1) for x in value) if isinstance(value, tuple) else value


class AusmForUniversalSegmentation(AusmPreTrainedModel):
    """AUSM with its heads: foreground, one classification head per label set, the losses, and the streaming loop."""

    def __init__(self, config: AusmConfig):
        super().__init__(config)
        self.model = AusmModel(config)
        self.foreground_head = nn.Linear(config.hidden_size, 1)
        # One more than labels: the last one is "no object", as in Mask2Former.
        self.class_heads = nn.ModuleDict(
            {name: nn.Linear(config.hidden_size, len(labels) + 1) for name, labels in config.label_sets.items()}
        )
        self.criterion = AusmLoss(config)
        self.post_init()

    def init_history(self, batch_size: int = 1) -> AusmHistory:
        """The history of `batch_size` streams before their first frame."""
        return self.model.init_history(batch_size)

    def _class_head(self, label_set: str | None) -> nn.Linear:
        name = self.config.default_label_set if label_set is None else label_set
        if name not in self.class_heads:
            raise ValueError(f"`label_set` must be one of {sorted(self.class_heads)}, got {label_set!r}.")
        return self.class_heads[name]

    def layer_predictions(self, output: AusmModelOutput) -> list[dict]:
        """The heads on the query states of every layer, as the loss takes them."""
        states = (*output.intermediate_query_hidden_states, output.query_hidden_states)
        masks = (*output.intermediate_masks_queries_logits, output.masks_queries_logits)
        return [
            {
                "masks": layer_masks,
                "foreground": self.foreground_head(layer_states).squeeze(-1),
                "classes": {name: head(layer_states) for name, head in self.class_heads.items()},
            }
            for layer_states, layer_masks in zip(states, masks)
        ]

    def step(
        self, pixel_values: Tensor, history: AusmHistory | None = None, label_set: str | None = None
    ) -> AusmForUniversalSegmentationOutput:
        """
        One frame of a stream, the recurrent form: `(frame, history) -> (predictions, history)`.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): The frame; H and W multiples of 32.
            history (`AusmHistory`, *optional*): What the previous step returned, with `A_{t-1}` and `M_{t-1}` filled
                in by `history.replace_objects`; a fresh one by default.
            label_set (`str`, *optional*): Which label set to classify by; the configuration's default one otherwise.

        Returns:
            [`AusmForUniversalSegmentationOutput`] without the T axis.

        Raises:
            ValueError: If a shape is wrong or the label set is unknown.
        """
        head = self._class_head(label_set)
        output = self.model.step(pixel_values, history)
        return AusmForUniversalSegmentationOutput(
            masks_queries_logits=output.masks_queries_logits,
            class_queries_logits=head(output.query_hidden_states),
            foreground_queries_logits=self.foreground_head(output.query_hidden_states).squeeze(-1),
            history=output.history,
        )

    def forward(
        self,
        pixel_values_videos: Tensor | None = None,
        mask_labels: list[Tensor] | None = None,
        class_labels: list[Tensor] | None = None,
        switch_frames: list[Tensor] | None = None,
        id_slots: list[Tensor] | None = None,
        history_masks: list[Tensor] | None = None,
        label_sets: list[str | None] | None = None,
        exhaustive: list[bool] | None = None,
        detect: list[bool] | None = None,
        annotated_frames: Tensor | None = None,
        ignore_masks: Tensor | None = None,
        history: AusmHistory | None = None,
        generator: torch.Generator | None = None,
        inference_session: AusmInferenceSession | None = None,
        frame: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> AusmForUniversalSegmentationOutput | AusmVideoSegmentationOutput:
        """
        All frames of a clip at once with teacher forcing (the parallel form, for training), or, with
        `inference_session` and `frame`, the next frame of a stream.

        Without `mask_labels` there are no objects in the history: every frame is searched with the detection queries
        alone. To follow objects through a video use an inference session.

        Args:
            pixel_values_videos (`torch.Tensor` of shape `(B, T, 3, H, W)`):
                Frames; H and W multiples of 32.
            mask_labels (`list[torch.Tensor]`, one of shape `(N_b, T, H, W)` per clip):
                True masks of each instance, empty where it is not in the frame.
            class_labels (`list[torch.LongTensor]`, one of shape `(N_b,)` per clip, *optional*):
                Index into the clip's label set, -100 where no class is known. All -100 by default.
            switch_frames (`list[torch.LongTensor]`, one of shape `(N_b,)` per clip, *optional*):
                `s_i` in 0 .. T: the instance is detected up to frame `s_i`, tracked after it. Drawn by default.
            id_slots (`list[torch.LongTensor]`, one of shape `(N_b,)` per clip, *optional*):
                Which ID vector each instance gets. Drawn uniformly without replacement by default.
            history_masks (`list[torch.Tensor]`, shaped as `mask_labels`, *optional*):
                Masks to build the history from instead of the true ones: corrupted ones, or the network's own.
            label_sets (`list[str | None]`, *optional*):
                Label set of each clip; `None` trains no class. The default label set for all by default.
            exhaustive (`list[bool]`, *optional*):
                Whether every object of the clip is annotated, so that unmatched detections are wrong. True by default.
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
            inference_session (`AusmInferenceSession`, *optional*), frame (`torch.Tensor`, *optional*):
                A stream and its next frame, of shape `(3, H, W)` or `(1, 3, H, W)`.

        Raises:
            ValueError: If arguments are missing, do not fit together, or have wrong shapes.
        """
        if inference_session is not None:
            if frame is None or pixel_values_videos is not None:
                raise ValueError("With `inference_session` give the next `frame` and no `pixel_values_videos`.")
            return step_session(self, inference_session, frame)
        if pixel_values_videos is None:
            raise ValueError("Give `pixel_values_videos`, or `inference_session` and `frame`.")
        _check_frames(pixel_values_videos)
        if mask_labels is None:
            output = self.model(pixel_values_videos, history=history)
            result = AusmForUniversalSegmentationOutput(
                masks_queries_logits=output.masks_queries_logits,
                class_queries_logits=self._class_head(None)(output.query_hidden_states),
                foreground_queries_logits=self.foreground_head(output.query_hidden_states).squeeze(-1),
                history=output.history,
            )
            return result if return_dict is not False else result.to_tuple()

        instances = pad_instances(
            pixel_values_videos, mask_labels, class_labels, history_masks, annotated_frames, ignore_masks
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
        )
        names = [self.config.default_label_set] * len(mask_labels) if label_sets is None else label_sets
        for name in names:
            if name is not None:
                self._class_head(name)
        predictions = self.layer_predictions(output)
        loss, loss_dict = self.criterion(predictions, instances, plan, names, generator)
        result = AusmForUniversalSegmentationOutput(
            loss=loss,
            loss_dict=loss_dict,
            masks_queries_logits=output.masks_queries_logits,
            class_queries_logits=predictions[-1]["classes"][self.config.default_label_set],
            foreground_queries_logits=predictions[-1]["foreground"],
            history=output.history,
        )
        return result if return_dict is not False else result.to_tuple()

    def propagate_in_video_iterator(
        self,
        inference_session: AusmInferenceSession,
        start_frame_idx: int | None = None,
        max_frame_num_to_track: int | None = None,
        show_progress_bar: bool = False,
    ) -> Iterator[AusmVideoSegmentationOutput]:
        """
        Runs through the video that the session was made with, frame by frame.

        Yields:
            [`AusmVideoSegmentationOutput`] for each frame; exactly `max_frame_num_to_track` of them when given and
            the video is as long.
        """
        return propagate_in_video_iterator(
            self, inference_session, start_frame_idx, max_frame_num_to_track, show_progress_bar
        )


__all__ = ["AusmForUniversalSegmentation", "AusmModel", "AusmPreTrainedModel"]
