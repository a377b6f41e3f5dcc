"""
The two ends of the network beside its history: the pixel encoder, from the backbone's maps to features of one frame,
and the Pixel Decoder, from queries and these features to masks. Both are Mask2Former's, split where the history comes
in.

Letters: N frames, Q queries, D hidden size, C mask feature size; h = H / 4 and w = W / 4 size of the masks.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Mask2FormerConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerPixelDecoder,
    Mask2FormerPixelDecoderEncoderLayer,
)

from .configuration_ausm import AusmConfig
from .history_ausm import AusmAttention, AusmFeedForward
from .maps_ausm import average_maps, to_tokens


def sine_positions(size: tuple[int, int], hidden_size: int, like: Tensor) -> Tensor:
    """2-D sine positions of shape (S, D), as in Mask2Former; computed once per frame size."""
    # A graph under construction, or a network that only plays at computing, holds no numbers that could be kept.
    real = type(like) in (Tensor, nn.Parameter) and not torch.compiler.is_compiling()
    make = _kept_sine_positions if real else _make_sine_positions
    return make(size, hidden_size, like.device, like.dtype)


def _make_sine_positions(size: tuple[int, int], hidden_size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Mask2FormerSinePositionEmbedding, normalised; its own is kept where torch.compile can't look."""
    (height, width), half = size, hidden_size // 2
    channels = torch.arange(half, dtype=torch.float32, device=device)
    wavelengths = 10_000 ** (2 * torch.div(channels, 2, rounding_mode="floor") / half)
    codes = []
    for length in size:
        places = torch.arange(1, length + 1, dtype=torch.float32, device=device) / (length + 1e-6) * (2 * math.pi)
        angles = places[:, None] / wavelengths
        codes.append(torch.stack([angles[:, 0::2].sin(), angles[:, 1::2].cos()], dim=2).flatten(1))
    rows, columns = codes[0][:, None].expand(-1, width, -1), codes[1].expand(height, -1, -1)
    return torch.cat([rows, columns], dim=2).flatten(0, 1).to(dtype)


@functools.lru_cache(maxsize=8)
def _kept_sine_positions(size: tuple[int, int], hidden_size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return _make_sine_positions(size, hidden_size, device, dtype)


@dataclass
class AusmFrameFeatures:
    """
    What the network sees in frames by themselves, before the history says anything of them: with it
    [`AusmForUniversalSegmentation.step`] needs no backbone.

    Attributes:
        levels (`tuple[torch.Tensor]`):
            Features at strides 8, 16 and 32 of shape `(N, D, H / stride, W / stride)`; the first are `X_t`.
        stride_4 (`torch.Tensor` of shape `(N, channels, H / 4, W / 4)`):
            The backbone's finest map, of which mask features are made.
    """

    levels: tuple[Tensor, ...]
    stride_4: Tensor

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the frames."""
        return 4 * self.stride_4.shape[-2], 4 * self.stride_4.shape[-1]

    def split(self) -> list[AusmFrameFeatures]:
        """Those of each frame."""
        levels = zip(*(level.split(1) for level in self.levels))
        return [AusmFrameFeatures(*parts) for parts in zip(levels, self.stride_4.split(1))]

    @classmethod
    def join(cls, frames: list[AusmFrameFeatures]) -> AusmFrameFeatures:
        """Those of several frames of one size together."""
        if len(frames) == 1:
            return frames[0]
        levels = tuple(map(torch.cat, zip(*(frame.levels for frame in frames))))
        return cls(levels, torch.cat([frame.stride_4 for frame in frames]))


def check_strides(feature_maps: tuple[Tensor, ...], images: Tensor) -> None:
    """Raises ValueError if the backbone's maps are not at strides 4, 8, 16 and 32 of the images (N, 3, H, W)."""
    sizes = [tuple(maps.shape[-2:]) for maps in feature_maps]
    if sizes != [(images.shape[-2] // stride, images.shape[-1] // stride) for stride in (4, 8, 16, 32)]:
        raise ValueError(
            f"`backbone_config` must give feature maps at strides 4, 8, 16 and 32; got sizes {sizes} for frames of "
            f"{tuple(images.shape[-2:])}."
        )


class AusmDeformableEncoderLayer(GradientCheckpointingLayer, Mask2FormerPixelDecoderEncoderLayer):
    """Mask2Former's, of which nothing need be kept for the backward pass."""


class AusmDeformablePixelEncoder(Mask2FormerPixelDecoder):
    """
    Mask2Former's pixel decoder in two halves, so that the history can enter between them: `forward` gives the maps at
    strides 8, 16, 32; `mask_features` the stride-4 map from the stride-8 one.
    """

    # Half precision rounds the places to sample by up to a cell, and on a CPU torch's sampling is wrong in it.
    _keep_in_fp32_modules_strict = ("pixel_encoder.encoder", "pixel_encoder.level_embed")
    _no_split_modules = ("AusmDeformableEncoderLayer",)

    adapter_1: nn.Module
    layer_1: nn.Module

    def __init__(self, config: AusmConfig, feature_channels: list[int]):
        theirs = Mask2FormerConfig(
            feature_size=config.hidden_size,
            mask_feature_size=config.mask_feature_size,
            hidden_dim=config.hidden_size,
            encoder_feedforward_dim=config.pixel_encoder_feedforward_size,
            encoder_layers=config.pixel_encoder_layers,
            num_attention_heads=config.num_attention_heads,
            dropout=0.0,
        )
        super().__init__(theirs, feature_channels)
        self.encoder.layers = nn.ModuleList(
            AusmDeformableEncoderLayer(theirs) for _ in range(config.pixel_encoder_layers)
        )
        self.num_fpn_levels = 0  # leaves the stride-4 level to `mask_features`

    def forward(self, feature_maps: list[Tensor]) -> list[Tensor]:
        """Its own forward copies the maps' sizes to the device in each layer, which no CUDA graph may hold."""
        maps = [project(x) for project, x in zip(self.input_projections, feature_maps[::-1])]
        sizes = [(x.shape[2], x.shape[3]) for x in maps]
        tokens = torch.cat([to_tokens(x) for x in maps], dim=1).to(self.level_embed.dtype)
        codes = [sine_positions(size, tokens.shape[2], tokens) for size in sizes]
        positions = torch.cat([code + level for code, level in zip(codes, self.level_embed)])[None]
        boxes = self.reference_boxes(sizes, tokens)
        for layer in self.encoder.layers:
            tokens = layer(
                tokens, None, position_embeddings=positions, reference_points=boxes, spatial_shapes_list=sizes
            )[0]
        parts = tokens.split([height * width for height, width in sizes], dim=1)
        return [part.mT.unflatten(2, size).to(maps[0].dtype) for part, size in zip(parts, sizes)][::-1]

    def reference_boxes(self, sizes: list[tuple[int, int]], tokens: Tensor) -> Tensor:
        """
        The place of each token, and for each level a width and height by which offsets, then relative to a box, are in
        pixels of that level: (1, S, levels, 4).
        """
        whole = tokens.new_ones(1, len(sizes), 2)
        places = self.encoder.get_reference_points(sizes, whole, tokens.device)
        layer: Any = self.encoder.layers[0]
        lengths = [length for height, width in sizes for length in (width, height)]
        extents = torch.cat([tokens.new_full((1,), 2 * layer.self_attn.n_points / length) for length in lengths])
        return torch.cat([places, extents.view(1, 1, len(sizes), 2).expand_as(places)], dim=-1)

    def mask_features(self, features: Tensor, feature_map: Tensor) -> Tensor:
        lateral = self.adapter_1(feature_map)
        upsampled = F.interpolate(features, size=lateral.shape[-2:], mode="bilinear", align_corners=False)
        return self.mask_projection(self.layer_1(lateral + upsampled))


class PointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution as the matrix product that it is where channels are last in memory."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True):
        super().__init__(in_channels, out_channels, kernel_size=1, bias=bias)

    def forward(self, maps: Tensor) -> Tensor:
        out = F.linear(maps.permute(0, 2, 3, 1), self.weight.flatten(1))
        if self.bias is not None:
            out = out.add_(self.bias)  # given to the product it would first be written to all of the result
        return out.permute(0, 3, 1, 2)


def separable_conv(channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, channels, kernel_size=3, padding=1, groups=channels, bias=False),
        nn.GroupNorm(8, channels),
        nn.ReLU(inplace=True),
        PointwiseConv2d(channels, channels),
    )


class AusmMaskRefinementLayer(nn.Module):
    """Sharpens mask features (N, C, h, w) from what is around each pixel. It starts by changing nothing."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False)
        self.norm = nn.GroupNorm(8, channels)
        last: Any = PointwiseConv2d(channels, channels)
        last.init_gain = 0.0
        self.projection = last

    def forward(self, mask_features: Tensor) -> Tensor:
        return self.projection(F.relu(self.norm(self.conv(mask_features)), inplace=True)).add_(mask_features)


class AusmPyramidPixelEncoder(nn.Module):
    """A light top-down pyramid with the interface of [`AusmDeformablePixelEncoder`]."""

    def __init__(self, config: AusmConfig, feature_channels: list[int]):
        super().__init__()
        stride4, *coarser = feature_channels
        self.laterals = nn.ModuleList(
            nn.Sequential(PointwiseConv2d(c, config.hidden_size, bias=False), nn.GroupNorm(8, config.hidden_size))
            for c in coarser
        )
        self.smooth = nn.ModuleList(separable_conv(config.hidden_size) for _ in coarser)
        self.mask_lateral = PointwiseConv2d(stride4, config.mask_feature_size)
        self.mask_top = PointwiseConv2d(config.hidden_size, config.mask_feature_size)
        self.mask_smooth = separable_conv(config.mask_feature_size)
        self.mask_refinement = nn.Sequential(
            *(AusmMaskRefinementLayer(config.mask_feature_size) for _ in range(config.mask_refinement_layers))
        )

    def forward(self, feature_maps: list[Tensor]) -> list[Tensor]:
        top = None
        levels: list[Tensor] = []
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
        merged = top.add_(lateral)
        return self.mask_refinement(self.mask_smooth(merged).add_(merged))


def pool_in_masks(levels: tuple[Tensor, ...], mask_logits: Tensor) -> Tensor:
    """
    Mask pooling, as in OpenSeg: the mean of each map over the pixels of each query's mask.

    Args:
        levels (`tuple[torch.Tensor]`): Maps (N, D, ., .) at strides 8, 16, 32.
        mask_logits (`torch.Tensor` of shape `(N, Q, h, w)`): They get no gradient.

    Returns:
        The means, side by side, of shape (N, Q, D * number of maps); zeros where a mask is empty.
    """
    inside, means = (mask_logits.detach() > 0).to(levels[0].dtype), []
    for level in levels:
        inside = average_maps(inside, (level.shape[-2], level.shape[-1]))
        weights = inside.flatten(2)
        means.append(weights / weights.sum(-1, keepdim=True).clamp(min=1e-3) @ to_tokens(level))
    return torch.cat(means, dim=-1)


@dataclass
class SelectedQueries:
    """
    Detection queries of N frames, and where they come from.

    Attributes:
        queries, positions (`torch.Tensor` of shape `(N, N_det, D)`): The queries and their positions.
        places (`torch.Tensor` of shape `(N, N_det, 2)`): x and y in [0, 1] of the picture.
        logits (`torch.Tensor` of shape `(N, h, w)`): Of each cell of stride 16: the middle of an object is here.
    """

    queries: Tensor
    positions: Tensor
    places: Tensor
    logits: Tensor


class AusmQuerySelection(nn.Module):
    """Makes detection queries of the features where objects seem to be, as FastInst does, best first."""

    def __init__(self, config: AusmConfig):
        super().__init__()
        self.number = config.num_detection_queries
        self.smooth = separable_conv(config.hidden_size)
        score: Any = PointwiseConv2d(config.hidden_size, 1)
        score.init_bias = -4.0  # few cells are the middle of an object
        self.score = score

    def forward(self, level: Tensor) -> SelectedQueries:
        """
        Args:
            level (`torch.Tensor` of shape `(N, D, h, w)`): The map of stride 16.
        """
        height, width = level.shape[-2:]
        level = level + self.smooth(level)
        logits = self.score(level)
        scores = logits.detach()
        # Peaks first, then the other cells, both by their score (in float32): nothing ties, so all forms choose alike.
        ranks = (scores - 1e3 * (F.max_pool2d(scores, 3, stride=1, padding=1) > scores)).flatten(1)
        chosen = ranks.topk(min(self.number, height * width), dim=1).indices
        # Of a small map that has fewer cells than there are queries, they begin again.
        chosen = chosen[:, torch.arange(self.number, device=level.device) % chosen.shape[1]]
        positions = sine_positions((height, width), level.shape[1], level)
        tokens = to_tokens(level)
        columns, rows = (chosen % width).float(), (chosen // width).float()
        places = torch.stack([(columns + 0.5) / width, (rows + 0.5) / height], dim=-1)
        return SelectedQueries(
            tokens.gather(1, chosen[..., None].expand(-1, -1, tokens.shape[-1])),
            positions[chosen],
            places.to(level.dtype),
            logits.squeeze(1),
        )


class AusmReach(nn.Module):
    """
    Where a selected query's object can be: an ellipse about its place, whose middle and radii the query says. It is
    learned by a loss of its own (`reach_loss`), as boxes are: masks alone would have it larger than their objects.
    """

    def __init__(self, config: AusmConfig):
        super().__init__()
        projection: Any = nn.Linear(config.hidden_size, 4)
        projection.init_gain = 0.0  # a circle, or what is one in a square picture
        self.projection = projection

    def ellipses(self, queries: Tensor, places: Tensor) -> Tensor:
        """
        Args:
            queries (`torch.Tensor` of shape `(..., Q, D)`), places (`torch.Tensor` of shape `(..., Q, 2)`): See
                [`SelectedQueries`].

        Returns:
            x and y of the middle and the radii along x and y, as parts of the picture's width and height; (..., Q, 4).
        """
        offset, log_radius = self.projection(queries).split(2, dim=-1)
        return torch.cat([places + 0.1 * offset, 0.2 * log_radius.clamp(-5, 5).exp()], dim=-1)

    def forward(self, queries: Tensor, places: Tensor, size: tuple[int, int]) -> Tensor:
        """
        Returns:
            Logits (N, Q, h, w) for a map of `size`: 3 in the middle, 0 on the ellipse, falling with the square of the
            distance. They give the ellipse no gradient.
        """
        middle, radius = self.ellipses(queries, places).detach().split(2, dim=-1)
        distances = []
        for axis, length in enumerate(reversed(size)):
            along = (torch.arange(length, device=queries.device, dtype=queries.dtype) + 0.5) / length
            distances.append(((along - middle[..., axis, None]) / radius[..., axis, None]).square())
        return 3 * (1 - distances[0][..., None, :] - distances[1][..., :, None])


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
        attended, _ = self.cross_attn(queries + query_positions, pixels + pixel_positions, pixels, pixel_mask)
        queries = self.cross_attn_layer_norm(queries + attended)
        positioned = queries + query_positions
        attended, _ = self.self_attn(positioned, positioned, queries, query_mask)
        queries = self.self_attn_layer_norm(queries + attended)
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
        last: Any = nn.Linear(size, config.mask_feature_size)
        # Small, or the first masks are so decided that training starts by undoing them.
        last.init_gain = 0.1
        self.mask_embedder = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, size), nn.ReLU(), last)
        self.reach: Any = AusmReach(config) if config.query_selection else None

    def forward(
        self,
        queries: Tensor,
        query_positions: Tensor,
        query_mask: Tensor | None,
        levels: list[Tensor],
        mask_features: Tensor,
        tracked_masks: Tensor,
        tracked_logits: Tensor | None,
        places: Tensor | None,
        output_intermediate: bool,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """
        Args:
            queries, query_positions (`torch.Tensor` of shape `(N, Q, D)`): Queries of N frames.
            query_mask (`torch.BoolTensor` of shape `(N, 1, 1, Q)`, *optional*): False where a query is padding.
            levels (`list[torch.Tensor]`): Maps (N, D, ., .) at strides 8, 16, 32.
            mask_features (`torch.Tensor` of shape `(N, C, h, w)`): The map that masks are read from.
            tracked_masks (`torch.Tensor` of shape `(N, n, ., .)`): `M_{t-1}`: where the first n queries were last
                seen. They start by looking there.
            tracked_logits (`torch.Tensor` of shape `(N, n, ., .)`, *optional*): Added to the masks of the first n
                queries.
            places (`torch.Tensor` of shape `(N, Q - n, 2)`, *optional*): Where the other queries were selected.
            output_intermediate (`bool`): Whether to give masks for every layer or only for the last one.

        Returns:
            Normalised query states and mask logits (N, Q, h, w), one entry per prediction.
        """
        tracked = tracked_masks.shape[1]

        def with_start(masks: Tensor, states: Tensor) -> Tensor:
            """Adds what is known of the masks beside the product of embeddings and features."""
            followed, found = masks[:, :tracked], masks[:, tracked:]
            size = masks.shape[-2], masks.shape[-1]
            if tracked_logits is not None and tracked:
                followed = followed + F.interpolate(tracked_logits, size=size, mode="bilinear", align_corners=False)
            if places is not None:
                found = found + self.reach(states[:, tracked:], places, size)
            return torch.cat([followed, found], dim=1)

        levels = levels[::-1][: len(self.layers)]  # those that a layer reads
        sizes = [(level.shape[-2], level.shape[-1]) for level in levels]
        maps, positions, small_mask_features = [], [], []
        # Called, not read: see `HeldConv1d`.
        level_embeds = self.level_embed(torch.arange(len(levels), device=queries.device))
        for level_embed, level, size in zip(level_embeds, levels, sizes):
            maps.append(to_tokens(level) + level_embed)
            positions.append(sine_positions(size, level.shape[1], level))
            # Interpolation is linear, so it may come before the product with the mask embeddings.
            small = F.interpolate(mask_features.detach(), size=size, mode="bilinear", align_corners=False)
            small_mask_features.append(to_tokens(small).mT)

        all_states, all_masks = [], []
        for index, layer in enumerate([*self.layers, None]):
            normed = self.layernorm(queries)
            mask_embeddings = self.mask_embedder(normed)
            if output_intermediate or layer is None:
                all_states.append(normed)
                masks = torch.einsum("nqc,nchw->nqhw", mask_embeddings, mask_features)
                all_masks.append(with_start(masks, normed))
            if layer is None:
                break
            number = index % len(levels)
            small_masks = torch.bmm(mask_embeddings.detach(), small_mask_features[number])
            foreground = with_start(small_masks.unflatten(-1, sizes[number]), normed.detach()) >= 0
            if index == 0 and tracked:
                seen = (tracked_masks > 0.5).to(tracked_masks.dtype)  # soft masks are nowhere zero
                last_seen = average_maps(seen, sizes[number]) > 0
                foreground = torch.cat([last_seen, foreground[:, tracked:]], dim=1)
            foreground = foreground.flatten(2)
            # A query whose mask is empty looks everywhere.
            foreground = foreground | ~foreground.any(dim=-1, keepdim=True)
            queries = layer(
                queries, query_positions, maps[number], positions[number], foreground.unsqueeze(1), query_mask
            )
        return all_states, all_masks
