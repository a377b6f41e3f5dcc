"""The step as a graph of fixed shapes: torch.export, ONNX, and every slot in use or not."""

import copy
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_backbones import TINY_SWIN

from ausm_hf import (
    AusmConfig,
    AusmForUniversalSegmentation,
    AusmHistory,
    AusmImageProcessor,
    AusmInferenceSession,
    AusmProcessor,
    VideoWriter,
    load_model,
    read_video,
    segment_video,
)
from ausm_hf.cli import main
from ausm_hf.model import identities_ausm, masks_ausm
from ausm_hf.onnx_export import StreamingStep, export_onnx, export_step

BACKBONE = {
    "model_type": "efficientnet_lite",
    "stem_width": 8,
    "widths": [8, 8, 16, 16, 24],
    "depths": [1, 1, 1, 1, 1],
    "kernel_sizes": [3, 3, 5, 3, 5],
    "strides": [1, 2, 2, 2, 2],
    "expand_ratios": [1, 2, 2, 2, 24],  # the last kernel is too large for the exporter to compute with, as in nano
}


def small_model(num_decoder_layers: int = 3, backbone: dict = BACKBONE) -> AusmForUniversalSegmentation:
    """The nano network, but with fewer layers and channels."""
    torch.manual_seed(0)
    config = AusmConfig.from_preset(
        "nano",
        backbone_config=backbone,
        hidden_size=32,
        mask_feature_size=16,
        mask_refinement_layers=2,
        num_compressor_layers=1,
        num_history_decoder_layers=1,
        history_feedforward_size=32,
        num_decoder_layers=num_decoder_layers,
        mask_propagation_radius=2,
        remember_appearance=True,
        decoder_feedforward_size=32,
        num_id_vectors=6,
        num_detection_queries=5,
        label_sets={"object": ["object"], "pets": ["cat", "dog"]},
    )
    model = AusmForUniversalSegmentation(config).eval()
    torch.nn.init.normal_(model.model.pixel_decoder.mask_embedder[-1].weight)  # decided masks, not all near zero
    return model


def follow(step, inputs: dict, frames, marked: dict[int, np.ndarray]):
    """Runs `step(inputs)` over the frames, each marked column's own mask fed back. Yields its outputs by name."""
    for index, frame in enumerate(frames):
        if index == 0:
            for column, mask in marked.items():
                inputs["taken"][0, column], inputs["masks"][0, column] = True, mask
        inputs["pixel_values"] = frame
        outputs = step(inputs)
        inputs = inputs | {name.removeprefix("next_"): x for name, x in outputs.items() if name.startswith("next_")}
        inputs["started"] = np.ones(1, dtype=bool)
        columns = list(marked)
        logits = outputs["mask_logits"][0, columns]
        inputs["masks"] = np.zeros_like(inputs["masks"])
        inputs["masks"][0, columns] = (logits > 0) & (logits == logits.max(0))
        yield outputs


def torch_step(step: StreamingStep, function=None):
    def run(inputs):
        with torch.no_grad():
            outputs = (function or step)(*(torch.from_numpy(x) for x in inputs.values()))
        return dict(zip(step.output_names(), (x.numpy() for x in outputs)))

    return run


def onnx_step(path):
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options)
    names = [output.name for output in session.get_outputs()]
    return session, lambda inputs: dict(zip(names, session.run(None, inputs)))


def zeros(step: StreamingStep, height: int, width: int) -> dict[str, np.ndarray]:
    return {name: x.numpy().copy() for name, x in step.first_inputs(height, width).items()}


def squares(height: int, width: int) -> dict[int, np.ndarray]:
    masks = {column: np.zeros((height // 4, width // 4), np.float32) for column in (4, 1)}
    masks[4][2:8, 3:9] = 1
    masks[1][6:12, 12:20] = 1
    return masks


def test_all_slots_give_what_the_ragged_step_gives():
    model = small_model()
    step = StreamingStep(model)
    frames = torch.randn(4, 1, 3, 64, 96)
    marked = squares(64, 96)
    slots, history = torch.tensor([list(marked)]), model.init_history(1)
    masks = torch.from_numpy(np.stack(list(marked.values())))[None]
    queries = [*marked, *range(6, 11)]
    for frame, fixed in zip(frames, follow(torch_step(step), zeros(step, 64, 96), frames.numpy(), marked)):
        with torch.no_grad():
            ragged = model.step(frame, history.replace_objects(slots, torch.ones_like(slots).bool(), masks))
        for name, tensor in [
            ("mask_logits", ragged.masks_queries_logits),
            ("class_logits", ragged.class_queries_logits),
            ("foreground_logits", ragged.foreground_queries_logits),
        ]:
            torch.testing.assert_close(torch.from_numpy(fixed[name])[:, queries], tensor, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(torch.from_numpy(fixed["next_ssm_state_0"]), ragged.history.states[0][1])
        history, logits = ragged.history, ragged.masks_queries_logits[:, :2]
        masks = ((logits > 0) & (logits == logits.amax(1, keepdim=True))).float()
        assert masks.any()


@pytest.mark.parametrize("backbone", [BACKBONE, pytest.param(TINY_SWIN, marks=pytest.mark.slow)], ids=["lite", "swin"])
def test_onnx_gives_the_same(tmp_path, backbone):
    """torch.export, which comes before it, refuses whatever would read a number back from the device."""
    pytest.importorskip("onnxscript")
    model, processor = small_model(1, backbone), AusmProcessor(AusmImageProcessor())
    attention = model.model.backbone.config._attn_implementation
    step = StreamingStep(model, num_slots=5, label_set="pets")
    export_onnx(model, processor, tmp_path / "step.onnx", 64, 96, num_slots=5, label_set="pets")
    assert [path.name for path in tmp_path.iterdir()] == ["step.onnx"]
    assert model.model.backbone.config._attn_implementation == attention
    session, run = onnx_step(tmp_path / "step.onnx")
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["labels"]) == ["cat", "dog"]
    assert json.loads(metadata["image_mean"]) == processor.image_processor.image_mean
    assert [x.name for x in session.get_inputs()] == list(step.first_inputs(64, 96))
    assert_same(step, run)


@pytest.mark.slow
def test_exported_step_gives_the_same():
    step = StreamingStep(small_model(), num_slots=5, label_set="pets")
    exported = export_step(step, 64, 96).module()
    assert_same(step, torch_step(step, exported))


def assert_same(step: StreamingStep, run):
    frames = torch.randn(3, 1, 3, 64, 96).numpy()
    runs = [follow(one, zeros(step, 64, 96), frames, squares(64, 96)) for one in (torch_step(step), run)]
    for expected, got in zip(*runs):
        assert expected["class_logits"].shape == (1, 10, 3)
        for name, value in expected.items():
            np.testing.assert_allclose(got[name], value, atol=1e-4, rtol=1e-4, err_msg=name)


def test_compiler_sees_one_graph():
    """Nothing in the step depends on numbers: no break in the graph, and no wait for the device."""
    model = small_model(num_decoder_layers=1)
    compiled = torch.compile(model.step, fullgraph=True, backend="eager")
    history = model.init_history(1).replace_objects(
        torch.arange(6)[None], torch.tensor([[True, False, True, True, False, False]]), torch.ones(1, 6, 16, 24)
    )
    with torch.no_grad():
        for frame in torch.randn(2, 1, 3, 64, 96):
            eager, graph = model.step(frame, history), compiled(frame, history)
            torch.testing.assert_close(graph.masks_queries_logits, eager.masks_queries_logits)
            history = eager.history


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_slots": 7}, "num_slots is 7; wanted is 1 to 6"),
        ({"label_set": "birds"}, "label_set is 'birds'; wanted is one of"),
        ({"height": 60}, "size is 60 x 96; wanted are multiples of 32"),
        ({"model": torch.float16}, "model is in torch.float16"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, tmp_path):
    model = small_model().to(arguments.pop("model", torch.float32))
    with pytest.raises(ValueError, match=message):
        export_onnx(model, None, tmp_path / "x.onnx", **{"height": 64, "width": 96, **arguments})
    assert not list(tmp_path.iterdir())


def test_the_step_is_where_the_model_is(tiny_model):
    step = StreamingStep(copy.deepcopy(tiny_model).to("meta"))
    assert {tensor.device.type for tensor in step.first_inputs(32, 64).values()} == {"meta"}
    assert step.slots.device.type == "meta"


def test_command_refuses_a_size_before_it_exports(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["export-onnx", str(tmp_path / "x.onnx"), "--size", "60", "96"])
    assert stop.value.code == 2 and "size is 60 x 96; wanted are multiples of 32" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_is_not_installed_is_named_before_the_work(tiny_checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setattr("ausm_hf.onnx_export.export_step", lambda *_: pytest.fail("it began to export"))
    with pytest.raises(SystemExit) as stop:
        main(["export-onnx", str(tmp_path / "x.onnx"), "--size", "64", "96", "--model", str(tiny_checkpoint)])
    assert stop.value.code == 2 and 'pip install "ausm-hf[onnx]"' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_compiled_step_equals_eager():
    model = small_model()
    step = StreamingStep(model)
    compiled = torch.compile(model.step, fullgraph=True)
    with torch.no_grad():
        masks = (torch.rand_like(step.first_inputs(64, 96)["masks"]) > 0.8).float()
        marked = AusmHistory(None, None, step.slots, torch.tensor([[True, False, True, True, False, False]]), masks)
        history = model.step(torch.randn(1, 3, 64, 96), marked).history  # the first frame would be a graph of its own
        history = history.replace_objects(marked.slots, marked.taken, masks)
        for frame in torch.randn(3, 1, 3, 64, 96):
            eager, fast = model.step(frame, history), compiled(frame, history)
            for name in ("masks_queries_logits", "class_queries_logits", "foreground_queries_logits"):
                torch.testing.assert_close(fast[name], eager[name], atol=1e-4, rtol=1e-4)
            history = eager.history
            for name, tensor in history.tensors().items():
                torch.testing.assert_close(fast.history.tensors()[name], tensor, atol=1e-4, rtol=1e-4)


def clip_of(shared_data, number: int, processor) -> list[np.ndarray]:
    """The first frames of a real clip, preprocessed."""
    frames = itertools.islice(read_video(shared_data / "clips" / "woman_and_dog.mp4"), number)
    return [processor(images=frame)["pixel_values"].numpy() for frame in frames]


def found_in(model, frame: np.ndarray, columns: list[int]) -> dict[int, np.ndarray]:
    """Masks to follow: the surest detections of the network itself in a frame."""
    with torch.no_grad():
        output = model.step(torch.from_numpy(frame))
    order = output.foreground_queries_logits[0].argsort(descending=True)
    masks = [mask.float().numpy() for mask in output.masks_queries_logits[0, order] > 0 if mask.any()]
    return dict(zip(columns, masks))


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / max((a | b).sum(), 1)


@pytest.fixture(scope="module")
def nano(shared_data, tmp_path_factory):
    """The bundled checkpoint, its processor, and its step as an ONNX file for the frames of the real clip."""
    pytest.importorskip("onnxscript")
    model, processor = load_model(device="cpu", dtype="float32")
    path = tmp_path_factory.mktemp("onnx") / "step.onnx"
    main(["export-onnx", str(path), "--like", str(shared_data / "clips" / "woman_and_dog.mp4")])
    return model, processor, path


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_onnx_runtime_gives_the_same_masks_on_a_real_clip(nano, shared_data):
    model, processor, path = nano
    frames = clip_of(shared_data, 50, processor)
    height, width = frames[0].shape[-2:]
    step = StreamingStep(model)
    _, run = onnx_step(path)
    marked = found_in(model, frames[0], [0, 9])
    runs = [follow(one, zeros(step, height, width), frames, marked) for one in (torch_step(step), run)]
    queries = [*marked, *range(model.config.num_id_vectors, model.config.num_id_vectors + 3)]
    for expected, by_onnx in zip(*runs):
        a, b = (x["mask_logits"][0, queries] > 0 for x in (expected, by_onnx))
        assert a[: len(marked)].any()
        assert iou(a, b) > 0.999


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_example_runs_without_torch(nano, shared_data, tmp_path, monkeypatch):
    """`examples/run_onnx.py` on a real clip, marked and unmarked, in a Python that refuses to import torch."""
    pytest.importorskip("onnxruntime")
    model, processor, path = nano

    def first_free(session, number, num_slots, objects):  # as the example takes them; a session draws them
        held = {followed.slot for followed in objects}
        return [slot for slot in range(num_slots) if slot not in held][:number]

    monkeypatch.setattr(AusmInferenceSession, "draw_slots", first_free)
    monkeypatch.setattr(identities_ausm, "BYSTANDER_THRESHOLD", 1.0)  # the example has no bystanders
    # It takes the surest of several detections of an object as it is.
    monkeypatch.setattr(masks_ausm, "main_piece", lambda logits: logits)
    monkeypatch.setattr(masks_ausm, "overlapping", lambda masks, _: torch.eye(len(masks), dtype=torch.bool))
    # As large as the network wants them: Pillow resizes a little otherwise than the processor, and what that changes
    # in a mask comes back with it in the next frame.
    height, width = clip_of(shared_data, 1, processor)[0].shape[-2:]
    with VideoWriter(tmp_path / "short.mp4", 24, (height, width)) as writer:
        for frame in itertools.islice(read_video(shared_data / "clips" / "woman_and_dog.mp4"), 12):
            writer.write(np.asarray(Image.fromarray(frame).resize((width, height))))
    first = next(segment_video(tmp_path / "short.mp4", model, processor))
    assert first.masks.any()
    Image.fromarray(np.uint8(first.masks)).save(tmp_path / "mask.png")

    script = Path(__file__).parents[1] / "examples" / "run_onnx.py"
    code = "import sys, runpy; sys.modules['torch'] = None; runpy.run_path(sys.argv.pop(1))"
    for marked in ([], [str(tmp_path / "mask.png")]):
        arguments = [
            str(script),
            str(path),
            str(tmp_path / "short.mp4"),
            str(tmp_path / "out"),
            *marked,
        ]
        subprocess.run([sys.executable, "-c", code, *arguments], check=True)
        masks = None if not marked else first.masks
        if marked:  # the example has no bystanders
            monkeypatch.setattr(identities_ausm, "without_duplicates", lambda *_: [])
        expected = segment_video(tmp_path / "short.mp4", model, processor, masks)
        overlaps = [
            iou(result.masks > 0, np.array(Image.open(tmp_path / "out" / f"{result.index:05d}.png")) > 0)
            for result in expected
        ]
        assert len(overlaps) == 12 and min(overlaps) > 0.98
    for wrong in (np.uint8(first.masks)[:-8], np.full_like(first.masks, 200, np.uint8)):
        Image.fromarray(wrong).save(tmp_path / "wrong.png")
        arguments = [str(x) for x in (script, path, tmp_path / "short.mp4", tmp_path / "no", tmp_path / "wrong.png")]
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        assert done.returncode == 1
        assert f"wrong.png: wanted are {width} x {height} pixels, one channel, ids to " in done.stderr
        assert not list((tmp_path / "no").iterdir())
