"""Checkpoints of networks whose weights transformers stores under other names than their modules have."""

import pytest
import torch
from tiny_backbones import TINY_SWIN
from torch import nn

from ausm_hf import AusmConfig, AusmForUniversalSegmentation
from ausm_hf.training.checkpoint import gather_optimizer_state, load_training_state, save_checkpoint


def swin_network(seed, **changes):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "mask_feature_size": 16, "num_attention_heads": 2}
    config = AusmConfig.from_preset(
        "tiny",
        backbone_config=TINY_SWIN,
        pixel_encoder_layers=1,
        num_compressor_layers=1,
        num_history_decoder_layers=1,
        num_decoder_layers=1,
        **{**sizes, **changes},
    )
    return AusmForUniversalSegmentation(config)


def test_a_swin_network_comes_back(tmp_path):
    saved, loaded, average = (swin_network(seed) for seed in (0, 1, 2))
    optimizers = [torch.optim.AdamW(network.parameters()) for network in (saved, loaded)]
    save_checkpoint(tmp_path, 7, saved, gather_optimizer_state(saved, optimizers[0]), [], ema=average)
    wanted = {name: value.clone() for name, value in saved.state_dict().items()}
    other = swin_network(3)
    assert load_training_state(tmp_path / "step-00000007", loaded, optimizers[1], ema=other) == 7
    assert any(name.startswith("model.backbone.swin.") for name in wanted)
    for network, source in ((loaded, wanted), (other, average.state_dict())):
        assert network.state_dict().keys() == source.keys()
        for name, value in network.state_dict().items():
            assert torch.equal(value, source[name]), name


def test_a_module_that_was_put_in_by_hand_comes_back(tmp_path):
    """The configuration knows nothing of it, as of the mixer over time in docs/extend.md."""
    saved, loaded = swin_network(0), swin_network(1)
    for network in (saved, loaded):
        network.foreground_head = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 1))
        network.model.backbone = nn.Identity()  # whose weights are stored under their own names
    optimizers = [torch.optim.AdamW(network.parameters()) for network in (saved, loaded)]
    save_checkpoint(tmp_path, 7, saved, gather_optimizer_state(saved, optimizers[0]), [])
    assert load_training_state(tmp_path / "step-00000007", loaded, optimizers[1]) == 7
    assert (
        saved.state_dict().keys() == loaded.state_dict().keys() and "foreground_head.1.weight" in loaded.state_dict()
    )
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, saved.state_dict()[name]), name


def test_a_network_of_other_sizes_is_refused(tmp_path):
    saved = swin_network(0)
    state = gather_optimizer_state(saved, torch.optim.AdamW(saved.parameters()))
    save_checkpoint(tmp_path, 7, saved, state, [])
    other = swin_network(0, mask_feature_size=8)
    with pytest.raises(ValueError, match="^model: .*mismatched.*; use another output_dir"):
        load_training_state(tmp_path / "step-00000007", other, torch.optim.AdamW(other.parameters()))
