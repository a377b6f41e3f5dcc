"""
The streaming step as one graph of fixed shapes, for `torch.export` and ONNX:
`(frame, history) -> (predictions, history)`.

Every ID vector has a column, whether an object holds it or not: object `i` is followed where `taken[0, i]` says so,
and `masks[0, i]` is its mask in the frame before. A stream starts with zeros for all but the frame.

Letters: n columns, Q = n + N_det queries, D hidden size, h = H / 4 and w = W / 4.
"""

import json
import os

import torch
from torch import Tensor, nn

from .files import WholeOrNothing
from .model.history_ausm import AusmHistory
from .model.modeling_ausm import FRAME_DIVISOR, AusmForUniversalSegmentation
from .model.processing_ausm import AusmProcessor


class StreamingStep(nn.Module):
    """
    [`AusmForUniversalSegmentation.step`] as a function of tensors alone.

    Args:
        model: In float32.
        num_slots: n, how many objects can be followed at once; all ID vectors by default.
        label_set: Which label set to classify by; the configuration's default one otherwise.

    Raises:
        ValueError: if the model is not in float32, or there are not so many ID vectors or no such label set.
    """

    slots: Tensor

    def __init__(
        self, model: AusmForUniversalSegmentation, num_slots: int | None = None, label_set: str | None = None
    ):
        super().__init__()
        limit = model.config.num_id_vectors
        num_slots = limit if num_slots is None else num_slots
        if not 1 <= num_slots <= limit:
            raise ValueError(f"num_slots is {num_slots}; wanted is 1 to {limit}, the number of ID vectors")
        if model.dtype != torch.float32:
            raise ValueError(f"model is in {model.dtype}; wanted is torch.float32")
        if label_set is not None and label_set not in model.config.label_sets:
            raise ValueError(f"label_set is {label_set!r}; wanted is one of {sorted(model.config.label_sets)}")
        self.model: AusmForUniversalSegmentation = model.eval()
        self.label_set = label_set
        self.register_buffer("slots", torch.arange(num_slots, device=model.device)[None], persistent=False)

    def forward(
        self, pixel_values: Tensor, taken: Tensor, masks: Tensor, started: Tensor, features: Tensor, *states: Tensor
    ) -> tuple[Tensor, ...]:
        """
        Args:
            pixel_values (`torch.FloatTensor` of shape `(1, 3, H, W)`): The frame, resized and normalised.
            taken (`torch.BoolTensor` of shape `(1, n)`): Which columns hold an object.
            masks (`torch.FloatTensor` of shape `(1, n, h, w)`): Their masks in the frame before, 0 or 1.
            started (`torch.BoolTensor` of shape `(1,)`): False at the first frame of a stream.
            features (`torch.FloatTensor` of shape `(1, D, H / 8, W / 8)`), states: What the step before gave; the last
                of the states is what objects look like, where the network remembers it.

        Returns:
            Mask logits `(1, Q, h, w)`, class logits `(1, Q, num_labels + 1)` and foreground logits `(1, Q)`, columns
            first, then detections; then the new features and states.
        """
        initial = self.model.model.history_encoder.initial_features.view(1, -1, 1, 1)
        features = torch.where(started.view(1, 1, 1, 1), features, initial)
        remembers = self.model.config.remember_appearance
        mixers, appearance = (states[:-1], states[-1]) if remembers else (states, None)
        history = AusmHistory(features, tuple(zip(mixers[::2], mixers[1::2])), self.slots, taken, masks, appearance)
        output = self.model.step(pixel_values, history, self.label_set)
        new_features = output.history.features
        assert new_features is not None and output.history.states is not None  # they come out of the network
        new_states = [tensor for state in output.history.states for tensor in state]
        if output.history.appearance is not None:
            new_states.append(output.history.appearance)
        return (
            output.masks_queries_logits,
            output.class_queries_logits,
            output.foreground_queries_logits,
            new_features,
            *new_states,
        )

    def first_inputs(self, height: int, width: int) -> dict[str, Tensor]:
        """
        The inputs by name, as they are before the first frame of a stream: zeros.

        Raises:
            ValueError: if height or width is no multiple of 32.
        """
        if height < 1 or width < 1 or height % FRAME_DIVISOR or width % FRAME_DIVISOR:
            raise ValueError(f"size is {height} x {width}; wanted are multiples of {FRAME_DIVISOR}")
        config, num_slots = self.model.config, self.slots.shape[1]
        inputs = {
            "pixel_values": torch.zeros(1, 3, height, width),
            "taken": torch.zeros(1, num_slots, dtype=torch.bool),
            "masks": torch.zeros(1, num_slots, height // 4, width // 4),
            "started": torch.zeros(1, dtype=torch.bool),
            "features": torch.zeros(1, config.hidden_size, height // 8, width // 8),
        }
        for index, layer in enumerate(self.model.model.history_encoder.compressor):
            conv_state, ssm_state = layer.temporal_mixer.init_state(
                height // config.history_stride * (width // config.history_stride)
            )
            inputs |= {f"conv_state_{index}": conv_state, f"ssm_state_{index}": ssm_state}
        if config.remember_appearance:
            width = config.hidden_size + 1
            inputs["appearance"] = torch.zeros(1, 2, width + config.num_id_vectors + 1, width)
        return {name: tensor.to(self.slots.device) for name, tensor in inputs.items()}

    def output_names(self) -> list[str]:
        """Names of what `forward` returns: history `x` comes back as `next_x`."""
        layers = range(len(self.model.model.history_encoder.compressor))
        states = [f"next_{kind}_state_{index}" for index in layers for kind in ("conv", "ssm")]
        if self.model.config.remember_appearance:
            states.append("next_appearance")
        return ["mask_logits", "class_logits", "foreground_logits", "next_features", *states]


def export_step(step: StreamingStep, height: int, width: int) -> torch.export.ExportedProgram:
    """The step for frames of one size, as `torch.export` sees it. See [`StreamingStep`] for inputs and outputs."""
    inputs = step.first_inputs(height, width)
    backbone = step.model.model.backbone
    attention = backbone.config._attn_implementation
    backbone.set_attn_implementation("eager")  # what ONNX has no words for is in no other
    try:
        with torch.no_grad():
            return torch.export.export(step, tuple(inputs.values()), strict=False)
    finally:
        backbone.set_attn_implementation(attention)


def export_onnx(
    model: AusmForUniversalSegmentation,
    processor: AusmProcessor,
    path: str | os.PathLike,
    height: int,
    width: int,
    num_slots: int | None = None,
    label_set: str | None = None,
) -> None:
    """
    Writes the streaming step to an ONNX file. Its metadata say how frames are normalised (`image_mean`, `image_std`),
    which `labels` the classes are, and the `foreground_threshold` of an object, each as JSON.

    Args:
        model, processor: As [`load_model`] returns them; the model in float32.
        path: The file to write.
        height, width: Of the frames as the network sees them: multiples of 32.
        num_slots, label_set: See [`StreamingStep`].

    Raises:
        ValueError: see [`StreamingStep`].
        ModuleNotFoundError: if `onnx` or `onnxscript` isn't installed: they come with `ausm-hf[onnx]`.
    """
    step = StreamingStep(model, num_slots, label_set)
    input_names = list(step.first_inputs(height, width))
    import onnxscript  # noqa: F401  torch would miss it only after minutes of work

    with WholeOrNothing(path) as writer:
        program = torch.onnx.export(
            export_step(step, height, width),
            input_names=input_names,
            output_names=step.output_names(),
            dynamo=True,
            verbose=False,
        )
        assert program is not None  # with dynamo there is one
        images = processor.image_processor
        for key, value in {
            "image_mean": images.image_mean if images.do_normalize else [0.0] * 3,
            "image_std": images.image_std if images.do_normalize else [1.0] * 3,
            "labels": model.config.label_sets[label_set or model.config.default_label_set],
            "foreground_threshold": model.config.foreground_threshold,
        }.items():
            program.model.metadata_props[key] = json.dumps(value)
        program.save(writer.partial)


__all__ = ["StreamingStep", "export_onnx", "export_step"]
