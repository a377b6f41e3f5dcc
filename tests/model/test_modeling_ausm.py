"""The network in its two forms: all frames at once, and frame by frame."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_backbones import TINY_LITE, TINY_SWIN
from torch.overrides import TorchFunctionMode
from transformers import Mask2FormerConfig, SwinConfig
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerPixelDecoder,
    Mask2FormerSinePositionEmbedding,
)

from ausm_hf.model.configuration_ausm import AusmConfig
from ausm_hf.model.history_ausm import (
    AusmAppearance,
    AusmHistory,
    AusmMaskPropagation,
    mark_history,
    solve,
)
from ausm_hf.model.maps_ausm import average_maps, to_maps, to_tokens
from ausm_hf.model.modeling_ausm import AusmForUniversalSegmentation, AusmModel
from ausm_hf.model.pixels_ausm import PointwiseConv2d, pool_in_masks, sine_positions
from ausm_hf.model.session_ausm import AusmInferenceSession


def tiny_config(**overrides) -> AusmConfig:
    values = {
        "backbone_config": TINY_SWIN,
        "hidden_size": 32,
        "mask_feature_size": 16,
        "num_attention_heads": 2,
        "pixel_encoder": "fpn",
        "pixel_encoder_layers": 1,
        "pixel_encoder_feedforward_size": 32,
        "mamba_head_dim": 16,
        "num_compressor_layers": 2,
        "num_history_decoder_layers": 2,
        "history_feedforward_size": 32,
        "history_gate_init": 1.0,
        "num_decoder_layers": 3,
        "decoder_feedforward_size": 32,
        "num_id_vectors": 6,
        "num_detection_queries": 5,
        "train_num_points": None,
        "label_sets": {"shapes": ["square", "disc"], "object": ["object"]},
    }
    return AusmConfig(**{**values, **overrides})


def tiny_model(**overrides) -> AusmForUniversalSegmentation:
    torch.manual_seed(0)
    return AusmForUniversalSegmentation(tiny_config(**overrides)).eval()


def moving_squares(frames: int, size: int, appearances: list[tuple[int, int, int | None]]) -> torch.Tensor:
    """Masks (N, T, size, size) of squares; each is there from `first` to `last` but for one `hidden` frame."""
    masks = torch.zeros(len(appearances), frames, size, size, dtype=torch.uint8)
    for index, (first, last, hidden) in enumerate(appearances):
        for frame in range(first, last):
            if frame != hidden:
                left = 4 * frame + 8 * index
                masks[index, frame, 8 * index : 8 * index + 16, left : left + 16] = 1
    return masks


def clips(frames: int = 5, size: int = 64):
    """Two clips with different numbers of objects: one stays, one enters late, one is hidden once, one leaves."""
    torch.manual_seed(1)
    pixels = torch.randn(2, frames, 3, size, size)
    masks = [
        moving_squares(frames, size, [(0, frames, None), (2, frames, None), (0, frames, 3)]),
        moving_squares(frames, size, [(0, 2, None)]),
    ]
    switch = [torch.tensor([0, 3, 1]), torch.tensor([1])]
    slots = [torch.tensor([4, 0, 2]), torch.tensor([5])]
    return pixels, masks, switch, slots


def outputs_of(result, index: int | slice):
    return {
        name: getattr(result, name)[:, index]
        for name in ("masks_queries_logits", "class_queries_logits", "foreground_queries_logits")
    }


@pytest.mark.parametrize("temporal_mixer", ["mamba", "mamba2"])
@pytest.mark.parametrize(
    "pixel_encoder, stride, key_stride, local_kernel, radius, appearance",
    [
        ("fpn", 16, 2, 3, 2, True),
        ("fpn", 8, 2, 3, 2, True),
        ("msdeform", 32, 1, 0, 0, False),
        ("msdeform", 8, 1, 0, 0, False),
    ],
)
def test_parallel_form_equals_recurrent_form(
    temporal_mixer, pixel_encoder, stride, key_stride, local_kernel, radius, appearance
):
    """The most important test of the project: what is trained is what runs."""
    model = tiny_model(
        temporal_mixer=temporal_mixer,
        pixel_encoder=pixel_encoder,
        history_stride=stride,
        history_key_stride=key_stride,
        history_local_kernel=local_kernel,
        mask_propagation_radius=radius,
        mask_pooling=appearance,
        remember_appearance=appearance,
        query_selection=appearance,
    )
    pixels, masks, switch, slots = clips()
    labels = [torch.tensor([0, 1, -100]), torch.tensor([1])]
    with torch.no_grad():
        parallel = model(pixels, mask_labels=masks, class_labels=labels, switch_frames=switch, id_slots=slots)

        history = model.init_history(2)
        for frame in range(pixels.shape[1]):
            # Teacher forcing by hand: `A_{t-1}`, `M_{t-1}` from the true masks, t = frame + 1
            taken = torch.zeros(2, 3, dtype=torch.bool)
            known = torch.zeros(2, 3, 16, 16)
            held = torch.zeros(2, 3, dtype=torch.long)
            for clip in range(2):
                for index, s in enumerate(switch[clip].tolist()):
                    held[clip, index] = slots[clip][index]
                    if s < frame + 1:
                        taken[clip, index] = True
                        cells = masks[clip][index, max(frame - 1, 0)].float()
                        cells = torch.nn.functional.avg_pool2d(cells[None, None], 4)[0, 0]
                        known[clip, index] = (cells >= 0.5).float()
            history = history.replace_objects(held, taken, known)
            recurrent = model.step(pixels[:, frame], history)
            history = recurrent.history

            queries = torch.cat([taken, torch.ones(2, 5, dtype=torch.bool)], dim=1)
            for name, value in outputs_of(parallel, frame).items():
                torch.testing.assert_close(getattr(recurrent, name)[queries], value[queries], atol=1e-4, rtol=1e-4)
    for name, tensor in history.tensors().items():
        torch.testing.assert_close(tensor, parallel.history.tensors()[name], atol=1e-4, rtol=1e-4)


def test_history_matters():
    """Guards the test above against a network that ignores its history."""
    model = tiny_model()
    pixels, masks, switch, slots = clips()
    with torch.no_grad():
        first = model(pixels, mask_labels=masks, switch_frames=switch, id_slots=slots)
        moved = [m.roll(24, dims=-1) for m in masks]
        second = model(pixels, mask_labels=masks, history_masks=moved, switch_frames=switch, id_slots=slots)
    assert (first.masks_queries_logits - second.masks_queries_logits).abs().max() > 1e-2


@pytest.mark.parametrize("temporal_mixer", ["mamba", "mamba2"])
@pytest.mark.parametrize("frame", [1, 3])
def test_causality(temporal_mixer, frame):
    model = tiny_model(temporal_mixer=temporal_mixer)
    pixels, masks, switch, slots = clips()
    changed = pixels.clone()
    changed[:, frame] += 1.0
    with torch.no_grad():
        before = model(pixels, mask_labels=masks, switch_frames=switch, id_slots=slots)
        after = model(changed, mask_labels=masks, switch_frames=switch, id_slots=slots)
    for name, value in outputs_of(before, slice(0, frame)).items():
        torch.testing.assert_close(outputs_of(after, slice(0, frame))[name], value, atol=1e-6, rtol=1e-6)
    for name, value in outputs_of(before, frame).items():
        assert not torch.allclose(outputs_of(after, frame)[name], value, atol=1e-3)


def test_a_clip_in_two_pieces_equals_the_whole():
    model = tiny_model()
    pixels = clips()[0]
    with torch.no_grad():
        whole = model(pixels)
        first = model(pixels[:, :2])
        second = model(pixels[:, 2:], history=first.history)
    for name, value in outputs_of(whole, slice(2, None)).items():
        torch.testing.assert_close(outputs_of(second, slice(None))[name], value, atol=1e-5, rtol=1e-5)


def test_the_compressor_reads_the_frame_before():
    """`E_t = X_{t-1} + marks`: after the first frame the state has seen `X_0` alone, after the second the first."""
    model = tiny_model()
    pixels = clips()[0]
    with torch.no_grad():
        first, other = model.step(pixels[:, 0]).history, model.step(pixels[:, 1]).history
        second, after_other = model.step(pixels[:, 2], first).history, model.step(pixels[:, 2], other).history
    for one, two in zip(first.states, other.states):
        torch.testing.assert_close(one, two)
    assert not torch.allclose(second.states[0][1], after_other.states[0][1], atol=1e-4)


def test_padding_of_instances_changes_nothing():
    """A clip alone and the same clip beside one with more objects give the same."""
    model = tiny_model()
    pixels, masks, switch, slots = clips()
    with torch.no_grad():
        both = model(pixels, mask_labels=masks, switch_frames=switch, id_slots=slots)
        alone = model(pixels[1:], mask_labels=masks[1:], switch_frames=switch[1:], id_slots=slots[1:])
    torch.testing.assert_close(
        both.masks_queries_logits[1:, 1:, [0, 3, 4, 5, 6, 7]], alone.masks_queries_logits[:, 1:], atol=1e-5, rtol=1e-5
    )


def test_marker_paints_ids_normalised_by_coverage():
    ids = torch.tensor([[[1.0, 0.0], [0.0, 3.0]]])
    masks = torch.zeros(1, 2, 4, 4)
    masks[0, 0, :2, :2] = 1  # a whole cell
    masks[0, 0, 0, 2] = 1  # a quarter of the next cell
    masks[0, 1, 2:, :2] = 1
    masks[0, 0, 2:, :2] = 1  # two objects share this cell
    marks = mark_history(ids, masks, (2, 2))
    expected = torch.tensor([[[1.0, 0.25], [0.5, 0.0]], [[0.0, 0.0], [1.5, 0.0]]])
    torch.testing.assert_close(marks[0], expected, atol=1e-5, rtol=0)


def test_soft_masks_mark_as_surely_as_they_are():
    ids = torch.ones(1, 2, 3)
    masks = torch.tensor([[0.01, 0.6], [0.0, 0.8]]).view(1, 2, 1, 2)
    marks = mark_history(ids, masks, (1, 2))
    torch.testing.assert_close(marks, torch.tensor([0.01, 1.0]).expand(1, 3, 1, 2))


@pytest.mark.parametrize("dtype, most", [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
def test_places_are_sampled_in_float32_where_weights_are_half(tmp_path, dtype, most):
    """torch's sampling in half precision gives NaN on a CPU, and rounds places by up to a cell everywhere."""
    model = tiny_model(pixel_encoder="msdeform", pixel_encoder_layers=2)
    model.save_pretrained(tmp_path)
    half = AusmForUniversalSegmentation.from_pretrained(tmp_path, dtype=dtype).eval()
    assert half.dtype == dtype
    pixels = torch.randn(1, 3, 192, 320, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = model.encode_frames(pixels)
        of_half = half.encode_frames(pixels.to(dtype))
    for wanted, got in zip(features.levels, of_half.levels):
        assert got.dtype == dtype and (got.float() - wanted).norm() < most * wanted.norm()


def test_pixel_encoder_keeps_nothing_of_its_layers_where_it_is_asked_not_to():
    def bytes_kept(model):
        model.train()
        kept = 0

        def keep(tensor):
            nonlocal kept
            kept += tensor.nbytes
            return tensor

        maps = [torch.randn(1, *m.weight.shape[1:2], 24 // 2**i, 24 // 2**i) for i, m in enumerate(projections(model))]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = model.model.pixel_encoder(maps)
        sum(output.sum() for output in outputs).backward()
        gradients = {n: p.grad for n, p in model.model.pixel_encoder.named_parameters() if p.grad is not None}
        return kept, gradients

    def projections(model):
        return [projection[0] for projection in model.model.pixel_encoder.input_projections][::-1]

    plain = tiny_model(pixel_encoder="msdeform", pixel_encoder_layers=3)
    torch.manual_seed(3)
    all_kept, wanted = bytes_kept(plain)
    checkpointed = tiny_model(pixel_encoder="msdeform", pixel_encoder_layers=3)
    enable = getattr(checkpointed, "activation_checkpointing_enable", None)
    (enable or checkpointed.gradient_checkpointing_enable)()
    torch.manual_seed(3)
    few_kept, gradients = bytes_kept(checkpointed)
    assert few_kept < 0.5 * all_kept
    assert wanted.keys() == gradients.keys() and wanted
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient)


def test_gate_zero_switches_the_history_off():
    model = tiny_model(history_gate_init=0.0)
    pixels, masks, switch, slots = clips()
    with torch.no_grad():
        history = model.init_history(2).replace_objects(
            torch.tensor([[1], [2]]), torch.zeros(2, 1, dtype=torch.bool), torch.ones(2, 1, 16, 16)
        )
        history = model.step(pixels[:, 0], history).history
        late = model.step(pixels[:, 1], history)
        fresh = model.step(pixels[:, 1])
    torch.testing.assert_close(late.masks_queries_logits[:, 1:], fresh.masks_queries_logits, atol=1e-5, rtol=1e-5)


def test_deformable_pixel_encoder_is_mask2formers():
    """Its two halves together are `Mask2FormerPixelDecoder.forward`."""
    config = tiny_config(pixel_encoder="msdeform")
    torch.manual_seed(0)
    ours = AusmModel(config).pixel_encoder.eval()
    theirs = Mask2FormerPixelDecoder(
        Mask2FormerConfig(
            backbone_config=SwinConfig(**{k: v for k, v in TINY_SWIN.items() if k != "model_type"}),
            feature_size=32,
            mask_feature_size=16,
            hidden_dim=32,
            encoder_feedforward_dim=32,
            encoder_layers=1,
            num_attention_heads=2,
        ),
        [8, 16, 32, 64],
    ).eval()
    theirs.load_state_dict(ours.state_dict())
    maps = [torch.randn(2, c, 64 // s, 64 // s) for c, s in zip((8, 16, 32, 64), (4, 8, 16, 32))]
    with torch.no_grad():
        expected = theirs(maps)
        levels = ours(maps)
        masks = ours.mask_features(levels[0], maps[0])
    torch.testing.assert_close(masks, expected.mask_features)
    for level, reference in zip(levels, reversed(expected.multi_scale_features)):
        torch.testing.assert_close(level, reference)


@pytest.mark.parametrize("pixel_encoder", ["fpn", "msdeform"])
def test_a_step_takes_no_numbers_from_the_host(pixel_encoder):
    """Nor gives it any: each would wait for the device, and a CUDA graph can't hold it."""

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            assert function.__name__ not in {
                "tensor", "as_tensor", "from_numpy", "item", "tolist", "nonzero", "cpu",
                "__bool__", "__int__", "__float__", "__index__",
            }  # fmt: skip
            return function(*args, **(kwargs or {}))

    model = AusmModel(tiny_config(pixel_encoder=pixel_encoder)).eval()
    frame, slots, taken = torch.randn(1, 3, 64, 64), torch.arange(2)[None], torch.ones(1, 2, dtype=torch.bool)
    masks = torch.rand(1, 2, 16, 16).round()
    with torch.no_grad():
        first = model.step(frame, AusmHistory(None, None, slots, taken, masks)).history
        history = AusmHistory(first.features, first.states, slots, taken, masks, first.appearance)
        with Watch():
            model.step(frame, history)


def test_attention_back_ends_agree():
    pixels, masks, switch, slots = clips()
    results = []
    for implementation in ("eager", "sdpa"):
        model = tiny_model()
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            results.append(model(pixels, mask_labels=masks, switch_frames=switch, id_slots=slots))
    torch.testing.assert_close(
        results[0].masks_queries_logits[:, :, 3:], results[1].masks_queries_logits[:, :, 3:], atol=1e-4, rtol=1e-4
    )


NANO_PARTS = {
    "pixel_encoder": "fpn",
    "history_local_kernel": 3,
    "mask_propagation_radius": 2,
    "mask_pooling": True,
    "remember_appearance": True,
    "query_selection": True,
}


@pytest.mark.parametrize("parts", [{"pixel_encoder": "msdeform"}, NANO_PARTS])
def test_every_parameter_is_trained(parts):
    model = tiny_model(**parts).train()
    if parts["pixel_encoder"] == "msdeform":
        for layer in model.model.pixel_encoder.encoder.layers:  # at the start no token heeds of which level it is
            torch.nn.init.normal_(layer.self_attn.attention_weights.weight, std=0.1)
    pixels, masks, switch, slots = clips()
    labels = [torch.tensor([0, 1, -100]), torch.tensor([0])]
    model(
        pixels,
        mask_labels=masks,
        class_labels=labels,
        switch_frames=switch,
        id_slots=slots,
        class_sets=["shapes", "object"],
    ).loss.backward()
    without = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    # transformers' Swin backbone has one norm that none of its feature maps goes through.
    assert without == {"model.backbone.swin.layernorm.weight", "model.backbone.swin.layernorm.bias"}


def test_gradient_checkpointing_changes_nothing():
    pixels, masks, switch, slots = clips()
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model().train()
        if checkpointing:
            # transformers 5.2x renamed it
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
        torch.manual_seed(3)
        model(pixels, mask_labels=masks, switch_frames=switch, id_slots=slots).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "argument",
    [{"history": object()}, {"generator": torch.Generator()}, {"return_dict": False}, {"output_attentions": True}],
    ids=lambda argument: next(iter(argument)),
)
def test_a_stream_passes_over_no_argument(argument):
    with pytest.raises(ValueError, match="A stream "):
        tiny_model()(inference_session=AusmInferenceSession(), frame=torch.zeros(3, 64, 64), **argument)


@pytest.mark.parametrize("class_sets, labels", [(["object"] * 2, 1), (["shapes", "object"], 2), ([None, "object"], 2)])
def test_class_logits_are_of_the_clips_label_set_if_it_is_one(class_sets, labels):
    pixels, masks, switch, slots = clips()
    model = tiny_model()
    assert model.config.default_label_set == "shapes"
    with torch.no_grad():
        output = model(pixels, mask_labels=masks, switch_frames=switch, id_slots=slots, class_sets=class_sets)
    assert output.class_queries_logits.shape[-1] == labels + 1


def test_without_classes_no_class_is_trained():
    """Not that nothing is an object of any class, either."""
    pixels, masks, switch, slots = clips()
    model = tiny_model()

    def class_loss(**labels):
        return model(
            pixels, mask_labels=masks, switch_frames=switch, id_slots=slots, generator=torch.Generator(), **labels
        ).loss_dict["class"]

    assert class_loss() == class_loss(class_sets=[None, None]) == 0
    assert class_loss(class_labels=[torch.tensor([0, 1, -100]), torch.tensor([0])]) > 0
    assert class_loss(class_sets=["shapes", "shapes"]) > 0


@pytest.mark.parametrize("name", ["class_weight", "likeness_scale"])
def test_whole_numbers_are_numbers(name):
    assert getattr(AusmConfig.from_preset("nano", **{name: 1}), name) == 1


def test_maps_at_other_strides_are_refused():
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "patch_size": 16, "image_size": 96}
    backbone = {"model_type": "vitdet", "out_indices": [1, 2, 3, 4], **sizes}
    model = AusmForUniversalSegmentation(AusmConfig.from_preset("nano", backbone_config=backbone)).eval()
    with pytest.raises(
        ValueError, match=r"at strides 4, 8, 16 and 32; got sizes \[\(6, 6\), .* for frames of \(96, 96\)"
    ):
        model.step(torch.zeros(1, 3, 96, 96))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"pixel_values_videos": torch.zeros(2, 3, 64, 64)}, r"shape \(B, T, 3, H, W\)"),
        ({"pixel_values_videos": torch.zeros(2, 5, 3, 60, 64)}, "multiples of 32"),
        ({"pixel_values_videos": torch.zeros(2, 0, 3, 64, 64)}, "at least one frame"),
        ({"mask_labels": [torch.zeros(1, 5, 64, 64)]}, "one entry per clip"),
        ({"mask_labels": [torch.zeros(1, 4, 64, 64)] * 2}, r"`mask_labels\[0\]` must have shape"),
        ({"class_labels": [torch.zeros(2).long()] * 2}, r"`class_labels\[0\]` must have shape"),
        ({"class_labels": [torch.tensor([0, 1, 7]), torch.tensor([0])]}, "has label 7"),
        ({"switch_frames": [torch.tensor([0, 3, 6]), torch.tensor([1])]}, "must lie in 0 .. 5"),
        ({"id_slots": [torch.tensor([0, 0, 1]), torch.tensor([1])]}, "must differ"),
        ({"class_sets": ["shapes", "colours"]}, "`label_set` must be one of"),
        ({"class_sets": ["shapes"]}, "`class_sets` needs one entry per clip: 2, got 1"),
        ({"mask_labels": None}, "want `mask_labels` too"),
        ({"history_masks": []}, "`history_masks` needs one entry per clip: 2, got 0"),
        (
            {"mask_labels": [torch.zeros(7, 5, 64, 64)] * 2, "switch_frames": None, "id_slots": None},
            "only 6 ID vectors",
        ),
        ({"frame": torch.zeros(3, 64, 64), "inference_session": object()}, "give `frame`, no"),
        ({"pixel_values_videos": None}, "Give `pixel_values_videos`"),
        ({"pixel_values_videos": AusmInferenceSession()}, r"must have shape .*, got <class '.*AusmInferenceSession'>"),
    ],
)
def test_bad_input_is_refused(change, message):
    pixels, masks, switch, slots = clips()
    arguments = {"pixel_values_videos": pixels, "mask_labels": masks, "switch_frames": switch, "id_slots": slots}
    with pytest.raises(ValueError, match=message):
        tiny_model()(**{**arguments, **change})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_size": 30}, "`hidden_size`"),
        ({"temporal_mixer": "mamba2", "mamba_head_dim": 24}, "`mamba_head_dim`"),
        ({"num_id_vectors": 0}, "`num_id_vectors` must lie in 1 .. 16384, got 0"),
        ({"label_sets": {"a": []}}, "has no labels"),
        ({"default_label_set": "b"}, "`default_label_set`"),
        ({"temporal_mixer": "lstm"}, "temporal_mixer"),
        ({"history_local_kernel": 4}, "`history_local_kernel` must be 0 or odd, got 4"),
        ({"history_stride": 4}, "history_stride"),
        ({"mask_refinement_layers": -1}, "`mask_refinement_layers` must lie in 0 .. 256, got -1"),
        ({"pixel_encoder": "msdeform", "pixel_encoder_layers": 0}, "`pixel_encoder_layers` must be at least 1, got 0"),
        ({"train_num_points": 0}, "`train_num_points` must lie in 1 .. 16777216, got 0"),
        ({"oversample_ratio": 0.5}, "`oversample_ratio` must lie in 1 .. 100, got 0.5"),
        ({"importance_sample_ratio": 1.5}, "`importance_sample_ratio` must lie in 0 .. 1, got 1.5"),
        ({"label_sets": {"values": ["cat"]}}, "an identifier that torch doesn't use, got 'values'"),
        ({"label_sets": {"training": ["cat"]}}, "an identifier that torch doesn't use, got 'training'"),
        ({"history_local_kernel": -1}, "`history_local_kernel` must lie in 0 .. 16384, got -1"),
        ({"mask_propagation_radius": -1}, "`mask_propagation_radius` must lie in 0 .. 32, got -1"),
        ({"backbone_config": {"model_type": "nothing"}}, "`backbone_config`"),
        (
            {"backbone": "resnet50", "use_timm_backbone": True},
            "`backbone` is no setting of AUSM; name the backbone in",
        ),
        ({"hidden_size": 48, "pixel_encoder": "msdeform"}, "`hidden_size` must be a multiple of 32 with 'msdeform'"),
        ({"mask_feature_size": 60, "pixel_encoder": "fpn"}, "`mask_feature_size` must be a multiple of 8 with 'fpn'"),
        ({"duplicate_overlap": 7.0}, "`duplicate_overlap` must lie in 0 .. 1, got 7.0"),
        ({"class_weight": -1.0}, "`class_weight` must lie in 0 .. 1000000, got -1.0"),
        ({"history_gate_init": float("nan")}, "`history_gate_init` must lie in -1000000 .. 1000000, got nan"),
        ({"pixel_encoder_feedforward_size": -1}, "`pixel_encoder_feedforward_size` must lie in 1 .. 16384, got -1"),
        ({"oversample_ratio": float("inf")}, "`oversample_ratio` must lie in 1 .. 100, got inf"),
    ],
)
def test_bad_configuration_is_refused(change, message):
    with pytest.raises(Exception, match=message):
        tiny_config(**change)


@pytest.mark.parametrize("backbone", ["resnet", "efficientnet_lite"])
def test_no_frame_sees_a_later_one_in_training(backbone):
    torch.manual_seed(0)
    stages = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16], "embedding_size": 8}
    resnet = {"model_type": "resnet", **stages, "out_features": ["stage1", "stage2", "stage3", "stage4"]}
    model = AusmForUniversalSegmentation(tiny_config(backbone_config=resnet if backbone == "resnet" else TINY_LITE))
    assert model.training
    clip = torch.randn(1, 3, 3, 64, 64)
    other = clip.clone()
    other[:, 2] = 5 * torch.randn(3, 64, 64)
    before, after = (model.model(frames).masks_queries_logits[:, :2] for frames in (clip, other))
    torch.testing.assert_close(before, after)


def test_a_backbone_of_many_labels_is_taken():
    backbone = {"model_type": "swin", "num_labels": 21841, "out_features": ["stage1", "stage2", "stage3", "stage4"]}
    config = tiny_config(backbone_config=backbone)
    assert type(config).from_dict(config.to_dict()).backbone_config.num_labels == 21841


def test_export_of_a_clip():
    model = tiny_model().eval()
    clip = torch.rand(1, 2, 3, 64, 64)
    with torch.no_grad():
        exported = torch.export.export(model, (clip,)).module()
        torch.testing.assert_close(exported(clip).masks_queries_logits, model(clip).masks_queries_logits)


def test_presets():
    config = AusmConfig.from_preset("nano")
    assert sum(p.numel() for p in AusmForUniversalSegmentation(config).parameters()) <= 7_500_000
    assert config.id2label[0] == "person" and config.label_sets["object"] == ["object"]
    with pytest.raises(ValueError, match="no preset 'huge'"):
        AusmConfig.from_preset("huge")
    for preset, channels in (("tiny", 96), ("base", 128)):
        config = AusmConfig.from_preset(preset)
        assert (config.hidden_size, config.num_id_vectors, config.num_detection_queries) == (256, 100, 100)
        assert (config.num_compressor_layers, config.num_history_decoder_layers) == (6, 6)
        assert config.backbone_config.embed_dim == channels
        # The paper's form
        assert config.history_local_kernel == config.mask_propagation_radius == config.remember_appearance == 0
        assert not config.mask_pooling and not config.query_selection
        config.backbone_config.depths[2] = 1
        assert AusmConfig.from_preset(preset).backbone_config.depths[2] > 1  # each config has its own


def test_labels_that_are_not_as_many_as_the_head_has():
    model = tiny_model()
    model.config.id2label = {0: "thing"}
    with pytest.raises(ValueError, match="has 1 labels, the head for it"), torch.no_grad():
        model.step(torch.zeros(1, 3, 64, 64))


def test_how_a_network_starts():
    model = tiny_model(history_local_kernel=3).model
    history = model.history_encoder
    for layer in history.decoder:
        assert torch.equal(layer.cross_attention.k_proj.weight, layer.cross_attention.q_proj.weight)
        assert not torch.equal(layer.cross_attention.v_proj.weight, layer.cross_attention.q_proj.weight)
    first, *_, last = (x.weight for x in model.pixel_decoder.mask_embedder if isinstance(x, torch.nn.Linear))
    assert last.std() < 0.2 * first.std()
    # The past reaches the same place of the present frame as it is, but for its loudness.
    maps = torch.randn(2, 32, 5, 7)
    with torch.no_grad():
        read = history.local_read(maps)
    gain = (read * maps).sum() / (maps * maps).sum()
    assert gain >= 1
    torch.testing.assert_close(read, gain * maps)
    assert tiny_model().model.history_encoder.local_read is None
    # Deformable attention looks in as many directions as it has heads, a step farther with each point.
    attention = (
        tiny_model(pixel_encoder="msdeform", pixel_encoder_layers=1).model.pixel_encoder.encoder.layers[0].self_attn
    )
    offsets = attention.sampling_offsets.bias.view(attention.n_heads, attention.n_levels, attention.n_points, 2)
    torch.testing.assert_close(
        offsets[0, :, :, 0], torch.arange(1.0, attention.n_points + 1).expand(attention.n_levels, -1)
    )
    assert not attention.sampling_offsets.weight.any() and not attention.attention_weights.weight.any()


def test_how_selected_queries_start():
    """Few cells are the middle of an object, and all objects reach equally far."""
    model = tiny_model(query_selection=True).model
    assert model.query_selection.score.bias.item() == -4 and model.query_selection.score.weight.std() > 0.1
    assert (
        not model.pixel_decoder.reach.projection.weight.any() and not model.pixel_decoder.reach.projection.bias.any()
    )


def mask_propagation(radius: int) -> AusmMaskPropagation:
    return tiny_model(mask_propagation_radius=radius).model.history_encoder.mask_propagation


@pytest.mark.parametrize("radius", [1, 3])
def test_masks_are_propagated_as_pixel_by_pixel(radius):
    propagation = mask_propagation(radius)
    torch.manual_seed(2)
    features, previous = torch.randn(2, 2, 32, 8, 12)
    with torch.no_grad():
        torch.nn.init.normal_(propagation.projection.weight)
        propagation.log_sharpness.fill_(1.5)
        shares = torch.rand(2, 3, 8, 12)
        logits = propagation(features, previous, shares, torch.ones(2, 3, dtype=torch.bool))
        weight = propagation.projection.weight
        for n, y, x in [(0, 0, 0), (1, 3, 4), (0, 5, 11), (1, 7, 6)]:
            near = [(j, i) for j in range(8) for i in range(12) if max(abs(j - y), abs(i - x)) <= radius]
            alike = [
                torch.cosine_similarity(weight @ features[n, :, y, x], weight @ previous[n, :, j, i], 0)
                for j, i in near
            ]
            shared = torch.stack([shares[n, :, j, i] for j, i in near])
            expected = (torch.stack(alike) * math.exp(1.5)).softmax(0) @ shared
            torch.testing.assert_close(logits[n, :, y, x], 8 * expected - 4)


def test_untrained_propagation_follows_what_moves():
    """Two patches move over an even ground in different directions: each takes its mask along."""
    propagation = mask_propagation(4)
    torch.manual_seed(3)
    ground, (first, second) = torch.randn(32, 1, 1).expand(-1, 16, 20), torch.randn(2, 32, 5, 5)
    masks = torch.zeros(2, 2, 16, 20)  # of the frame before and of this one
    frames = torch.stack([ground, ground])
    for frame, (top, left), (low, far) in ((0, (4, 4), (6, 12)), (1, (7, 2), (3, 13))):
        frames[frame, :, top : top + 5, left : left + 4] = first[..., :4]
        frames[frame, :, low : low + 4, far : far + 5] = second[:, :4]
        masks[frame, 0, top : top + 5, left : left + 4] = 1
        masks[frame, 1, low : low + 4, far : far + 5] = 1
    with torch.no_grad():
        logits = propagation(frames[1:], frames[:1], masks[:1], torch.ones(1, 2, dtype=torch.bool))
    assert torch.equal(logits[0] > 0, masks[1] > 0)


def test_propagation_says_nothing_of_an_object_that_may_be_anywhere():
    shares = torch.zeros(1, 2, 8, 8)
    shares[0, 1, 2:5, 2:5] = 1
    with torch.no_grad():
        away, seen = mask_propagation(2)(*torch.randn(2, 1, 32, 8, 8), shares, torch.tensor([[False, True]]))[0]
    assert (away == 0).all()
    assert (seen != 0).all()


@pytest.mark.parametrize("appearance", [False, True])
def test_who_has_been_seen_and_has_no_mask_is_away(appearance):
    """Of two objects the first has a mask after frame 1, none after frame 2, and the second never had one."""
    model = tiny_model(mask_propagation_radius=2, remember_appearance=appearance)
    known = []
    propagation = model.model.history_encoder.mask_propagation
    propagation.register_forward_pre_hook(lambda module, inputs: known.append(inputs[3][0].tolist()))
    masks = torch.zeros(1, 2, 16, 16)
    masks[0, 0, 4:10, 4:10] = 1
    slots, taken = torch.tensor([[2, 0]]), torch.ones(1, 2, dtype=torch.bool)
    with torch.no_grad():
        history = model.step(torch.randn(1, 3, 64, 64)).history
        for given in (masks, 0 * masks, 0 * masks):
            history = model.step(torch.randn(1, 3, 64, 64), history.replace_objects(slots, taken, given)).history
    assert known == [[True, False], [appearance, False], [appearance, False]]


def test_a_frame_with_no_object_pools_nothing(monkeypatch):
    """Apple's GPUs refuse to pool maps without channels."""
    pool = F.adaptive_avg_pool2d

    def as_on_mps(maps, size):
        assert 0 not in maps.shape[1:], f"adaptive_avg_pool2d(): got sizes {list(maps.shape)}"
        return pool(maps, size)

    monkeypatch.setattr(F, "adaptive_avg_pool2d", as_on_mps)
    model = tiny_model(mask_propagation_radius=2, remember_appearance=True)
    with torch.no_grad():
        history = model.step(torch.randn(1, 3, 64, 64)).history
        nobody = history.replace_objects(history.slots, history.taken, torch.zeros(1, 0, 16, 16))
        model.step(torch.randn(1, 3, 64, 64), nobody)


def test_propagation_without_an_object_to_follow():
    model, plain = tiny_model(mask_propagation_radius=2), tiny_model()
    plain.load_state_dict(model.state_dict(), strict=False)
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        output, expected = model.step(pixels), plain.step(pixels)
    assert torch.equal(output.masks_queries_logits, expected.masks_queries_logits)


def test_propagated_masks_reach_the_logits():
    """Untrained, a mask comes back in the next frame if it is alike, and not in the frame it is drawn on."""
    model, plain = tiny_model(mask_propagation_radius=4), tiny_model()
    plain.load_state_dict(model.state_dict(), strict=False)
    torch.manual_seed(4)
    masks = torch.zeros(1, 1, 32, 32)
    masks[0, 0, 8:20, 10:24] = 1
    history = model.init_history(1).replace_objects(torch.tensor([[2]]), torch.ones(1, 1, dtype=torch.bool), masks)
    pixels = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        without = plain.step(pixels, history)
        first = model.step(pixels, history)
        second = model.step(pixels, first.history)
    assert torch.equal(first.masks_queries_logits, without.masks_queries_logits)
    assert iou(without.masks_queries_logits[0, 0] > 0, masks[0, 0] > 0) < 0.8
    assert iou(second.masks_queries_logits[0, 0] > 0, masks[0, 0] > 0) > 0.8


def appearance() -> AusmAppearance:
    return tiny_model(remember_appearance=True, num_id_vectors=5).model.history_encoder.appearance


def test_appearance_is_ridge_regression():
    """The logits by numpy's least squares over all pixels of all frames: an object that comes later, one that is away
    for a frame, a stream that begins and one that goes on."""
    module = appearance()
    torch.manual_seed(5)
    features = torch.randn(2, 5, 32, 4, 6)
    masks = torch.zeros(2, 4, 2, 8, 12)
    masks[:, :, 0, 1:5, 2:7] = 1
    masks[:, 2, 0] = 0
    masks[:, 1:, 1, 5:8, 6:11] = 1
    slots = torch.tensor([[4, 1], [0, 2]])
    shares = F.avg_pool2d(masks.flatten(0, 1), 2).unflatten(0, (2, 4))
    begun, going = torch.tensor([True, False]), torch.tensor([True, True])
    there = torch.ones(2, 4, 2, dtype=torch.bool)
    with torch.no_grad():
        module.scale.fill_(1.5)
        logits, known, memory = module(features[:, 1:], features[:, 0], shares, slots, there, begun, None)
        half, _, carried = module(features[:, 1:3], features[:, 0], shares[:, :2], slots, there[:, :2], begun, None)
        rest, _, resumed = module(features[:, 3:], features[:, 2], shares[:, 2:], slots, there[:, 2:], going, carried)
    torch.testing.assert_close(torch.cat([half, rest], dim=1), logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(resumed, memory)

    looks = features.double().flatten(3).mT.numpy()
    looks = looks / np.linalg.norm(looks, axis=-1, keepdims=True)
    looks = np.concatenate([looks, np.full_like(looks[..., :1], 0.5)], axis=-1)
    owners = shares.double().flatten(3).numpy()
    owners = np.concatenate([owners, 1 - owners.sum(axis=2, keepdims=True)], axis=2)
    for b in range(2):
        rows, first, recent, wanted, seen = [], [], [], [], set()
        for t in range(4):
            first, recent = [0.9995 * weight for weight in first], [0.98 * weight for weight in recent]
            if not seen:  # nobody yet: of the background, too, only the last frame counts
                rows, first, recent, wanted = [], [], [], []
            for n in range(3) if t or not b else ():  # the second stream has no frame 0
                if owners[b, t, n].any():
                    rows.append(looks[b, t])
                    share = owners[b, t, n] / owners[b, t, n].sum()
                    first.append(share * (n not in seen))
                    recent.append(share * (0.02 if n in seen else 1))
                    wanted.append(np.eye(3)[[n] * 24])
                    seen.add(n)
            assert known[b, t].tolist() == [n in seen for n in range(2)]
            if not seen:
                assert not logits[b, t].any()
                continue
            root = np.sqrt((np.concatenate(first) + np.concatenate(recent)) / 2)[:, None]
            ridge = np.concatenate([np.concatenate(rows) * root, np.sqrt(0.03) * np.eye(33)])
            classifier = np.linalg.lstsq(ridge, np.concatenate([np.concatenate(wanted) * root, np.zeros((33, 3))]))[0]
            scores = looks[b, t + 1] @ classifier
            for n in range(2):
                best = np.delete(scores, n, axis=1).max(axis=1).clip(min=0)
                expected = 1.5 * (scores[:, n] - best) if n in seen else np.zeros(24)
                torch.testing.assert_close(
                    logits[b, t, n].flatten(), torch.from_numpy(expected).float(), atol=2e-5, rtol=1e-4
                )


def test_objects_look_as_the_pixels_of_their_masks_do():
    """By numpy: the mean of unit vectors, each as much as its cell is covered."""
    torch.manual_seed(11)
    features = torch.randn(2, 32, 4, 6)
    masks = torch.full((2, 3, 8, 12), -1.0)
    masks[:, 0, 2:7, 3:8] = masks[0, 1, 4:, 6:] = masks[1, 1, :3] = 0.5
    history = replace(AusmHistory.empty(2, "cpu", torch.float32), features=features.bfloat16())
    looks = tiny_model().describe_objects(history, masks)
    assert looks.dtype == torch.float32 and looks.shape == (2, 3, 32) and not looks[:, 2].any()

    unit = F.normalize(features.bfloat16().double(), dim=1).numpy()
    for b, n in itertools.product(range(2), range(2)):
        covered = (masks[b, n] > 0).double().numpy().reshape(4, 2, 6, 2).mean((1, 3))
        expected = (unit[b] * covered).sum((1, 2))
        np.testing.assert_allclose(looks[b, n].numpy(), expected / np.linalg.norm(expected), atol=1e-6)


def test_who_is_forgotten_and_comes_again_is_known_as_well_as_at_first():
    """What it looked like is not nobody's now: eight times it is let go, and marked again under another ID vector."""
    torch.manual_seed(0)
    module = appearance()
    module.scale.data.fill_(4.0)
    ground, car, other = torch.randn(3, 32)
    features = ground.view(1, 1, 32, 1, 1).repeat(1, 1, 1, 8, 8)
    masks = torch.zeros(1, 1, 2, 8, 8)
    masks[..., 0, 5:7, 5:7] = masks[..., 1, 1:4, 1:4] = 1
    features[:, :, :, 5:7, 5:7], features[:, :, :, 1:4, 1:4] = other.view(32, 1, 1), car.view(32, 1, 1)
    features += 0.1 * torch.randn_like(features)
    there, started = torch.ones(1, 1, 2, dtype=torch.bool), torch.tensor([True])
    memory, logits = None, []
    for time in range(8):
        slots = torch.tensor([[0, 1 + time % 4]])
        with torch.no_grad():
            for _ in range(20):
                seen, _, memory = module(features, features[:, 0], masks, slots, there, started, memory)
        logits.append(float(seen[0, 0, 1][masks[0, 0, 1] > 0].mean()))
        memory = AusmHistory(None, None, slots, there[:, 0], masks[:, 0], memory).forget_appearance([1]).appearance
        width = memory.shape[-1]
        assert torch.linalg.eigvalsh(memory[0, :, :width].double()).min() > -1e-5
        assert not memory[0, :, width + slots[0, 1]].any()
    assert min(logits) > 0.9 * logits[0] > 3


def test_appearance_begins_anew_when_nobody_is_left_whom_it_is_of():
    """Frames without an object before the first, and objects that were let go, leave no trace."""
    module = appearance()
    torch.manual_seed(8)
    features = torch.randn(1, 6, 32, 4, 6)
    masks = torch.zeros(1, 5, 1, 4, 6)
    masks[:, 3:, 0, 1:3, 2:4] = 1
    slots, there, started = torch.tensor([[2]]), torch.ones(1, 5, 1, dtype=torch.bool), torch.tensor([True])
    with torch.no_grad():
        module.scale.fill_(1.5)
        logits, _, memory = module(features[:, 1:], features[:, 0], masks, slots, there, started, None)
        late, _, begun = module(
            features[:, 4:], features[:, 3], masks[:, 3:], slots, there[:, 3:], started, None
        )  # as if the first three frames had not been
        history = AusmHistory(None, None, slots, there[:, 0], masks[:, 0], memory).forget_appearance([0])
        again, _, anew = module(
            features[:, 4:], features[:, 3], masks[:, 3:], slots, there[:, 3:], started, history.appearance
        )
    assert not logits[:, :3].any() and torch.equal(again, late) and torch.equal(anew, begun)
    torch.testing.assert_close(logits[:, 3:], late, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(memory, begun)


def test_what_an_object_looked_like_at_first_is_not_lost_in_a_long_stream():
    """Its mask loses one of its two kinds of pixels after the first frame, and 300 frames pass."""
    module = appearance()
    torch.manual_seed(9)
    ground, body, rider = torch.randn(3, 32)
    features = ground.view(1, 1, 32, 1, 1).repeat(1, 302, 1, 4, 6)
    features[..., 1, :] = body.view(32, 1)
    features[..., 2, :] = rider.view(32, 1)
    masks = torch.zeros(1, 301, 1, 4, 6)
    masks[..., 1, :] = 1
    masks[:, 0, :, 2] = 1
    there = torch.ones(1, 301, 1, dtype=torch.bool)
    with torch.no_grad():
        logits, *_ = module(features[:, 1:], features[:, 0], masks, torch.tensor([[2]]), there, there[:, 0, 0], None)
    body, rider, ground = (logits[0, -1, 0, row].mean() for row in (1, 2, 3))
    assert body > 3 and ground < -3 and rider > 0  # with the recent looks alone it would be -3.4


def test_untrained_appearance_finds_what_was_hidden():
    """Two kinds of pixels: one object hides behind the other, and comes out where nobody was."""
    module = appearance()
    torch.manual_seed(6)
    ground, *kinds = torch.randn(3, 32)
    masks = torch.zeros(1, 3, 2, 8, 8)
    masks[0, 0, 0, 1:4, 1:4] = masks[0, :2, 1, 5:8, 1:4] = 1  # the first is hidden in frame 1, both in frame 2
    features = ground.view(1, 1, 32, 1, 1).expand(-1, 4, -1, 8, 8).clone()
    for n, kind in enumerate(kinds):
        for t in range(3):
            features[0, t] = torch.where(masks[0, t, n] > 0, kind.view(-1, 1, 1), features[0, t])
    features[0, 3, :, 2:6, 4:8] = kinds[0].view(-1, 1, 1)
    before, features = features[:, 0], features[:, 1:]
    there, started = torch.ones(1, 3, 2, dtype=torch.bool), torch.tensor([True])
    with torch.no_grad():
        logits, *_ = module(features, before, masks, torch.tensor([[3, 0]]), there, started, None)
        # A column that is only padding has no part in it, whichever slot it names.
        more = F.pad(masks, (0, 0, 0, 0, 0, 1))
        padded, *_ = module(features, before, more, torch.tensor([[3, 0, 3]]), F.pad(there, (0, 1)), started, None)
    out = torch.zeros(8, 8, dtype=torch.bool)
    out[2:6, 4:8] = True
    assert (logits[0, -1, 0] > 2)[out].all() and (logits[0, -1, 0] < -2)[~out].all()
    assert (logits[0, -1, 1] < -2).all()
    torch.testing.assert_close(padded[:, :, :2], logits)


def test_an_object_that_fills_the_frame_stands_against_nobody():
    """Whose score is 0: a pixel that is as unlike it as can be has a negative logit."""
    module = appearance()
    features = torch.randn(32).view(1, 1, 32, 1, 1).expand(-1, 2, -1, 4, 4).clone()
    features[0, 1, :, :2] *= -1
    masks, there, started = torch.ones(1, 1, 1, 4, 4), torch.ones(1, 1, 1, dtype=torch.bool), torch.tensor([True])
    with torch.no_grad():
        logits, *_ = module(features[:, 1:], features[:, 0], masks, torch.tensor([[2]]), there, started, None)
        score = 4 / (1 + 0.03 / 1.25)  # 1.25 is the squared length of a pixel's looks
    torch.testing.assert_close(logits[0, 0, 0, 2:], torch.full((2, 4), score))
    torch.testing.assert_close(logits[0, 0, 0, :2], torch.full((2, 4), -score * (1 - 0.25) / 1.25))


def test_a_pixel_that_is_unlike_all_others_is_no_more_the_objects_for_it():
    """Nobody's score is 0, so one below it is no evidence; else a column of padding, which has 0, would change it."""
    module = appearance()
    along, across = torch.eye(32)[:2]
    features = torch.stack([side * along + 1.7 * sign * across for side in (1, -1) for sign in (1, -1)])
    features = features.T.reshape(1, 1, 32, 2, 2)  # the object above, the ground below
    present = along.view(1, 1, 32, 1, 1).expand(-1, -1, -1, 2, 2)  # farther from the ground than the object was
    masks, there = torch.tensor([1.0, 1, 0, 0]).view(1, 1, 1, 2, 2), torch.ones(1, 1, 1, dtype=torch.bool)
    with torch.no_grad():
        logits, *_ = module(present, features[:, 0], masks, torch.tensor([[2]]), there, torch.tensor([True]), None)
        more, *_ = module(
            present,
            features[:, 0],
            F.pad(masks, (0, 0, 0, 0, 0, 1)),
            torch.tensor([[2, 0]]),
            F.pad(there, (0, 1)),
            torch.tensor([True]),
            None,
        )
    assert (logits > 4).all()  # by more than the score that is wanted
    torch.testing.assert_close(more[:, :, :1], logits)


@pytest.mark.parametrize("objects", [1, 100])
def test_the_solver_is_torchs(objects):
    """So many objects and the background, whose products have a length of 1.25 each; and its gradients."""
    torch.manual_seed(7)
    looks = F.normalize(torch.randn(3, 500, 128) * torch.linspace(2, 0.01, 128), dim=-1)
    products = 1.25 * (objects + 1) * looks.mT @ looks / 500
    matrices = (products + AusmAppearance.RIDGE * torch.eye(128)).double().requires_grad_()
    targets = torch.cat([looks[:, :4].mT, torch.zeros(3, 128, 1)], dim=-1).double().requires_grad_()
    steps = AusmAppearance.SOLVER_STEPS
    exact = torch.linalg.solve(matrices, targets)
    torch.testing.assert_close(solve(matrices, targets, steps), exact, atol=1e-7, rtol=1e-6)
    results = [solve(matrices.float(), targets.float(), steps), exact.float()]
    torch.testing.assert_close(*results, atol=2e-5, rtol=1e-4)
    weights = torch.randn_like(results[0])
    got, expected = (torch.autograd.grad((result * weights).sum(), (matrices, targets)) for result in results)
    for one, other in zip(got, expected):
        torch.testing.assert_close(one, other, atol=1e-3 * float(other.abs().max()), rtol=1e-3)


@pytest.mark.parametrize("size", [(8, 12), (4, 6), (5, 7), (16, 24), (20, 30)])
@pytest.mark.parametrize("channels", [0, 3])
def test_maps_are_averaged_as_by_torch(size, channels):
    maps = torch.randn(2, channels, 16, 24)
    expected = F.interpolate(maps, size=size, mode="area") if channels else torch.zeros(2, 0, *size)
    torch.testing.assert_close(average_maps(maps, size), expected)


def iou(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one & other).sum() / (one | other).sum())


def test_refinement_starts_by_changing_nothing():
    plain, refined = tiny_model().model.pixel_encoder, tiny_model(mask_refinement_layers=2).model.pixel_encoder
    refined.load_state_dict(plain.state_dict(), strict=False)
    features = torch.randn(2, 32, 4, 6), torch.randn(2, plain.mask_lateral.in_channels, 8, 12)
    with torch.no_grad():
        assert torch.equal(refined.mask_features(*features), plain.mask_features(*features))
        torch.nn.init.ones_(refined.mask_refinement[1].projection.weight)
        assert not torch.equal(refined.mask_features(*features), plain.mask_features(*features))


def test_mask_pooling_is_the_mean_over_the_pixels_of_a_mask():
    torch.manual_seed(0)
    levels = tuple(torch.randn(2, 5, 16 // n, 24 // n) for n in (1, 2, 4))
    logits = torch.randn(2, 3, 32, 48)
    logits[1, 2] = -1.0
    pooled = pool_in_masks(levels, logits)
    assert pooled.shape == (2, 3, 15)
    fine = torch.cat(
        [level.repeat_interleave(2 * n, 2).repeat_interleave(2 * n, 3) for n, level in zip((1, 2, 4), levels)], 1
    )
    for frame in range(2):
        for query in range(3):
            inside = fine[frame][:, logits[frame, query] > 0]
            expected = inside.mean(1) if inside.numel() else torch.zeros(15)
            torch.testing.assert_close(pooled[frame, query], expected)


def test_class_heads_read_what_is_in_the_masks():
    """With mask pooling labels depend on the frame where the mask is, and masks and foreground are as without."""
    plain, pooling = tiny_model(), tiny_model(mask_pooling=True)
    pooling.load_state_dict({k: v for k, v in plain.state_dict().items() if "class_heads" not in k}, strict=False)
    frame = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for name, head in pooling.class_heads.items():
            head.weight[:, :32] = plain.class_heads[name].weight
            head.weight[:, 32:] = 0
            head.bias[:] = plain.class_heads[name].bias
        expected, given = plain.step(frame), pooling.step(frame)
        for name in ("masks_queries_logits", "foreground_queries_logits", "class_queries_logits"):
            torch.testing.assert_close(given[name], expected[name])
        output = pooling.model.step(frame)
        levels = pooling.model.encode_frames(frame).levels
        pooled = pool_in_masks(levels, output.masks_queries_logits)
        torch.testing.assert_close(output.class_features, torch.cat([output.query_hidden_states, pooled], -1))
        assert pooled.abs().amax(-1).gt(0).any()


@pytest.mark.parametrize("stride", [8, 16, 32])
def test_the_history_is_kept_at_its_stride(stride):
    """Averages of the frame before and of the marks go in; what comes out is added to each level at its own stride."""
    model = tiny_model(pixel_encoder="fpn", history_stride=stride, mask_propagation_radius=2).model
    seen = {}
    encoder, decoder = model.history_encoder, model.pixel_decoder
    encoder.compressor[0].register_forward_pre_hook(lambda module, args: seen.update(memory=args[0]))
    encoder.mask_propagation.register_forward_pre_hook(lambda module, args: seen.update(maps=args[:2]))
    encoder.register_forward_hook(lambda module, args, output: seen.update(change=output[0]))
    decoder.register_forward_pre_hook(lambda module, args: seen.update(levels=args[3]))
    pixels = torch.randn(1, 3, 64, 96)
    slots, masks = torch.tensor([[1]]), torch.zeros(1, 1, 16, 24)
    masks[0, 0, 3:11, 5:18] = 1
    with torch.no_grad():
        history = model.step(torch.randn(1, 3, 64, 96)).history.replace_objects(slots, slots > 0, masks)
        frame = model.encode_frames(pixels)
        model.step(frame, history)
        mark = encoder.mark_vectors(model.id_vectors(slots))[0, 0]
    cells = stride // 8
    shares = F.avg_pool2d(masks / (1e-6 + masks), stride // 4)[0]
    wanted = F.avg_pool2d(history.features, cells)[0] + mark[:, None, None] * shares
    torch.testing.assert_close(seen["memory"][0, 0].T.unflatten(1, wanted.shape[1:]), wanted, atol=1e-5, rtol=1e-5)
    assert seen["change"].shape[-2:] == (64 // stride, 96 // stride) and seen["change"].abs().max() > 0.01
    for level, before, own in zip(seen["levels"], frame.levels, (8, 16, 32)):
        if own > stride:
            change = F.avg_pool2d(seen["change"], own // stride)
        else:
            change = F.interpolate(seen["change"], size=level.shape[-2:], mode="bilinear")
        torch.testing.assert_close(level, before + change)
    # Torch goes by these strides when it chooses how to pool and resize.
    for maps in (*seen["maps"], seen["change"]):
        _, channels, height, width = maps.shape
        assert maps.stride() == (channels * height * width, 1, channels * width, channels)


def test_positions_are_mask2formers():
    embed = Mask2FormerSinePositionEmbedding(num_position_features=16, normalize=True)
    for size in [(3, 5), (32, 56)]:
        expected = embed(torch.Size((1, 32, *size)), "cpu", torch.float32)[0].flatten(1).T
        torch.testing.assert_close(sine_positions(size, 32, torch.empty(0)), expected)


def test_a_pointwise_convolution_is_a_convolution():
    torch.manual_seed(0)
    ours, maps = PointwiseConv2d(8, 6), torch.randn(2, 8, 5, 7)
    expected = torch.nn.functional.conv2d(maps, ours.weight, ours.bias)
    torch.testing.assert_close(ours(maps), expected)
    channels_last = ours(maps.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(channels_last, expected)
    assert channels_last.is_contiguous(memory_format=torch.channels_last)


def test_tokens_and_maps_share_memory():
    tokens = torch.randn(1, 12, 8)
    maps = to_maps(tokens, (3, 4))
    torch.testing.assert_close(maps[0, :, 1, 2], tokens[0, 6])
    # One frame: torch takes its maps for channels last only if the strides say so throughout.
    assert maps.stride() == (96, 1, 32, 8)
    assert to_tokens(maps).data_ptr() == tokens.data_ptr()
    torch.testing.assert_close(to_tokens(maps), tokens)


def test_followed_objects_first_look_where_they_were_last_seen():
    model = tiny_model()
    model.set_attn_implementation("eager")
    masks = torch.zeros(1, 3, 32, 32)
    masks[0, 0, :8, :8] = 1  # one cell of stride 32
    masks[0, 1, 20:, 4:30] = 1  # the two cells below; the third object is away and looks everywhere
    slots, taken = torch.tensor([[3, 0, 5]]), torch.ones(1, 3, dtype=torch.bool)
    history = model.init_history(1).replace_objects(slots, taken, masks)
    with torch.no_grad():
        output = model.model(torch.randn(1, 1, 3, 128, 128), history=history, output_attentions=True)
    first = output.cross_attentions[0][0].sum(dim=0).unflatten(-1, (4, 4))  # (Q, h, w) at stride 32
    assert (first[0] > 0).nonzero().tolist() == [[0, 0]]
    assert (first[1] > 0).nonzero().tolist() == [[row, column] for row in (2, 3) for column in range(4)]
    assert (first[2] > 0).all()


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_decoder_layers_read_the_levels_in_turn(layers):
    model = tiny_model(num_decoder_layers=layers)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model.model(torch.randn(1, 1, 3, 64, 128), output_attentions=True)
    read = [attention.shape[-1] for attention in output.cross_attentions]
    assert read == [2 * 4, 4 * 8, 8 * 16, 2 * 4][:layers]  # strides 32, 16, 8, and 32 again


def test_untrained_marks_already_say_whose_pixel_is_whose():
    """In a picture with three marked squares, each ID vector has the highest logit in its own square."""
    torch.manual_seed(1)
    model = AusmForUniversalSegmentation(AusmConfig.from_preset("nano")).eval()
    masks = torch.zeros(1, 3, 32, 32)
    for index, (top, left) in enumerate([(0, 0), (16, 0), (8, 18)]):
        masks[0, index, top : top + 14, left : left + 14] = 1
    slots, taken = torch.tensor([[3, 0, 25]]), torch.ones(1, 3, dtype=torch.bool)
    history = model.init_history(1).replace_objects(slots, taken, masks)
    with torch.no_grad():
        winner = model.step(torch.randn(1, 3, 128, 128), history).masks_queries_logits[0, :3].argmax(dim=0)
    for index in range(3):
        assert (winner[masks[0, index] > 0] == index).float().mean() > 0.95
