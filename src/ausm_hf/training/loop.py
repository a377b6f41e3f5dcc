"""The training loop. `train(recipe)` is all there is to call; read it from top to bottom."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState, is_initialized
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, gather_object, send_to_device, set_seed
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset, get_worker_info
from tqdm.auto import tqdm

from ausm_hf.data.labels import LABEL_SETS
from ausm_hf.files import remove_unfinished, write_text
from ausm_hf.model.configuration_ausm import AusmConfig
from ausm_hf.model.image_processing_ausm import AusmImageProcessor
from ausm_hf.model.loss_ausm import count_targets, draw_switch_frames
from ausm_hf.model.modeling_ausm import AusmForUniversalSegmentation
from ausm_hf.model.pipeline_ausm import VideoSegmentationPipeline
from ausm_hf.model.processing_ausm import AusmProcessor

from .checkpoint import (
    FolderOnDisk,
    checkpoints,
    gather_network,
    gather_optimizer_state,
    load_training_state,
    no_progress_bars,
    processes_of,
    restore_rng_state,
    rng_state,
    save_checkpoint,
)
from .data import build_data
from .forms import CarriedForm, IterativeForm, RollOut, split_clip
from .history import (
    add_lasting_errors,
    clip_generator,
    corrupt_history,
    draw_prompts,
    sample_history,
)
from .initialization import load_imagenet_weights
from .optimizer import build_optimizer, learning_rate_factor, set_learning_rate
from .recipe import Recipe, recipe_to_dict
from .samples import SampleWriter

# So many optimizer steps in a row may have a gradient that is not finite (they are left out) before the run stops.
MAX_SKIPPED_STEPS = 20


def train(
    recipe: Recipe,
    model: Any = None,
    dataset: Dataset | None = None,
    collator: Callable[[list[dict]], dict] | None = None,
    evaluate: Callable[[Any, int, Path], dict[str, float]] | None = None,
) -> Path:
    """Trains as the recipe says; goes on from the newest checkpoint in `recipe.output_dir` if there is one.

    The call that finished a run does nothing when it comes again.

    The same call works in one process and under `accelerate launch` or `torchrun`. `output_dir` receives

        recipe.yaml             what was trained
        samples/                masks drawn on frames, every `eval_every` steps
        log.jsonl               losses, learning rate, frames per second and the share of the time that the main
                                process waits for its loader, one line every `log_every` steps
        step-00001000/          checkpoints, see `checkpoint.py`
        final/                  the result (the moving average if there is one) for `from_pretrained`

    Args:
        recipe: see `Recipe`.
        model: the network, a `PreTrainedModel`, instead of the one `recipe.model` describes.
        dataset: clips (see `ausm_hf.data`), instead of those `recipe.data` describes. Item i, for any i >= 0, must be
            a function of i alone: that is what makes resuming exact.
        collator: makes a batch of the clips of `dataset`; needed with a `dataset`.
        evaluate: called as `evaluate(model, step, output_dir)` in the main process every `recipe.eval_every` steps;
            the numbers it returns are logged. By default a `SampleWriter`, which draws the masks of a few clips.

    Returns:
        The folder `final`.

    Raises:
        ValueError: the recipe can't work (names the key), or `output_dir` holds a run that is finished, of another
            recipe, or one of another network; before anything is loaded.
        FloatingPointError: the gradient has not been finite for many steps.
    """
    recipe.validate()
    if (dataset is None) != (collator is None):
        raise ValueError("collator: want dataset and collator together, got only one of them")
    if model is None and recipe.model.preset is None and recipe.model.path is None:
        raise ValueError("model: want one of model.preset and model.path, got neither")
    if dataset is None and recipe.data.mixture is None and recipe.data.sources is None:
        raise ValueError("data: want one of data.mixture and data.sources, got neither")
    available = [str(tracker) for tracker in get_available_trackers()]
    if recipe.tracker is not None and recipe.tracker not in available:
        raise ValueError(f"tracker: {recipe.tracker!r} is not installed; available: {', '.join(available) or 'none'}")

    output_dir = Path(recipe.output_dir)
    accelerator = _build_accelerator(recipe)
    sharded = accelerator.distributed_type == DistributedType.FSDP
    final = output_dir / "final"
    if _is_finished(recipe, final):
        accelerator.print(
            f"nothing to train: {output_dir} holds the finished run of this recipe; want another output_dir, or a "
            "larger optim.max_steps to go on"
        )
        accelerator.end_training()
        return final
    set_seed(recipe.seed)
    config = build_config(recipe) if model is None else model.config
    processor: Any = build_processor(recipe, config) if isinstance(config, AusmConfig) else None
    if dataset is None or collator is None:
        dataset, collator = build_data(recipe, config, processor.image_processor)
    if model is None:
        model = build_model(recipe, config)
    if evaluate is None:
        evaluate = SampleWriter(dataset, collator)
    if recipe.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None)  # its name since transformers 5.24
        (enable or model.gradient_checkpointing_enable)()
    if recipe.freeze_backbone:
        find_backbone(model).requires_grad_(False)
    network: Any = model.to(accelerator.device)
    ema: Any = copy.deepcopy(network).eval().requires_grad_(False) if recipe.ema_decay is not None else None
    optimizer = build_optimizer(network, recipe.optim)
    # With FSDP each process holds a part of each parameter; the main one puts them together in here.
    together = copy.deepcopy(network) if sharded and accelerator.is_main_process else None
    form = network
    if recipe.mode == "iterative":
        form = IterativeForm(network)
    elif recipe.carried_state > 1:
        form = CarriedForm(network)
    model, prepared_optimizer = accelerator.prepare(form, optimizer)

    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        remove_unfinished(output_dir)
    accelerator.wait_for_everyone()
    set_seed(recipe.seed + accelerator.process_index)  # dropout differs between processes, initial weights don't
    first_step = 0
    if checkpoints(output_dir):
        newest = checkpoints(output_dir)[-1]
        first_step = load_training_state(newest, network, optimizer, ema, accelerator.scaler)
        restore_rng_state(newest, accelerator.process_index)
        changed = _changed(recipe, output_dir)
        message = f"going on from {newest}" + (f" with other values of {', '.join(changed)}" if changed else "")
        if (before := processes_of(newest)) != accelerator.num_processes:
            message += (
                f" in {accelerator.num_processes} processes instead of {before}: unless data.batch_size or "
                "gradient_accumulation_steps make up for it, clips come again or are passed over"
            )
        accelerator.print(message)
    # After the checkpoint was found to fit: a recipe that doesn't wasn't trained.
    if accelerator.is_main_process and first_step <= recipe.optim.max_steps:
        write_text(output_dir / "recipe.yaml", yaml.safe_dump(recipe_to_dict(recipe), sort_keys=False))
    log = _Log(recipe, accelerator, output_dir, first_step)

    batches = load_batches(recipe, dataset, collator, first_step, accelerator.process_index, accelerator.num_processes)
    train_mode(network, recipe)
    skipped_in_a_row = 0
    bar = tqdm(total=recipe.optim.max_steps, initial=first_step, disable=None if accelerator.is_main_process else True)
    for step in range(first_step, recipe.optim.max_steps):
        set_learning_rate(optimizer, step, recipe.optim)
        with log.waiting():
            passes = [next(batches) for _ in range(recipe.gradient_accumulation_steps)]
        num_instances = instances_per_pass(recipe, passes, accelerator)
        for indices, batch in passes:
            batch = send_to_device(batch, accelerator.device, non_blocking=True)
            with accelerator.accumulate(model):
                with accelerator.autocast():
                    inputs = training_inputs(recipe, network, indices, batch)
                inputs["num_instances"] = num_instances
                _forward_and_backward(recipe, accelerator, model, network, inputs, log)
            log.frames += batch["pixel_values_videos"].shape[:2].numel()

        norm = _clip_gradients(accelerator, network, recipe.optim.clip_grad_norm)
        # fp16 finds overflows by itself (the scaler skips the step); elsewhere a bad gradient is left out here.
        finite = bool(torch.isfinite(norm))
        if finite or accelerator.scaler is not None:
            prepared_optimizer.step()
        prepared_optimizer.zero_grad()
        skipped_in_a_row = 0 if finite else skipped_in_a_row + 1
        if skipped_in_a_row > MAX_SKIPPED_STEPS:
            raise FloatingPointError(
                f"the gradient was not finite for {skipped_in_a_row} steps up to step {step + 1}; "
                f"the newest checkpoint in {output_dir} is from before or during that"
            )
        if recipe.ema_decay is not None:
            update_ema(ema, network, recipe.ema_decay, step)

        done = step + 1
        bar.update()
        if done % recipe.log_every == 0 or done == recipe.optim.max_steps:
            log.write(done, bar, float(norm), learning_rate_factor(step, recipe.optim) * recipe.optim.lr)
        if recipe.eval_every and done % recipe.eval_every == 0:
            whole = gather_network(network, together)
            if accelerator.is_main_process:
                judged = ema if ema is not None else whole
                judged.eval()
                with torch.no_grad():
                    log.write_values(done, evaluate(judged, done, output_dir))
            train_mode(network, recipe)
            accelerator.wait_for_everyone()
            log.restart_clock()
        if done % recipe.save_every == 0 or done == recipe.optim.max_steps:
            rng_states = gather_object([rng_state()])
            whole = gather_network(network, together)
            optimizer_state = gather_optimizer_state(network, optimizer)
            if accelerator.is_main_process:
                save_checkpoint(
                    output_dir,
                    done,
                    whole,
                    optimizer_state,
                    rng_states,
                    ema=ema,
                    processor=processor,
                    scaler=accelerator.scaler,
                    keep=recipe.keep_checkpoints,
                )
            accelerator.wait_for_everyone()
    bar.close()

    whole = gather_network(network, together)
    if accelerator.is_main_process:
        _write_result(final, ema if ema is not None else whole, processor)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return final


def _build_accelerator(recipe: Recipe) -> Accelerator:
    """Accelerate, in each process that was launched. Raises ValueError if they can't do what the recipe says."""
    if recipe.mixed_precision == "fp16" and not torch.accelerator.is_available():
        raise ValueError("mixed_precision: 'fp16' is for GPUs, on a CPU it changes nothing; want 'bf16' or 'no'")
    num_launched = int(os.environ.get("WORLD_SIZE", 1))
    if is_initialized() and AcceleratorState().mixed_precision != recipe.mixed_precision:
        AcceleratorState._reset_state()  # of an earlier run in this process
    accelerator = Accelerator(
        # Without a GPU, Accelerate sees the other processes of `torchrun` only if it is told to use the CPU.
        cpu=num_launched > 1 and not torch.cuda.is_available(),
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        mixed_precision=recipe.mixed_precision,
        log_with=recipe.tracker,
        project_dir=recipe.output_dir,
        # The class heads of the label sets that are not in a batch get no gradient.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    if accelerator.num_processes != num_launched:
        raise ValueError(f"accelerate: {num_launched} processes were launched, it sees {accelerator.num_processes}")
    if accelerator.gradient_accumulation_steps != recipe.gradient_accumulation_steps:
        raise ValueError(
            f"gradient_accumulation_steps: ACCELERATE_GRADIENT_ACCUMULATION_STEPS is "
            f"{accelerator.gradient_accumulation_steps}, the recipe says {recipe.gradient_accumulation_steps}"
        )
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # which `accelerate launch` always sets
    if launched not in ("no", recipe.mixed_precision):
        accelerator.print(f"mixed_precision is {recipe.mixed_precision!r}, as the recipe says; not {launched!r}")
    kinds = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP)
    sharded = accelerator.distributed_type == DistributedType.FSDP
    if accelerator.distributed_type not in kinds or (sharded and not accelerator.is_fsdp2):
        raise ValueError(
            f"accelerate: {accelerator.distributed_type} is not supported; want one process, data parallel ones, or "
            "FSDP of version 2"
        )
    if sharded and recipe.ema_decay is not None:
        raise ValueError("ema_decay: the moving average is of whole parameters; want null with FSDP")
    if sharded and recipe.scheduled_sampling and recipe.scheduled_sampling_form == "iterative":
        raise ValueError("scheduled_sampling_form: 'iterative' calls parts of the network; want 'parallel' with FSDP")
    return accelerator


def _changed(recipe: Recipe, output_dir: Path) -> list[str]:
    """What the recipe has other values of than the run in `output_dir`, but for its length and place."""
    noted = output_dir / "recipe.yaml"
    if not noted.is_file():
        return []
    both = yaml.safe_load(noted.read_bytes()), recipe_to_dict(recipe)
    # Through YAML, which has no tuples, and sorts keys.
    earlier, now = (_flatten(yaml.safe_load(yaml.safe_dump(values))) for values in both)
    return sorted({key for key, _ in earlier.items() ^ now.items()} - {"output_dir", "optim.max_steps"})


def _is_finished(recipe: Recipe, final: Path) -> bool:
    """
    Whether the recipe's last step is done and `final` written. Raises ValueError if another recipe did the steps, or
    those before them with another network.
    """
    there = checkpoints(final.parent)
    if not there:
        return False
    is_done = int(there[-1].name.removeprefix("step-")) >= recipe.optim.max_steps
    changed = _changed(recipe, final.parent)
    if is_done and changed:
        raise ValueError(
            f"output_dir: {final.parent} holds a run that is finished and had other values of {', '.join(changed)}; "
            "want another output_dir, or a larger optim.max_steps to go on"
        )
    if of_network := [key for key in changed if key.split(".")[0] == "model"]:
        raise ValueError(
            f"output_dir: {final.parent} holds a run that had other values of {', '.join(of_network)}; want another "
            "output_dir"
        )
    # A run that was killed before it wrote `final` may have that of fewer steps.
    return is_done and final.is_dir() and final.stat().st_mtime >= there[-1].stat().st_mtime


def _forward_and_backward(
    recipe: Recipe, accelerator: Accelerator, model: Any, network: Any, inputs: dict[str, Any], log: _Log
) -> None:
    """Adds the gradient of a batch; clips that are cut into pieces go through the network piece by piece."""
    if recipe.carried_state == 1:
        output = model(**inputs)
        accelerator.backward(output["loss"])
        log.add(output)
        return
    history = None
    for piece in split_clip(network, inputs, recipe.carried_state):
        output = model(**piece, history=history)
        accelerator.backward(output["loss"] / recipe.carried_state)
        log.add(output)
        history = output["history"].detach()


def _write_result(final: Path, result: Any, processor: Any) -> None:
    with FolderOnDisk(final) as folder, no_progress_bars():
        if processor is None:
            result.save_pretrained(folder.partial)
        else:
            # Network, processor and code, as `pipeline(...)` and `from_pretrained` want them.
            VideoSegmentationPipeline(result, processor=processor, device="cpu").save_pretrained(folder.partial)


def build_config(recipe: Recipe) -> AusmConfig:
    """The configuration of the recipe's network. Raises ValueError for what it doesn't know or want."""
    try:
        return _build_config(recipe)
    except StrictDataclassError as error:
        raise ValueError(f"model: {error.__cause__}") from error


def _build_config(recipe: Recipe) -> AusmConfig:
    if recipe.model.path is not None:
        values, _ = AusmConfig.get_config_dict(recipe.model.path)
        if values.get("model_type") != AusmConfig.model_type:
            raise ValueError(
                f"model.path: {recipe.model.path} is of type {values.get('model_type')!r}, want 'ausm' "
                "(`ausm init FOLDER --from MASK2FORMER` makes one of a Mask2Former)"
            )
        # They follow from `label_sets`, which may be replaced below.
        values = {key: value for key, value in values.items() if key not in ("id2label", "label2id")}
        config = AusmConfig.from_dict(values)
    else:
        config = AusmConfig.from_preset(str(recipe.model.preset))
    known = {f.name for f in dataclasses.fields(AusmConfig)}  # type: ignore[arg-type]
    for key in recipe.model.overrides:
        if key not in known:
            raise ValueError(f"model.overrides.{key}: unknown key; AusmConfig has no such attribute")
    changes = dict(recipe.model.overrides)
    if recipe.model.label_sets is not None:
        label_sets = {}
        for name, labels in recipe.model.label_sets.items():
            label_sets[name] = list(LABEL_SETS[name] if labels is None else labels)
            if recipe.model.path is not None and config.label_sets.get(name, label_sets[name]) != label_sets[name]:
                raise ValueError(
                    f"model.label_sets.{name}: {recipe.model.path} has other labels under that name; want the same, "
                    "or another name"
                )
        changes |= {"label_sets": label_sets, "default_label_set": next(iter(label_sets))}
    if recipe.model.path is not None:
        return AusmConfig.from_dict({**values, **changes})
    return AusmConfig.from_preset(str(recipe.model.preset), **changes)


def build_model(recipe: Recipe, config: AusmConfig) -> AusmForUniversalSegmentation:
    """The network of the recipe, with the weights that it starts from. Heads of new label sets start at random."""
    if recipe.model.path is not None:
        return _load_model(recipe.model.path, config, recipe.model.reinitialize)
    model = AusmForUniversalSegmentation(config)
    if recipe.model.imagenet_backbone:
        load_imagenet_weights(model.model.backbone)
    return model


def _load_model(path: str, config: AusmConfig, reinitialize: list[str]) -> AusmForUniversalSegmentation:
    model: Any
    about: Any
    model, about = AusmForUniversalSegmentation.from_pretrained(
        path, config=config, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True
    )
    given = AusmConfig.from_pretrained(path).label_sets
    heads = [f"class_heads.{name}." for name in config.label_sets if name not in given]  # which start at random
    anew = (*reinitialize, *heads)
    other = {name for name, *_ in about["mismatched_keys"]} | set(about["missing_keys"])
    if other := {name for name in other if not name.startswith(anew)}:
        raise ValueError(
            f"model.overrides: {len(other)} parameters are not in {path} or have other shapes there, such as "
            f"{min(other)}; to start them anew name them in model.reinitialize"
        )
    if reinitialize:
        fresh = AusmForUniversalSegmentation(config).state_dict()
        for prefix in reinitialize:
            if not any(name.startswith(prefix) for name in fresh):
                raise ValueError(f"model.reinitialize: the network has no parameter that begins with {prefix!r}")
        model.load_state_dict({n: t for n, t in fresh.items() if n.startswith(tuple(reinitialize))}, strict=False)
    return model


def build_processor(recipe: Recipe, config: AusmConfig) -> AusmProcessor:
    """What prepares frames at inference; it is saved with the network.

    That of the checkpoint in `model.path`, at whose size frames are looked at whatever `data.size` is; of a preset one
    at whose size the shorter side of a frame is that of `data.size`.
    """
    path = recipe.model.path
    if path is not None and (not Path(path).is_dir() or (Path(path) / "processor_config.json").exists()):
        return AusmProcessor.from_pretrained(path)
    side = min(recipe.data.size)
    size = {"shortest_edge": side, "longest_edge": 2 * side}
    if config.backbone_config.model_type == "efficientnet_lite":
        return AusmProcessor(AusmImageProcessor(size=size, image_mean=[127 / 255] * 3, image_std=[128 / 255] * 3))
    return AusmProcessor(AusmImageProcessor(size=size))


def load_batches(
    recipe: Recipe,
    dataset: Dataset,
    collator: Callable[[list[dict]], dict],
    first_step: int,
    rank: int,
    num_processes: int,
) -> Iterator[tuple[list[int], dict]]:
    """Yields (clip numbers, batch) for every forward pass from `first_step` to the end of the run.

    The clips of an optimizer step are numbered through its accumulation steps, processes and batch places. So the
    same clips make up a step however they are divided, and a resumed run sees what an uninterrupted one would.

    Raises:
        ValueError: of a clip that can't be loaded.
    """
    size = recipe.data.batch_size
    first = first_step * recipe.gradient_accumulation_steps
    last = recipe.optim.max_steps * recipe.gradient_accumulation_steps
    starts = [(turn * num_processes + rank) * size for turn in range(first, last)]
    numbers = [list(range(start, start + size)) for start in starts]
    loader = DataLoader(
        _Batches(dataset, collator),
        sampler=numbers,
        batch_size=None,
        num_workers=recipe.data.workers,
        pin_memory=torch.cuda.is_available(),
        # Its own generator: the loader must not draw from the one that dropout uses, or resuming would not be exact.
        generator=torch.Generator(),
    )
    for of_batch, batch in zip(numbers, loader):
        if isinstance(batch, ValueError):
            message, told = batch.args
            raise ValueError(message) from RuntimeError(told)
        yield of_batch, batch


class _Batches(Dataset):
    """Batches by the numbers of their clips.

    A worker gives an error in place of a batch, as message and traceback: torch would make one message of both.
    """

    def __init__(self, dataset: Dataset, collator: Callable[[list[dict]], dict]):
        self.dataset, self.collator = dataset, collator

    def __getitem__(self, numbers: list[int]) -> dict | ValueError:
        try:
            return self.collator([self.dataset[number] for number in numbers])
        except (ValueError, OSError) as error:
            if get_worker_info() is None:
                raise
            return ValueError(str(error), traceback.format_exc())


def instances_per_pass(
    recipe: Recipe, passes: list[tuple[list[int], dict[str, Any]]], accelerator: Accelerator
) -> torch.Tensor:
    """How many targets an optimizer step has, over all processes, for each of its forward and backward passes.

    Divided by that, however unequal the clips are, the passes add up to the gradient of one large batch.
    """
    total = 0
    for indices, batch in passes:
        generators = [clip_generator(recipe.seed, index) for index in indices]
        switch_frames = draw_switch_frames_of(recipe, batch, generators)
        total += count_targets(batch["mask_labels"], switch_frames, batch["detect"], batch["annotated_frames"])
    total = accelerator.reduce(torch.tensor(float(total), device=accelerator.device), "sum").clamp(min=1)
    return total / (len(passes) * accelerator.num_processes * recipe.carried_state)


def draw_switch_frames_of(
    recipe: Recipe, batch: dict[str, Any], generators: list[torch.Generator]
) -> list[torch.Tensor]:
    """The frame in which each object of each clip is handed over, from 0 to T: the first that is drawn for a clip."""
    drawn = []
    for masks, detect, generator in zip(batch["mask_labels"], batch["detect"], generators):
        present = (masks.flatten(2) != 0).any(2).cpu()
        probability = recipe.switch_frame_prompt_probability
        drawn.append(draw_switch_frames(present[None], torch.tensor([detect]), generator, probability)[0])
    return drawn


def training_inputs(recipe: Recipe, network: Any, indices: list[int], batch: dict[str, Any]) -> dict[str, Any]:
    """What the network is given for one batch: the batch, and what is drawn for its clips.

    What is random about a clip's targets comes from a generator of its own, seeded by its number.
    """
    device = batch["pixel_values_videos"].device
    generators = [clip_generator(recipe.seed, index) for index in indices]
    masks = batch["mask_labels"]
    switch_frames = draw_switch_frames_of(recipe, batch, generators)
    slots = [torch.randperm(network.config.num_id_vectors, generator=g)[: len(m)] for m, g in zip(masks, generators)]
    inputs = {
        **batch,
        "switch_frames": [s.to(device) for s in switch_frames],
        "id_slots": [s.to(device) for s in slots],
    }
    if recipe.scheduled_sampling:
        network.eval()
        form = RollOut(network) if recipe.scheduled_sampling_form == "iterative" else network
        with torch.no_grad():
            first_pass = form(**inputs)
        train_mode(network, recipe)
        # Queries are in the order [A; V], the ID vectors in the order of the objects.
        inputs["history_masks"] = [
            sample_history(
                m,
                first_pass["masks_queries_logits"][i, :, : len(m)],
                first_pass["foreground_queries_logits"][i, :, : len(m)],
                switch_frames[i],
                recipe.scheduled_sampling,
                network.config.foreground_threshold,
                generators[i],
            )
            for i, m in enumerate(masks)
        ]
    if recipe.history_corruption:
        inputs["history_masks"] = [
            add_lasting_errors(corrupt_history(m, s, recipe.history_corruption, g), s, recipe.history_corruption, g)
            for m, s, g in zip(inputs.get("history_masks", masks), switch_frames, generators)
        ]
    if recipe.prompt_signals:
        inputs["prompt_masks"] = [
            draw_prompts(m[:, 0], h[:, 0], recipe.prompt_signals, g)
            for m, h, g in zip(masks, inputs.get("history_masks", masks), generators)
        ]
    return inputs


def find_backbone(model: nn.Module) -> nn.Module:
    """The submodule named `backbone`. Raises ValueError if there is none."""
    for name, module in model.named_modules():
        if name.split(".")[-1] == "backbone":
            return module
    raise ValueError("model: has no submodule named 'backbone'")


def train_mode(model: nn.Module, recipe: Recipe) -> None:
    """Training mode; a frozen backbone stays in evaluation mode (no stochastic depth, no statistics)."""
    model.train()
    if recipe.freeze_backbone:
        find_backbone(model).eval()


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Moves the average towards the weights; the first steps weigh more, as the start is no weight to remember."""
    decay = min(decay, (1 + step) / (10 + step))
    for average, value in zip(ema.parameters(), model.parameters()):
        average.lerp_(value, 1 - decay)
    for buffer, newest in zip(ema.buffers(), model.buffers()):
        buffer.copy_(newest)


def _clip_gradients(accelerator: Accelerator, model: nn.Module, max_norm: float | None) -> torch.Tensor:
    """Clips and returns the norm before clipping."""
    norm = accelerator.clip_grad_norm_(model.parameters(), max_norm if max_norm is not None else float("inf"))
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


class _Log:
    """`log.jsonl`, the tracker and the progress bar."""

    def __init__(self, recipe: Recipe, accelerator: Accelerator, output_dir: Path, first_step: int):
        self.accelerator = accelerator
        self.path = output_dir / "log.jsonl"
        self.sums: dict[str, torch.Tensor] = {}
        self.passes: dict[str, int] = {}
        self.restart_clock()
        if accelerator.is_main_process and self.path.exists():
            # A killed run wrote lines for steps that are about to be done again.
            lines = [
                line for line in self.path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= first_step
            ]
            write_text(self.path, "".join(line + "\n" for line in lines))
        if recipe.tracker is not None:
            values = _flatten(recipe_to_dict(recipe))
            accelerator.init_trackers("ausm", config=values)

    def restart_clock(self) -> None:
        self.frames = 0
        self.waited = 0.0
        self.start = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time in here as spent waiting for the loader."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def add(self, output: dict[str, Any]) -> None:
        """Adds the losses of a forward pass. Nothing waits for the device here."""
        for name, value in {"loss": output["loss"], **output["loss_dict"]}.items():
            self.sums[name] = self.sums.get(name, 0) + torch.as_tensor(value).detach()
            self.passes[name] = self.passes.get(name, 0) + 1

    def write(self, step: int, bar: tqdm, grad_norm: float, lr: float) -> None:
        """Means since the last call, over all processes."""
        mine = {name: float(total) / self.passes[name] for name, total in self.sums.items()}
        everyone = gather_object([mine])
        # A term (the classes of a label set) may be there in some batches only.
        names = {name: None for values in everyone for name in values}
        terms = {}
        for name in names:
            values = [v[name] for v in everyone if name in v]
            terms[name] = sum(values) / len(values)
        elapsed = time.perf_counter() - self.start
        frames_per_second = self.frames * self.accelerator.num_processes / elapsed
        rates = {"lr": lr, "frames_per_second": frames_per_second, "waiting_for_data": self.waited / elapsed}
        self.write_values(step, {**terms, "grad_norm": grad_norm, **rates})
        shown = {name: f"{value:.3g}" for name, value in terms.items()}
        bar.set_postfix({**shown, "fps": f"{frames_per_second:.1f}"}, refresh=False)
        self.sums, self.passes = {}, {}
        self.restart_clock()

    def write_values(self, step: int, values: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            line = json.dumps({"step": step, **{name: float(f"{v:.6g}") for name, v in values.items()}})
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
            if not sys.stderr.isatty():
                print(line, flush=True)
        self.accelerator.log(values, step=step)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:  # the run was killed while it wrote this line
        return float("inf")


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim.lr": 1e-4, ...} with values that every tracker takes."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return flat
