"""EfficientNet-Lite as a transformers backbone: feature maps at strides 4, 8, 16 and 32. Lite0: 3.4 M parameters."""

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
from transformers.modeling_outputs import BackboneOutput
from transformers.utils import can_return_tuple


@strict
class EfficientNetLiteConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""
    Configuration of [`EfficientNetLiteBackbone`]. The defaults are EfficientNet-Lite0.

    The network is a stride-2 stem convolution followed by groups of inverted bottlenecks; entry `i` of each of the
    five lists describes group `i`. A group of stride 2 opens a new stage.

    Args:
        stem_width (`int`, *optional*, defaults to 32):
            Channels of the stem convolution.
        widths (`list[int]`, *optional*, defaults to `[16, 24, 40, 80, 112, 192, 320]`):
            Output channels of each group.
        depths (`list[int]`, *optional*, defaults to `[1, 2, 2, 3, 3, 4, 1]`):
            Blocks in each group.
        kernel_sizes (`list[int]`, *optional*, defaults to `[3, 3, 5, 3, 5, 5, 3]`):
            Side of the depthwise convolutions of each group; odd.
        strides (`list[int]`, *optional*, defaults to `[1, 2, 2, 2, 1, 2, 1]`):
            Stride of the first block of each group, 1 or 2; the first must be 1.
        expand_ratios (`list[int]`, *optional*, defaults to `[1, 6, 6, 6, 6, 6, 6]`):
            Channels inside a block, as a multiple of the channels that enter it.
        batch_norm_eps (`float`, *optional*, defaults to 1e-3):
            Added to the variance in the normalisations.
        out_features (`list[str]`, *optional*):
            Stages to return, out of `"stem"` (stride 2), `"stage1"` (stride 4), `"stage2"` (8), ... . All but the stem
            if neither this nor `out_indices` is given.
        out_indices (`list[int]`, *optional*):
            The same by index, 0 is the stem.

    Raises:
        ValueError: if the five lists differ in length, or a stride or kernel size is impossible.
    """

    model_type = "efficientnet_lite"

    stem_width: int = 32
    widths: list[int] | tuple[int, ...] = (16, 24, 40, 80, 112, 192, 320)
    depths: list[int] | tuple[int, ...] = (1, 2, 2, 3, 3, 4, 1)
    kernel_sizes: list[int] | tuple[int, ...] = (3, 3, 5, 3, 5, 5, 3)
    strides: list[int] | tuple[int, ...] = (1, 2, 2, 2, 1, 2, 1)
    expand_ratios: list[int] | tuple[int, ...] = (1, 6, 6, 6, 6, 6, 6)
    batch_norm_eps: float | int = 1e-3
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs):
        per_group = ("widths", "depths", "kernel_sizes", "strides", "expand_ratios")
        for name in per_group:
            setattr(self, name, list(getattr(self, name)))
        lengths = {name: len(getattr(self, name)) for name in per_group}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"{', '.join(per_group)} must have one entry per group, got lengths {lengths}")
        if self.strides[:1] != [1] or not set(self.strides) <= {1, 2}:
            raise ValueError(f"strides must start with 1 and hold only 1 and 2, got {self.strides}")
        if any(size < 1 or size % 2 == 0 for size in self.kernel_sizes):
            raise ValueError(f"kernel_sizes must be odd, got {self.kernel_sizes}")

        self.stage_names = ["stem"] + [f"stage{i}" for i in range(1, self.strides.count(2) + 1)]
        out_features, out_indices = kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
        if out_features is None and out_indices is None:
            out_features = self.stage_names[1:]
        self.set_output_features_output_indices(out_features=out_features, out_indices=out_indices)
        super().__post_init__(**kwargs)


class HeldConv2d(nn.Conv2d):
    """
    A weight for the module around it to read: calling it gives the weight. It is by that call that Accelerate knows
    when to fetch weights that lie on disk or in another memory.
    """

    def forward(self) -> torch.Tensor:  # type: ignore[override]
        return self.weight


class HeldBatchNorm2d(nn.BatchNorm2d):
    """The same for scale, shift, mean and variance of a normalisation."""

    def forward(self) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        assert self.running_mean is not None and self.running_var is not None
        return self.weight, self.bias, self.running_mean, self.running_var


class EfficientNetLiteConvolution(nn.Module):
    """
    Convolution padded as TensorFlow's "same", normalisation, and ReLU6 where asked: (B, C, H, W) to
    (B, C', ceil(H / stride), ceil(W / stride)).

    Batch norm always normalises with its stored statistics and never updates them, in training too: clips are few and
    their frames alike, so batch statistics would be poor ones, and they would let the frames of a clip see each other.
    Its scale and shift are trained. With fixed statistics it is a factor and a shift per channel, which the
    convolution takes over: that saves a pass over the widest maps of the network, forward and backward.

    With a stride, TensorFlow pads more at the bottom and right than at the top and left, and how much depends on the
    size of the input; the ImageNet weights were trained so, and symmetric padding would shift their features.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int, groups: int, eps: float, relu: bool
    ):
        super().__init__()
        self.kernel_size, self.stride, self.relu = kernel_size, stride, relu
        self.convolution = HeldConv2d(in_channels, out_channels, kernel_size, stride, groups=groups, bias=False)
        self.normalization = HeldBatchNorm2d(out_channels, eps=eps)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.kernel_size == self.stride == self.convolution.groups == 1:
            # Channels last, a 1x1 convolution is a matrix product as it stands. A bias that is given to it is first
            # written to all of the result, which takes longer than to add it.
            weight, bias = self.folded(0, 0)
            out = F.linear(hidden_states.permute(0, 2, 3, 1), weight.flatten(1)).add_(bias)
            return (F.relu6(out, inplace=True) if self.relu else out).permute(0, 3, 1, 2)
        top, bottom = self.same_padding(hidden_states.shape[-2])
        left, right = self.same_padding(hidden_states.shape[-1])
        # The convolution pads alike on both sides. Where one more is wanted at the end, a zero before the kernel does
        # it: padding the kernel is cheaper than padding the widest maps of the network.
        weight, bias = self.folded(bottom - top, right - left)
        given = hidden_states.dtype
        if hidden_states.device.type == "cpu" and given.itemsize == 2 and self.convolution.groups > 1:
            # Where a processor has no instructions for these types, torch goes channel by channel.
            hidden_states, weight, bias = hidden_states.float(), weight.float(), bias.float()
        out = F.conv2d(hidden_states, weight, bias, self.stride, (bottom, right), groups=self.convolution.groups)
        out = out.to(given)
        return F.relu6(out, inplace=True) if self.relu else out

    def folded(self, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Weight and bias that do what convolution and normalisation do, the kernel with so many rows and columns of
        zeros before it.
        """
        weight = self.convolution()
        scale, shift, mean, variance = self.normalization()
        # Padded before the factors, since ONNX Runtime takes what is padded just before a convolution for its input.
        if rows or columns:
            weight = F.pad(weight, (columns, 0, rows, 0))
        factor = scale * torch.rsqrt(variance + self.normalization.eps)
        return weight * factor.view(-1, 1, 1, 1), shift - mean * factor

    def same_padding(self, size: int) -> tuple[int, int]:
        """Zeros before and after an axis of `size` pixels, for ceil(size / stride) pixels to come out."""
        out_size = -(-size // self.stride)
        total = max((out_size - 1) * self.stride + self.kernel_size - size, 0)
        return total // 2, total - total // 2


class EfficientNetLiteBlock(nn.Module):
    """Inverted bottleneck: widen (1x1), depthwise, narrow (1x1, linear); the input is added where shapes allow."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int, expand_ratio: int, eps: float
    ):
        super().__init__()
        inner = in_channels * expand_ratio
        self.expand = (
            EfficientNetLiteConvolution(in_channels, inner, 1, 1, 1, eps, relu=True) if expand_ratio != 1 else None
        )
        self.depthwise = EfficientNetLiteConvolution(inner, inner, kernel_size, stride, inner, eps, relu=True)
        self.project = EfficientNetLiteConvolution(inner, out_channels, 1, 1, 1, eps, relu=False)
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        inner = self.expand(hidden_states) if self.expand is not None else hidden_states
        out = self.project(self.depthwise(inner))
        return hidden_states + out if self.residual else out


class EfficientNetLiteBackbone(BackboneMixin, PreTrainedModel):
    """
    EfficientNet-Lite without its classification head, as a backbone (use it through `AutoBackbone`).

    ReLU6 and no squeeze-and-excitation, as in the original; its stochastic depth is left out. Batch norm statistics
    stay as they are in training, see [`EfficientNetLiteConvolution`]. The ImageNet weights expect RGB frames
    normalised as `(x - 127) / 128`.
    """

    config_class = EfficientNetLiteConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    _no_split_modules = ["EfficientNetLiteBlock"]
    # It has no attention, so whichever the model around it uses will do.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    has_attentions = False

    def __init__(self, config: EfficientNetLiteConfig):
        super().__init__(config)
        self.stem = EfficientNetLiteConvolution(3, config.stem_width, 3, 2, 1, config.batch_norm_eps, relu=True)
        # stages[0] stays at the stem's stride; its output is the feature named "stem".
        stages = [nn.Sequential()]
        self.num_features = []
        channels = config.stem_width
        for width, depth, kernel_size, stride, expand_ratio in zip(
            config.widths, config.depths, config.kernel_sizes, config.strides, config.expand_ratios
        ):
            if stride == 2:
                self.num_features.append(channels)
                stages.append(nn.Sequential())
            for i in range(depth):
                stages[-1].append(
                    EfficientNetLiteBlock(
                        channels, width, kernel_size, stride if i == 0 else 1, expand_ratio, config.batch_norm_eps
                    )
                )
                channels = width
        self.num_features.append(channels)
        self.stages = nn.ModuleList(stages)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):
            # Frozen statistics don't rescale what passes, so the convolutions must keep its variance themselves:
            # depthwise ones do so by fan-in, not by the fan-out of torch, which ignores their groups.
            init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor, output_hidden_states: bool | None = None) -> BackboneOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`):
                Normalised frames of any size.
            output_hidden_states (`bool`, *optional*):
                Also return the output of every stage, the stem's included.

        Returns:
            [`BackboneOutput`] whose `feature_maps` are, for each of `out_features`, a tensor of shape
            `(B, C, ceil(H / stride), ceil(W / stride))`.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        hidden_states = self.stem(pixel_values)
        all_stages: tuple[torch.Tensor, ...] = ()
        for stage in self.stages:
            hidden_states = stage(hidden_states)
            all_stages += (hidden_states,)
        feature_maps = tuple(
            feature for name, feature in zip(self.stage_names, all_stages) if name in self.out_features
        )
        return BackboneOutput(
            feature_maps=feature_maps,  # type: ignore[arg-type]  # transformers says that there is one map
            hidden_states=all_stages if output_hidden_states else None,  # type: ignore[arg-type]
        )


__all__ = ["EfficientNetLiteBackbone", "EfficientNetLiteConfig"]
