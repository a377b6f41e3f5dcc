import copy
import json
import multiprocessing
import os
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from transformers import Mask2FormerConfig

from ausm_hf import AusmConfig, AusmForUniversalSegmentation
from ausm_hf.training import checkpoint as checkpoint_module
from ausm_hf.training import recipe_from_dict, train
from ausm_hf.training.checkpoint import checkpoints, restore_rng_state, rng_state
from ausm_hf.training.loop import build_config, build_model, load_batches


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def log_lines(output_dir):
    return [json.loads(line) for line in (output_dir / "log.jsonl").read_text().splitlines()]


def test_a_run_learns_and_leaves_its_files(tiny, tmp_path):
    final = tiny.run(tmp_path / "run", "optim.max_steps=30", "ema_decay=0.9", "log_every=10")
    assert final == tmp_path / "run" / "final"
    lines = log_lines(tmp_path / "run")
    assert [line["step"] for line in lines] == [10, 20, 30]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert {"loss", "mask", "grad_norm", "lr", "frames_per_second"} <= lines[0].keys()
    # The newest two of step 4, 8, .. 28 and the last one.
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["step-00000028", "step-00000030"]
    # `from_pretrained` reads both the result, which is the moving average, and a checkpoint.
    average = tiny.TinyModel.from_pretrained(final).state_dict()
    assert_same(average, tiny.TinyModel.from_pretrained(checkpoints(tmp_path / "run")[-1] / "ema").state_dict())
    trained = tiny.TinyModel.from_pretrained(checkpoints(tmp_path / "run")[-1]).state_dict()
    assert not torch.equal(average["head.weight"], trained["head.weight"])
    assert tiny.make_recipe(tmp_path / "run").output_dir in (tmp_path / "run" / "recipe.yaml").read_text()
    assert not [p for p in (tmp_path / "run").rglob("*") if p.suffix in (".bin", ".pt", ".pkl", ".pth")]


def test_the_log_says_how_long_the_loader_was_waited_for(tiny, tmp_path):
    class SlowClips(tiny.TinyClips):
        def __getitem__(self, index):
            time.sleep(0.3)
            return super().__getitem__(index)

    for name, clips in (("slow", SlowClips()), ("fast", tiny.TinyClips())):
        model = tiny.TinyModel(tiny.TinyConfig())
        recipe = tiny.make_recipe(tmp_path / name, "optim.max_steps=3", "log_every=3")
        train(recipe, model=model, dataset=clips, collator=tiny.collate)
    shares = [log_lines(tmp_path / name)[0]["waiting_for_data"] for name in ("slow", "fast")]
    assert 1 > shares[0] > max(0.5, 1.5 * shares[1]) and shares[1] > 0


def test_resuming_is_bit_equal(tiny, tmp_path):
    """With dropout, corruption, workers and a moving average: stopped after 8 of 12 steps, against never stopped."""
    options = ("history_corruption=0.5", "ema_decay=0.9", "optim.schedule=constant")
    tiny.run(tmp_path / "a", *options)
    tiny.run(tmp_path / "b", *options, "optim.max_steps=7")
    torch.rand(3), random.random()
    tiny.run(tmp_path / "b", *options, "data.workers=1")
    a, b = (checkpoints(tmp_path / run)[-1] for run in "ab")
    assert a.name == b.name == "step-00000012"
    for file in ("model.safetensors", "ema/model.safetensors", "optimizer.safetensors", "rng-00000.safetensors"):
        assert_same(load_file(a / file), load_file(b / file))
    for run in "ab":
        assert [line["step"] for line in log_lines(tmp_path / run)] == list(range(1, 13))
    assert [line["loss"] for line in log_lines(tmp_path / "a")] == [line["loss"] for line in log_lines(tmp_path / "b")]


def test_killed_at_random_moments_it_ends_with_the_same_weights(tiny, tmp_path):
    """SIGKILL in a step, while a checkpoint is written, or while an old one is removed; then the same call again."""
    options = ("optim.max_steps=24", "save_every=2", "history_corruption=0.5", "ema_decay=0.9")
    whole = tiny.run(tmp_path / "whole", *options)
    killed = tmp_path / "killed"
    moments = random.Random()
    # Forked, so that a life costs no imports.
    context = multiprocessing.get_context("fork")
    for _ in range(4):
        life = context.Process(target=tiny.run, args=(killed, *options))
        before = checkpoints(killed)
        life.start()
        while life.is_alive() and checkpoints(killed) == before:
            time.sleep(0.002)
        time.sleep(moments.random() * 0.2)
        life.kill()
        life.join()
        assert checkpoints(killed)
    assert_same(weights(whole), weights(tiny.run(killed, *options)))


@pytest.mark.parametrize("moment", ["model", "optimizer", "publish"])
def test_a_half_written_checkpoint_is_never_picked_up(tiny, tmp_path, monkeypatch, moment):
    """The process dies while it writes the checkpoint of step 8."""
    with monkeypatch.context() as patch:
        if moment == "model":
            original = tiny.TinyModel.save_pretrained

            def dying(self, folder, **kwargs):
                original(self, folder, **kwargs)
                if "00000008" in str(folder):
                    raise KeyboardInterrupt

            patch.setattr(tiny.TinyModel, "save_pretrained", dying)
        elif moment == "optimizer":
            original_save = checkpoint_module.save_file

            def dying_save(tensors, path):
                original_save(tensors, path)
                if "00000008" in str(path):
                    Path(path).write_bytes(Path(path).read_bytes()[:100])
                    raise KeyboardInterrupt

            patch.setattr(checkpoint_module, "save_file", dying_save)
        else:
            original_publish = checkpoint_module.FolderOnDisk._publish

            def dying_publish(self):
                if self.path.name == "step-00000008":
                    raise KeyboardInterrupt
                original_publish(self)

            patch.setattr(checkpoint_module.FolderOnDisk, "_publish", dying_publish)
        with pytest.raises(KeyboardInterrupt):
            tiny.run(tmp_path / "run")
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["step-00000004"]
    assert not list((tmp_path / "run").glob(".*"))
    tiny.run(tmp_path / "run")
    tiny.run(tmp_path / "whole")
    assert_same(weights(tmp_path / "run" / "final"), weights(tmp_path / "whole" / "final"))


def test_what_a_killed_run_left_is_removed_and_nothing_else(tiny, tmp_path):
    run = tmp_path / "run"
    for folder in (".step-00000008.partial-0123abcd", ".step-00000002.old-0123abcd", ".venv.old", ".notes.tmp"):
        (run / folder / "in it").mkdir(parents=True)
    for file in (".recipe.partial-0123abcd.yaml", ".my.partial-file", ".env"):
        (run / file).touch()
    tiny.run(run)
    assert sorted(path.name for path in run.glob(".*")) == [".env", ".my.partial-file", ".notes.tmp", ".venv.old"]


def test_the_newest_checkpoints_are_kept(tiny, tmp_path):
    tiny.run(tmp_path / "run", "save_every=2", "keep_checkpoints=3")
    assert [p.name for p in checkpoints(tmp_path / "run")] == [f"step-000000{n:02d}" for n in (8, 10, 12)]


def test_a_checkpoint_of_another_network_is_refused(tiny, tmp_path):
    tiny.run(tmp_path / "run", "optim.max_steps=1")
    with pytest.raises(ValueError, match="^ema_decay: .*use another output_dir"):
        tiny.run(tmp_path / "run", "ema_decay=0.9")
    # The file says what was trained, not what was tried.
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["ema_decay"] is None
    checkpoint = checkpoints(tmp_path / "run")[0]
    tensors = weights(checkpoint)
    tensors["stranger"] = torch.zeros(1)
    checkpoint_module.save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(ValueError, match="^model: .*stranger"):
        tiny.run(tmp_path / "run")


def files(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_is_left_as_it_is(tiny, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    recipe = tiny.make_recipe(run, "optim.max_steps=3")
    sources = [{"dataset": "davis", "strides": (1, 2)}], [{"strides": [1, 2], "dataset": "davis"}]
    for recipe.data.sources in sources:  # the same
        train(recipe, model=tiny.TinyModel(tiny.TinyConfig()), dataset=tiny.TinyClips(), collator=tiny.collate)
    assert "nothing to train" in capsys.readouterr().out
    shutil.rmtree(run)
    final = tiny.run(run, "optim.max_steps=3")
    left = files(run)
    with monkeypatch.context() as patch:
        patch.setattr("ausm_hf.training.loop.build_optimizer", None)
        monkeypatch.chdir(tmp_path)
        assert tiny.run(Path("run"), "optim.max_steps=3") == Path("run/final")
        said = capsys.readouterr().out
        assert "nothing to train: run holds the finished run of this recipe; want another output_dir, or" in said
        with pytest.raises(
            ValueError, match="^output_dir: .* other values of data.batch_size, optim.lr; want another"
        ):
            tiny.run(run, "optim.max_steps=2", "optim.lr=0.5", "data.batch_size=1")
    assert files(run) == left
    tiny.run(run, "optim.max_steps=4", "optim.lr=0.5")  # goes on
    assert "going on from" in (said := capsys.readouterr().out) and " with other values of optim.lr\n" in said
    with pytest.raises(ValueError, match="^output_dir: .* a run that had other values of model.preset; want another"):
        tiny.run(run, "optim.max_steps=5", "model.preset=tiny")
    assert [line["step"] for line in log_lines(run)] == [1, 2, 3, 4]
    assert_same(weights(final), weights(run / "step-00000004"))


@pytest.mark.parametrize("older", [False, True])
def test_a_run_that_lacks_only_its_result_gets_it(tiny, tmp_path, capsys, older):
    """It was killed after its last checkpoint; perhaps it went on from a shorter run, whose result is still there."""
    final = tiny.run(tmp_path / "run", "optim.max_steps=3")
    wanted = weights(final)
    if older:
        checkpoint_module.save_file({"old": torch.zeros(1)}, final / "model.safetensors")
        os.utime(final, (0, 0))
    else:
        shutil.rmtree(final)
    tiny.run(tmp_path / "run", "optim.max_steps=3")
    assert_same(weights(final), wanted)
    assert "nothing to train" not in capsys.readouterr().out


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_wrong_with_a_clip_is_said_as_it_was_said(tiny, tmp_path, workers):
    class BrokenClips(tiny.TinyClips):
        def __getitem__(self, index):
            if index == 3:
                raise ValueError("mask 3 is broken;\nit has no end")
            return super().__getitem__(index)

    recipe = tiny.make_recipe(tmp_path / "run", f"data.workers={workers}")
    model = tiny.TinyModel(tiny.TinyConfig())
    with pytest.raises(ValueError) as error:
        train(recipe, model=model, dataset=BrokenClips(), collator=tiny.collate)
    assert str(error.value) == "mask 3 is broken;\nit has no end"
    if workers:
        assert "in __getitem__" in str(error.value.__cause__)


def test_rng_states_come_back(tmp_path):
    state = rng_state()
    checkpoint_module.save_file(state["tensors"], tmp_path / "rng-00000.safetensors")
    (tmp_path / "rng-00000.json").write_text(json.dumps(state["values"]))

    def draw():
        return random.random(), random.gauss(0, 1), np.random.randn(3).tolist(), torch.rand(3).tolist()  # noqa: NPY002

    drawn = draw()
    assert draw() != drawn
    restore_rng_state(tmp_path, 0)
    assert draw() == drawn


@pytest.mark.parametrize("options", [(), ("mode=iterative",), ("carried_state=3",)], ids=["", "iterative", "carried"])
def test_accumulation_equals_a_larger_batch(tiny, tiny_model, tmp_path, options):
    """
    Although the clips have one to three objects, each of them away in some frames. The network is in float64: in
    float32 rounding alone takes some processors past the tolerance.
    """

    def gradients_and_loss(output_dir, *division):
        network = copy.deepcopy(tiny_model).double().train().requires_grad_(True)
        plain = ("optim.clip_grad_norm=null", "data.size=[64, 64]", "optim.max_steps=1")
        recipe = tiny.make_recipe(output_dir, *plain, *division, *options)
        train(recipe, model=network, dataset=tiny.TinyClips(size=64), collator=tiny.collate)
        moments = load_file(checkpoints(output_dir)[-1] / "optimizer.safetensors")
        gradients = {name: 10 * value for name, value in moments.items() if name.startswith("exp_avg:")}
        return gradients, log_lines(output_dir)[0]["loss"]

    wanted, loss = gradients_and_loss(tmp_path / "a", "data.batch_size=4")
    got, same_loss = gradients_and_loss(tmp_path / "b", "data.batch_size=1", "gradient_accumulation_steps=4")
    assert max(value.abs().max() for value in wanted.values()) > 0.1
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, atol=1e-6, rtol=1e-4)
    assert same_loss == pytest.approx(loss, abs=1.1e-4)  # 38.5016, logged to six digits: one unit of the last


def test_clips_of_a_step_do_not_depend_on_how_they_are_divided(tiny, tmp_path):
    def clips(rank, processes, *overrides, first_step=0):
        recipe = tiny.make_recipe(tmp_path, "optim.max_steps=3", *overrides)
        batches = load_batches(recipe, tiny.TinyClips(), tiny.collate, first_step, rank, processes)
        return [numbers for numbers, _ in batches]

    whole = clips(0, 1, "data.batch_size=4")
    assert whole == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert clips(0, 1, "data.batch_size=4", first_step=1) == whole[1:]
    first, second = clips(0, 2, "data.batch_size=2"), clips(1, 2, "data.batch_size=2")
    assert [a + b for a, b in zip(first, second)] == whole
    halves = clips(0, 1, "data.batch_size=2", "gradient_accumulation_steps=2")
    assert [a + b for a, b in zip(halves[::2], halves[1::2])] == whole


def test_corruption_reaches_the_history_alone(tiny, tmp_path):
    seen = {}

    class Watching(tiny.TinyModel):
        def forward(self, **inputs):
            seen.update(inputs)
            return super().forward(**inputs)

    recipe = tiny.make_recipe(tmp_path / "run", "history_corruption=1.0", "optim.max_steps=1")
    model = Watching(tiny.TinyConfig())
    train(recipe, model=model, dataset=tiny.TinyClips(), collator=tiny.collate)
    clips = tiny.TinyClips()
    for i in range(2):
        assert torch.equal(seen["mask_labels"][i], clips[i]["masks"])
        assert not torch.equal(seen["history_masks"][i], clips[i]["masks"])


def test_lasting_errors_reach_the_history(tiny, tmp_path, monkeypatch):
    """The same run with and without them; nothing else is drawn after them."""
    histories = []

    class Watching(tiny.TinyModel):
        def forward(self, **inputs):
            histories.append(inputs["history_masks"])
            return super().forward(**inputs)

    def run(name):
        recipe = tiny.make_recipe(
            tmp_path / name, "history_corruption=1.0", "switch_frame_prompt_probability=1.0", "optim.max_steps=4"
        )
        train(recipe, model=Watching(tiny.TinyConfig()), dataset=tiny.TinyClips(), collator=tiny.collate)

    run("with")
    monkeypatch.setattr("ausm_hf.training.loop.add_lasting_errors", lambda masks, *args: masks)
    run("without")
    assert len(histories) == 8
    pairs = zip(sum(histories[:4], []), sum(histories[4:], []))
    assert any(not torch.equal(mine, other) for mine, other in pairs)


def test_a_frozen_backbone_stays(tiny, tmp_path):
    torch.manual_seed(0)
    before = tiny.TinyModel(tiny.TinyConfig()).state_dict()
    after = weights(tiny.run(tmp_path / "run", "freeze_backbone=true", "optim.max_steps=3"))
    for name in before:
        assert torch.equal(before[name], after[name]) == name.startswith("backbone."), name


def test_evaluation_is_called_and_logged(tiny, tmp_path):
    calls = []

    def evaluate(model, step, output_dir):
        calls.append((step, model.training, torch.is_grad_enabled()))
        return {"quality": step / 10}

    tiny.run(tmp_path / "run", "eval_every=6", evaluate=evaluate)
    assert calls == [(6, False, False), (12, False, False)]
    assert [line["quality"] for line in log_lines(tmp_path / "run") if "quality" in line] == [0.6, 1.2]


def test_steps_with_a_bad_gradient_are_left_out_and_the_run_stops_if_it_goes_on(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("ausm_hf.training.loop.MAX_SKIPPED_STEPS", 2)
    calls = []
    original = tiny.TinyModel.forward
    bad = {3}

    def sometimes_nan(self, *args, **kwargs):
        output = original(self, *args, **kwargs)
        calls.append(1)
        if len(calls) in bad:
            output["loss"] = output["loss"] * float("nan")
        return output

    monkeypatch.setattr(tiny.TinyModel, "forward", sometimes_nan)
    final = tiny.run(tmp_path / "run", "optim.max_steps=5")
    assert all(value.isfinite().all() for value in weights(final).values())
    bad.update(range(100))
    calls.clear()
    with pytest.raises(FloatingPointError, match="not finite for 3 steps"):
        tiny.run(tmp_path / "bad")


def test_arguments_that_can_not_work_are_refused_before_anything_is_loaded(tiny, tmp_path):
    with pytest.raises(ValueError, match="^collator:"):
        train(tiny.make_recipe(tmp_path / "run"), dataset=tiny.TinyClips())
    with pytest.raises(ValueError, match="^data: .*got neither"):
        train(tiny.make_recipe(tmp_path / "run"))
    with pytest.raises(ValueError, match="^model: .*got neither"):
        train(tiny.make_recipe(tmp_path / "run", "model.preset=null"), dataset=tiny.TinyClips(), collator=tiny.collate)
    with pytest.raises(ValueError, match="^tracker: 'abacus' is not installed"):
        tiny.run(tmp_path / "run", "tracker=abacus")
    assert not (tmp_path / "run").exists()


def test_weights_are_trained_in_float32_whatever_they_are_stored_in(tiny, tiny_model, tmp_path):
    """In bfloat16 most steps would be too small to change a weight."""
    copy.deepcopy(tiny_model).bfloat16().save_pretrained(tmp_path / "half")
    recipe = tiny.make_recipe(tmp_path / "run", "model.preset=null", f"model.path={tmp_path / 'half'}")
    network = build_model(recipe, build_config(recipe))
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


def test_half_precision_that_a_cpu_passes_over_is_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match="mixed_precision: 'fp16' is for GPUs"):
        tiny.run(tmp_path / "run", "mixed_precision=fp16")


def test_parts_of_a_checkpoint_start_anew(tmp_path):
    config = AusmConfig.from_preset("nano")
    trained = AusmForUniversalSegmentation(config)
    for parameter in trained.parameters():
        parameter.data.fill_(0.25)
    trained.save_pretrained(tmp_path / "trained")
    model = {"path": str(tmp_path / "trained"), "reinitialize": ["model.history_encoder.", "model.id_vectors."]}
    recipe = recipe_from_dict(
        {"output_dir": str(tmp_path), "model": model, "data": {"mixture": "nano", "root": str(tmp_path)}}
    )
    network = build_model(recipe, build_config(recipe))
    for name, parameter in network.named_parameters():
        anew = name.startswith(("model.history_encoder.", "model.id_vectors."))
        assert (parameter == 0.25).all() != anew, name
    for layer in network.model.history_encoder.decoder:
        assert torch.equal(layer.cross_attention.q_proj.weight, layer.cross_attention.k_proj.weight)
    recipe.model.overrides = {"num_id_vectors": 7}
    with pytest.raises(ValueError, match="model.overrides: 1 parameters are not in .*model.id_positions"):
        build_model(recipe, build_config(recipe))
    recipe.model.reinitialize = ["model.id_"]
    network = build_model(recipe, build_config(recipe))
    assert len(network.model.id_vectors.weight) == len(network.model.id_positions.weight) == 7
    recipe.model.overrides, recipe.model.reinitialize = {"num_compressor_layers": 2}, []
    with pytest.raises(
        ValueError, match="are not in .* or have other shapes there, such as model.history_encoder.comp"
    ):
        build_model(recipe, build_config(recipe))
    recipe.model.overrides, recipe.model.reinitialize = {}, ["history_encoder."]
    with pytest.raises(ValueError, match="model.reinitialize: the network has no parameter that begins with"):
        build_model(recipe, build_config(recipe))
    recipe.model.reinitialize = []
    stored = load_file(tmp_path / "trained" / "model.safetensors")
    save_file(
        {name: x for name, x in stored.items() if "class_heads" not in name},
        tmp_path / "trained" / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(ValueError, match="are not in .*, such as class_heads.coco."):
        build_model(recipe, build_config(recipe))


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    Mask2FormerConfig().save_pretrained(tmp_path / "other")
    recipe = recipe_from_dict({"output_dir": str(tmp_path), "model": {"path": str(tmp_path / "other")}})
    with pytest.raises(ValueError, match="model.path: .*other is of type 'mask2former', want 'ausm' .*--from"):
        build_config(recipe)


def test_runs_of_other_precision_in_one_process(tiny, tmp_path):
    tiny.run(tmp_path / "a", "optim.max_steps=1")
    tiny.run(tmp_path / "b", "optim.max_steps=1", "mixed_precision=bf16")
    assert AcceleratorState().mixed_precision == "bf16"


def test_what_a_launcher_says_otherwise_is_told_of(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    tiny.run(tmp_path / "a", "optim.max_steps=1")
    assert "mixed_precision is 'no', as the recipe says; not 'bf16'" in capsys.readouterr().out
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(ValueError, match="^gradient_accumulation_steps: ACCELERATE_GRADIENT_ACCUMULATION_STEPS is 4"):
        tiny.run(tmp_path / "b", "optim.max_steps=1")


def test_another_number_of_processes_is_told_of(tiny, tmp_path, capsys):
    tiny.run(tmp_path / "run", "optim.max_steps=4")
    state = checkpoints(tmp_path / "run")[-1] / "state.json"
    state.write_text(state.read_text().replace('"processes": 1', '"processes": 2'))
    capsys.readouterr()
    tiny.run(tmp_path / "run", "optim.max_steps=5")
    assert "step-00000004 in 1 processes instead of 2: unless data.batch_size" in capsys.readouterr().out
