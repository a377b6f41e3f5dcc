"""Two processes (gloo, on the CPU) against one with the same clips per step."""

import copy
import multiprocessing
import os
import shutil
import socket
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, DistributedType, GradientState, PartialState
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file

from ausm_hf.training import train
from ausm_hf.training.checkpoint import checkpoints


def run_process(tiny, network, output_dir, rank, port, overrides, evaluate=None):
    # One thread, as torchrun sets: else Accelerate lets torch take all cores, at which GNU's OpenMP hangs in a fork of
    # a process that has once computed with several threads.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", OMP_NUM_THREADS="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    recipe = tiny.make_recipe(output_dir, *overrides)
    train(recipe, model=network, dataset=tiny.TinyClips(size=64), collator=tiny.collate, evaluate=evaluate)


def run_two(target, *arguments):
    """Two processes that find each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=target, args=(*arguments[:3], rank, port, arguments[3])) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]


@pytest.mark.parametrize("options", [(), ("mode=iterative",)], ids=["parallel", "iterative"])
def test_two_processes_have_the_gradients_of_one(tiny, tiny_model, tmp_path, options):
    options = ("optim.clip_grad_norm=null", "data.size=[64, 64]", "optim.max_steps=1", *options)
    one = copy.deepcopy(tiny_model).train().requires_grad_(True)
    two = copy.deepcopy(one)
    recipe = tiny.make_recipe(tmp_path / "one", "data.batch_size=4", *options)
    train(recipe, model=one, dataset=tiny.TinyClips(size=64), collator=tiny.collate)
    run_two(run_process, tiny, two, tmp_path / "two", ("data.batch_size=2", *options))
    wanted, got = (load_file(checkpoints(tmp_path / n)[-1] / "optimizer.safetensors") for n in ("one", "two"))
    gradients = [name for name in wanted if name.startswith("exp_avg:")]  # 0.1 times the gradient after one step
    assert any(wanted[name].abs().max() > 1e-3 for name in gradients)
    for name in gradients:
        # A class head that is in no batch has no gradient in one process, and one of zeros in two.
        torch.testing.assert_close(got[name], wanted[name], atol=1e-6, rtol=1e-4)
    assert (checkpoints(tmp_path / "two")[-1] / "rng-00001.safetensors").exists()


def run_sharded(tiny, network, output_dir, rank, port, overrides):
    """With the environment that `accelerate launch` makes of the config file.

    Accelerate shards over GPUs only; the CPU, on which torch can do it too, has to be passed off as one.
    """
    config = Path(__file__).parents[2] / "examples" / "accelerate" / "fsdp2.yaml"
    arguments = launch_command_parser().parse_args(["--config_file", str(config), "train.py"])
    environment = prepare_multi_gpu_env(_validate_launch_command(arguments)[0])
    os.environ.update({k: v for k, v in environment.items() if k.startswith(("ACCELERATE_", "FSDP_"))})
    original = AcceleratorState.__init__

    def init(self, *arguments, fsdp_plugin=None, **options):
        original(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init

    def evaluate(judged, step, folder):
        assert rank == 0 and not judged.training
        return {"weights": sum(float(p.abs().sum()) for p in judged.parameters())}  # whole: no other process is asked

    run_process(tiny, network, output_dir, rank, port, overrides, evaluate)
    assert any(isinstance(p, torch.distributed.tensor.DTensor) for p in network.parameters())


def test_sharded_processes_have_the_gradients_of_one_and_go_on_exactly(tiny, tiny_model, tmp_path):
    options = ("optim.schedule=constant", "optim.warmup_steps=0", "data.size=[64, 64]", "save_every=1")
    network = copy.deepcopy(tiny_model).train().requires_grad_(True)

    def sharded(name, steps):
        overrides = ("data.batch_size=2", f"optim.max_steps={steps}", "eval_every=1", *options)
        run_two(run_sharded, tiny, network, tmp_path / name, overrides)

    recipe = tiny.make_recipe(tmp_path / "one", "data.batch_size=4", "optim.max_steps=1", *options)
    train(recipe, model=copy.deepcopy(network), dataset=tiny.TinyClips(size=64), collator=tiny.collate)
    sharded("stopped", 1)
    wanted, got = (load_file(checkpoints(tmp_path / n)[-1] / "optimizer.safetensors") for n in ("one", "stopped"))
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], atol=1e-6, rtol=1e-4)
    # Sharded and other runs go on from each other's checkpoints.
    shutil.copytree(tmp_path / "stopped", tmp_path / "other")
    recipe = tiny.make_recipe(tmp_path / "other", "data.batch_size=4", "optim.max_steps=2", *options)
    train(recipe, model=copy.deepcopy(network), dataset=tiny.TinyClips(size=64), collator=tiny.collate)
    sharded("stopped", 2)
    wanted, got = (load_file(checkpoints(tmp_path / n)[-1] / "optimizer.safetensors") for n in ("other", "stopped"))
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], atol=1e-5, rtol=1e-3)
    sharded("one", 2)
    sharded("whole", 2)
    stopped, whole = (load_file(tmp_path / n / "final" / "model.safetensors") for n in ("stopped", "whole"))
    assert stopped.keys() == whole.keys() and all(torch.equal(stopped[name], whole[name]) for name in whole)
    with pytest.raises(AssertionError):  # the recipe is refused in both processes
        run_two(run_sharded, tiny, network, tmp_path / "average", ("ema_decay=0.9", *options))
    sampling = ("scheduled_sampling=0.5", "scheduled_sampling_form=iterative")
    with pytest.raises(AssertionError):
        run_two(run_sharded, tiny, network, tmp_path / "average", (*sampling, *options))
    assert not (tmp_path / "average").exists()
    assert checkpoints(tmp_path / "one")[-1].name == "step-00000002"
