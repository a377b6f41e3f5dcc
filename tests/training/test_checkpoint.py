"""Checkpoints of networks whose weights transformers stores under other names than their modules have."""

import pytest
import torch
from tiny_backbones import TINY_SWIN

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


def test_a_network_of_other_sizes_is_refused(tmp_path):
    saved = swin_network(0)
    state = gather_optimizer_state(saved, torch.optim.AdamW(saved.parameters()))
    save_checkpoint(tmp_path, 7, saved, state, [])
    other = swin_network(0, mask_feature_size=8)
    with pytest.raises(ValueError, match="^model: .*mismatched.*; use another output_dir"):
        load_training_state(tmp_path / "step-00000007", other, torch.optim.AdamW(other.parameters()))
