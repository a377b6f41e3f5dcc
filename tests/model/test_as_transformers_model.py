"""What users of transformers expect of a model, where its own suites (`tests/transformers_suite`) don't look."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModel, AutoModelForUniversalSegmentation

from ausm_hf import AusmConfig, AusmForUniversalSegmentation, AusmModel
from ausm_hf.model.prompts_ausm import ObjectPrompt
from ausm_hf.model.session_ausm import AusmInferenceSession


@pytest.fixture
def pixels():
    return torch.rand(2, 2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def eager_model(tiny_model):
    model = copy.deepcopy(tiny_model)
    model.set_attn_implementation("eager")
    return model


@pytest.fixture(scope="module")
def saved(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tiny_model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("device_map", ["cpu", "auto", "disk"])
@pytest.mark.parametrize("temporal_mixer", ["mamba", "mamba2"])
def test_device_maps_change_nothing(device_map, temporal_mixer, tiny_config, pixels, tmp_path):
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    tiny_model = AusmForUniversalSegmentation(AusmConfig(**tiny_config.to_dict() | {"temporal_mixer": temporal_mixer}))
    tiny_model.eval().save_pretrained(tmp_path)
    off_loaded = device_map == "disk"
    if off_loaded:  # all but the heads of classes: a network with nothing anywhere else is refused by transformers
        parts = [*(f"model.{name}" for name, _ in tiny_model.model.named_children()), "foreground_head"]
        device_map = dict.fromkeys(parts, "disk") | {"class_heads": "cpu"}
    folder = tmp_path / "off-loaded"
    model = AusmForUniversalSegmentation.from_pretrained(tmp_path, device_map=device_map, offload_folder=folder)
    on_disk = [name for name, parameter in model.named_parameters() if parameter.device.type == "meta"]
    assert len(on_disk) == (len(list(model.parameters())) - 2 if off_loaded else 0)
    assert model.device.type == "cpu"
    with torch.no_grad():
        wanted, found = tiny_model(pixels), model(pixels)
        history = model.step(pixels[:, 1], model.step(pixels[:, 0], model.init_history(2)).history)
    torch.testing.assert_close(found.masks_queries_logits, wanted.masks_queries_logits)
    torch.testing.assert_close(history.masks_queries_logits, wanted.masks_queries_logits[:, 1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("refinement", [0, 2])
def test_half_precision(dtype, refinement, tiny_model, pixels, tmp_path):
    torch.manual_seed(0)
    # Selected queries may come from other places: see the next test.
    changes = {"mask_refinement_layers": refinement, "query_selection": False}
    config = AusmConfig(**tiny_model.config.to_dict() | changes)
    plain = AusmForUniversalSegmentation(config).eval()
    plain.save_pretrained(tmp_path)
    model = AusmForUniversalSegmentation.from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    with torch.no_grad():
        wanted, found = plain(pixels), model(pixels)
        step = model.step(pixels[:, 0])
    assert found.foreground_queries_logits.dtype == step.masks_queries_logits.dtype == dtype
    scale = wanted.foreground_queries_logits.abs().max()
    difference = (found.foreground_queries_logits.float() - wanted.foreground_queries_logits).abs() / scale
    if refinement == 0:
        assert difference.max() < 0.1
    # Of this network's random masks a cell may fall on the other side of the threshold; then a query looks elsewhere.
    assert difference.quantile(0.8) < 0.03 and difference.max() < 0.25


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("refinement", [0, 2])
def test_selected_queries_in_half_precision(dtype, refinement, tiny_model, pixels):
    """They come from the same places but for one of twenty that rounding may move, and say there what they said."""
    torch.manual_seed(0)
    config = AusmConfig(**tiny_model.config.to_dict() | {"mask_refinement_layers": refinement})
    model = AusmForUniversalSegmentation(config).eval()
    places = []
    model.model.query_selection.register_forward_hook(lambda module, inputs, output: places.append(output.places))
    with torch.no_grad():
        wanted = model(pixels).foreground_queries_logits.flatten(0, 1)
        found = model.to(dtype)(pixels).foreground_queries_logits.flatten(0, 1)
    assert found.dtype == places[1].dtype == dtype
    same = (places[0][:, :, None] - places[1][:, None].float()).abs().amax(-1) < 0.01
    frames, before, after = same.nonzero(as_tuple=True)
    assert len(frames) >= 19
    assert ((wanted[frames, before] - found[frames, after].float()).abs() / wanted.abs().max()).max() < 0.25


def test_dtype_auto_is_that_of_the_file(tiny_model, tmp_path):
    copy.deepcopy(tiny_model).to(torch.bfloat16).save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16


def test_hidden_states_and_attentions_are_those_of_the_pixel_decoder(eager_model, pixels):
    config = eager_model.config
    selected = []
    eager_model.model.query_selection.register_forward_hook(lambda module, inputs, output: selected.append(output))
    with torch.no_grad():
        output = eager_model(pixels, output_hidden_states=True, output_attentions=True)
        plain = eager_model(pixels)
    frames, queries, heads = 4, config.num_detection_queries, config.num_attention_heads
    assert [tuple(x.shape) for x in output.hidden_states] == [(frames, queries, config.hidden_size)] * (
        config.num_decoder_layers + 1
    )
    torch.testing.assert_close(output.hidden_states[0], selected[0].queries)
    norm = eager_model.model.pixel_decoder.layernorm
    torch.testing.assert_close(
        eager_model.foreground_head(norm(output.hidden_states[-1])).flatten(),
        plain.foreground_queries_logits.flatten(),
    )
    assert [tuple(x.shape) for x in output.attentions] == [
        (frames, heads, queries, queries)
    ] * config.num_decoder_layers
    # The first layer reads the stride-32 map.
    assert tuple(output.cross_attentions[0].shape) == (frames, heads, queries, 2 * 3)
    for weights in (*output.attentions, *output.cross_attentions):
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:-1]))
    assert plain.hidden_states is None and plain.attentions is None


def test_a_step_gives_hidden_states_when_the_configuration_says_so(eager_model, pixels):
    eager_model.config.output_hidden_states = True
    with torch.no_grad():
        step = eager_model.step(pixels[:, 0])
        whole = eager_model(pixels[:, :1])
    assert [x.shape for x in step.hidden_states] == [x.shape for x in whole.hidden_states]
    torch.testing.assert_close(step.hidden_states[-1], whole.hidden_states[-1])


def test_attentions_that_are_never_computed_are_warned_of(tiny_model, pixels, caplog):
    from transformers.utils import logging

    logging.get_logger("ausm_hf").warning_once.cache_clear()
    logging.enable_propagation()
    try:
        assert tiny_model.config._attn_implementation == "sdpa"
        with torch.no_grad():
            output = tiny_model(pixels, output_attentions=True)
    finally:
        logging.disable_propagation()
    assert output.attentions == () and "set_attn_implementation('eager')" in caplog.text


def test_trainer_evaluates(tiny_model, tmp_path):
    """It asks for the loss where all arguments that are called labels are given."""
    from transformers import Trainer, TrainingArguments

    masks = torch.zeros(2, 2, 64, 96)
    masks[0, :, 8:30, 8:40] = masks[1, :, 30:60, 40:90] = 1
    clip = {
        "pixel_values_videos": torch.randn(2, 3, 64, 96),
        "mask_labels": masks,
        "class_labels": torch.tensor([0, 1]),
    }

    def collate(clips):
        batch = {name: [clip[name] for clip in clips] for name in clips[0]}
        return batch | {"pixel_values_videos": torch.stack(batch["pixel_values_videos"])}

    arguments = TrainingArguments(
        str(tmp_path),
        remove_unused_columns=False,
        eval_do_concat_batches=False,
        per_device_eval_batch_size=1,
        report_to=[],
        use_cpu=True,
    )
    trainer = Trainer(
        copy.deepcopy(tiny_model),
        arguments,
        data_collator=collate,
        eval_dataset=[clip] * 2,
        compute_metrics=lambda predicted: {"batches": len(predicted.predictions), "outputs": predicted.predictions},
    )
    found = trainer.evaluate()
    assert found["eval_loss"] > 0 and found["eval_batches"] == 2
    masks, classes, foreground = found["eval_outputs"][0][:3]
    assert masks.shape[:2] == classes.shape[:2] == foreground.shape[:2] == (1, 2)


def test_plain_tuples(tiny_model, pixels):
    model = copy.deepcopy(tiny_model)
    with torch.no_grad():
        wanted = model(pixels)
        assert isinstance(model(pixels, return_dict=False), tuple)
        model.config.return_dict = False
        found = model(pixels)
        assert isinstance(model.model(pixels), tuple)
        # A stream goes on all the same.
        assert model.step(pixels[:, 0]).history is not None
    assert isinstance(found, tuple)
    torch.testing.assert_close(found[0], wanted.masks_queries_logits)


@pytest.mark.parametrize(
    "change, labels",
    [
        ({"label_sets": {"traffic": ["car", "bus", "tram"]}}, ["car", "bus", "tram"]),
        ({"num_labels": 3}, ["LABEL_0", "LABEL_1", "LABEL_2"]),
        ({"id2label": {0: "car", 1: "bus", 2: "tram"}}, ["car", "bus", "tram"]),
    ],
)
def test_other_labels_get_a_fresh_head(change, labels, saved, tiny_model, pixels):
    model = AutoModelForUniversalSegmentation.from_pretrained(saved, **change, ignore_mismatched_sizes=True)
    assert model.config.id2label == dict(enumerate(labels)) and model.config.num_labels == 3
    assert model.config.label_sets[model.config.default_label_set] == labels
    with torch.no_grad():
        wanted, found = tiny_model(pixels), model(pixels)
    assert found.class_queries_logits.shape[-1] == 4
    assert found.class_queries_logits.isfinite().all()
    torch.testing.assert_close(found.foreground_queries_logits, wanted.foreground_queries_logits)


def test_labels_are_never_passed_over(tmp_path):
    config = AusmConfig.from_preset("nano", id2label={0: "fish", 1: "crab"})
    assert config.label_sets == {"coco": ["fish", "crab"], "object": ["object"]} and config.num_labels == 2
    values = config.to_dict()
    assert AusmConfig(**{**values, "default_label_set": "object"}).id2label == {0: "object"}
    with pytest.raises(ValueError, match="different labels: give one, or the same in both"):
        AusmConfig(**{**values, "id2label": {0: "cod"}})
    config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"0": "fish"', '"0": "cod"'))
    with pytest.raises(ValueError, match="different labels: give one, or the same in both"):
        AusmConfig.from_pretrained(tmp_path)


class LowRank(nn.Module):
    """As peft puts in place of a linear layer."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.down = nn.Linear(base_layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, base_layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


@pytest.mark.parametrize("mixer", ["mamba", "mamba2"])
def test_all_linear_layers_take_adapters(mixer):
    model = AusmForUniversalSegmentation(AusmConfig.from_preset("nano", temporal_mixer=mixer)).eval()
    frame = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        wanted = model.step(frame).masks_queries_logits
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        for name in linear:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, LowRank(model.get_submodule(name)))
        assert len(linear) > 10 and torch.equal(model.step(frame).masks_queries_logits, wanted)


@pytest.mark.parametrize(
    ("preset", "blocks"), [("nano", "EfficientNetLiteBlock"), ("tiny", "AusmDeformableEncoderLayer")]
)
def test_blocks_that_must_stay_whole_are_there(preset, blocks):
    with torch.device("meta"):
        model = AusmForUniversalSegmentation(AusmConfig.from_preset(preset))
    assert {blocks, "AusmCompressorLayer"} <= set(model._no_split_modules)
    assert set(model._no_split_modules) <= {type(module).__name__ for module in model.modules()}  # Accelerate looks


def test_a_network_that_only_plays_at_computing_leaves_no_trace(tiny_model):
    frame = torch.randn(1, 3, 32, 224)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        AusmForUniversalSegmentation(tiny_model.config).eval().step(torch.rand(1, 3, 32, 224))
    with torch.no_grad():
        assert tiny_model.step(frame).masks_queries_logits.isfinite().all()


def test_labels_agree_however_they_are_set():
    config = AusmConfig(label_sets={"pets": ["cat", "dog"], "cars": ["car"]})
    assert config.default_label_set == "pets" and config.label2id == {"cat": 0, "dog": 1}
    config.default_label_set = "cars"
    assert config.id2label == {0: "car"}
    config.num_labels = 2
    assert config.label_sets == {"pets": ["cat", "dog"], "cars": ["LABEL_0", "LABEL_1"]}
    config.label_sets = {"fish": ["cod"]}
    assert config.default_label_set == "fish" and config.id2label == {0: "cod"}
    assert AusmConfig(**config.to_dict()).to_dict() == config.to_dict()
    with pytest.raises(ValueError, match="`id2label` must number"):
        config.id2label = {0: "cod", 2: "eel"}


def test_backbones_without_the_attention_asked_for(tmp_path):
    """A ResNet has no attention at all, and transformers refuses to be asked for any particular one."""
    stages = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 8, 8], "embedding_size": 8}
    config = AusmConfig.from_preset(
        "nano",
        backbone_config={"model_type": "resnet", **stages, "out_features": ["stage1", "stage2", "stage3", "stage4"]},
    )
    AusmModel(config).save_pretrained(tmp_path)
    model = AusmModel.from_pretrained(tmp_path, attn_implementation="sdpa")
    assert model.config._attn_implementation == "sdpa"


def test_it_does_not_generate(tiny_model):
    assert not tiny_model.can_generate()
    assert not isinstance(tiny_model.get_output_embeddings(), nn.Module)


@pytest.mark.slow
def test_a_compiled_model_takes_the_frames_of_a_stream(tiny_model):
    torch.manual_seed(0)
    pixels = torch.randn(3, 3, 64, 96)

    def outputs(model):
        session = AusmInferenceSession(foreground_threshold=0.01, find_new_objects=True, seed=0)
        session.add_prompts(0, [5], [ObjectPrompt(box=(5, 5, 50, 50))], (64, 96))
        return [model(inference_session=session, frame=frame) for frame in pixels]

    wanted, found = outputs(tiny_model), outputs(torch.compile(copy.deepcopy(tiny_model), backend="eager"))
    for a, b in zip(wanted, found, strict=True):
        assert a.object_ids == b.object_ids
        torch.testing.assert_close(a.pred_masks, b.pred_masks, atol=1e-4, rtol=1e-4)
    assert any(len(output.object_ids) > 1 for output in wanted)


@pytest.mark.slow
def test_compiled_equals_eager(tiny_model, pixels):
    model = copy.deepcopy(tiny_model)
    compiled = torch.compile(model.model, backend="eager", fullgraph=False)
    with torch.no_grad():
        wanted = model.model(pixels, output_hidden_states=True)
        found = compiled(pixels, output_hidden_states=True)
    torch.testing.assert_close(found.masks_queries_logits, wanted.masks_queries_logits, atol=1e-5, rtol=1e-5)
    assert len(found.hidden_states) == len(wanted.hidden_states)
