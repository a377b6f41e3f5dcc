"""Two processes (gloo, on the CPU) against one with the same clips per step."""

import copy
import multiprocessing
import os
import socket

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file

from ausm_hf.training import train
from ausm_hf.training.checkpoint import checkpoints


def run_process(tiny, network, output_dir, rank, port, overrides):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    recipe = tiny.make_recipe(output_dir, *overrides)
    train(recipe, model=network, dataset=tiny.TinyClips(size=64), collator=tiny.collate)


@pytest.mark.parametrize("options", [(), ("mode=iterative",)], ids=["parallel", "iterative"])
def test_two_processes_have_the_gradients_of_one(tiny, tiny_model, tmp_path, options):
    options = ("optim.clip_grad_norm=null", "data.size=[64, 64]", "optim.max_steps=1", *options)
    one = copy.deepcopy(tiny_model).train().requires_grad_(True)
    two = copy.deepcopy(one)
    recipe = tiny.make_recipe(tmp_path / "one", "data.batch_size=4", *options)
    train(recipe, model=one, dataset=tiny.TinyClips(size=64), collator=tiny.collate)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    arguments = [(tiny, two, tmp_path / "two", rank, port, ("data.batch_size=2", *options)) for rank in range(2)]
    processes = [context.Process(target=run_process, args=a) for a in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    wanted, got = (load_file(checkpoints(tmp_path / n)[-1] / "optimizer.safetensors") for n in ("one", "two"))
    gradients = [name for name in wanted if name.startswith("exp_avg:")]  # 0.1 times the gradient after one step
    assert any(wanted[name].abs().max() > 1e-3 for name in gradients)
    for name in gradients:
        # A class head that is in no batch has no gradient in one process, and one of zeros in two.
        torch.testing.assert_close(got[name], wanted[name], atol=1e-6, rtol=1e-4)
    assert (checkpoints(tmp_path / "two")[-1] / "rng-00001.safetensors").exists()
