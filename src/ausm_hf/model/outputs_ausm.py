"""What the network gives back."""

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput

from .history_ausm import AusmHistory


@dataclass
class AusmModelOutput(ModelOutput):
    """
    Output of [`AusmModel`]. `step` has no T axis.

    Attributes:
        masks_queries_logits (`torch.Tensor` of shape `(B, T, Q, h, w)`):
            Mask logits of every query, in the order [A; V].
        query_hidden_states (`torch.Tensor` of shape `(B, T, Q, D)`):
            Normalised hidden states of the queries after the last layer.
        class_features (`torch.Tensor` of shape `(B, T, Q, D)`, or `(B, T, Q, 4 * D)` with `mask_pooling`):
            What classification heads read: the hidden states and, with `mask_pooling`, the means of the frame's
            features over the masks.
        history (`AusmHistory`):
            The history after the last frame. Its objects are the ones that were passed in.
        selection_logits (`torch.Tensor` of shape `(B, T, H / 16, W / 16)`, *optional*):
            With `query_selection`, of each cell: the middle of an object is here.
        selection_places (`torch.Tensor` of shape `(B, T, N_det, 2)`, *optional*):
            With it, x and y in [0, 1] of the cells whose features the detection queries are.
        intermediate_masks_queries_logits (`tuple(torch.Tensor)`, *optional*):
            Masks before the first and after every layer but the last, when asked for with `output_intermediate`.
        intermediate_query_hidden_states (`tuple(torch.Tensor)`, *optional*):
            Query states belonging to them.
        intermediate_class_features (`tuple(torch.Tensor)`, *optional*):
            Class features belonging to them.
        hidden_states (`tuple(torch.Tensor)` of shape `(B * T, Q, D)`, *optional*):
            The queries before the first and after every layer of the Pixel Decoder, frames in the batch, with
            `output_hidden_states=True`.
        attentions (`tuple(torch.Tensor)` of shape `(B * T, heads, Q, Q)`, *optional*):
            What the queries of a frame look at among themselves, per layer of the Pixel Decoder, with
            `output_attentions=True`.
        cross_attentions (`tuple(torch.Tensor)` of shape `(B * T, heads, Q, S)`, *optional*):
            What the queries look at in the frame, likewise. Layers look at the maps of strides 32, 16, 8 in turn; `S`
            is the number of pixels of the map.
    """

    # Always given; the defaults are there because a ModelOutput may have one field at most without.
    masks_queries_logits: Tensor = None  # type: ignore[assignment]
    query_hidden_states: Tensor = None  # type: ignore[assignment]
    class_features: Tensor = None  # type: ignore[assignment]
    history: AusmHistory = None  # type: ignore[assignment]
    selection_logits: Tensor | None = None
    selection_places: Tensor | None = None
    intermediate_masks_queries_logits: tuple[Tensor, ...] | None = None
    intermediate_query_hidden_states: tuple[Tensor, ...] | None = None
    intermediate_class_features: tuple[Tensor, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None


@dataclass
class AusmForUniversalSegmentationOutput(ModelOutput):
    """
    Output of [`AusmForUniversalSegmentation`]. `step` has no T axis.

    Attributes:
        loss (`torch.Tensor` of shape `()`, *optional*):
            Weighted sum of `loss_dict`, when `mask_labels` are given.
        loss_dict (`dict[str, torch.Tensor]`, *optional*):
            Its terms, weighted, summed over layers; without gradient.
        masks_queries_logits (`torch.Tensor` of shape `(B, T, Q, h, w)`):
            Mask logits of every query, in the order [A; V].
        class_queries_logits (`torch.Tensor` of shape `(B, T, Q, num_labels + 1)`):
            Class logits; the last one is "no object".
        foreground_queries_logits (`torch.Tensor` of shape `(B, T, Q)`):
            For a detection query the logit of how good its mask is, as the IoU with a new object; for an ID vector
            that of whether the followed object is in the frame.
        history (`AusmHistory`):
            The history after the last frame. Its objects are the ones that were passed in.
        hidden_states (`tuple(torch.Tensor)` of shape `(B * T, Q, D)`, *optional*):
            The queries before the first and after every layer of the Pixel Decoder, frames in the batch, with
            `output_hidden_states=True`.
        attentions (`tuple(torch.Tensor)` of shape `(B * T, heads, Q, Q)`, *optional*):
            What the queries of a frame look at among themselves, per layer of the Pixel Decoder, with
            `output_attentions=True`.
        cross_attentions (`tuple(torch.Tensor)` of shape `(B * T, heads, Q, S)`, *optional*):
            What the queries look at in the frame, likewise. Layers look at the maps of strides 32, 16, 8 in turn; `S`
            is the number of pixels of the map.
    """

    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    masks_queries_logits: Tensor = None  # type: ignore[assignment]  # see above
    class_queries_logits: Tensor = None  # type: ignore[assignment]
    foreground_queries_logits: Tensor = None  # type: ignore[assignment]
    history: AusmHistory = None  # type: ignore[assignment]
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None


__all__ = ["AusmForUniversalSegmentationOutput", "AusmModelOutput"]
