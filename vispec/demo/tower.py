"""EfficientNet-Lite0 as a Hugging Face vision tower."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

# (repeats, kernel, stride, expansion, channels out) of each stage, Source: EfficientNet-Lite0.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM_CHANNELS = 32
FINE_BLOCK = 10  # the last block at stride 16
BATCH_NORM_EPS = 1e-3


class LiteTowerConfig(PretrainedConfig):
    """Configuration of `LiteTower`."""

    model_type = "vispec_lite_tower"

    def __init__(self, image_size: int = 224, patch_size: int = 16, hidden_size: int = 432, **kwargs) -> None:
        self.image_size = image_size
        self.patch_size = patch_size
        self.hidden_size = hidden_size
        super().__init__(**kwargs)


def _convolution(inside: int, outside: int, kernel: int, stride: int, groups: int) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, kernel, stride, groups=groups, bias=False)


def _same(convolution: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """Convolve with TensorFlow's SAME padding, which pads more at the right and bottom."""
    kernel, stride = convolution.kernel_size[0], convolution.stride[0]
    pads = []
    for size in (x.shape[-1], x.shape[-2]):
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        pads += [total // 2, total - total // 2]
    return convolution(F.pad(x, pads))


class LiteBlock(nn.Module):
    """Inverted residual: widen, depthwise convolution, narrow."""

    def __init__(self, inside: int, outside: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inside * expansion
        self.expands = expansion != 1
        if self.expands:
            self.expand_conv = _convolution(inside, wide, 1, 1, 1)
            self.bn0 = nn.BatchNorm2d(wide, BATCH_NORM_EPS)
        self.depthwise_conv = _convolution(wide, wide, kernel, stride, wide)
        self.bn1 = nn.BatchNorm2d(wide, BATCH_NORM_EPS)
        self.project_conv = _convolution(wide, outside, 1, 1, 1)
        self.bn2 = nn.BatchNorm2d(outside, BATCH_NORM_EPS)
        self.residual = stride == 1 and inside == outside

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu6(self.bn0(self.expand_conv(x))) if self.expands else x
        y = F.relu6(self.bn1(_same(self.depthwise_conv, y)))
        y = self.bn2(self.project_conv(y))
        return x + y if self.residual else y


def sine_positions(side: int, channels: int) -> torch.Tensor:
    """Two-dimensional sine positions of a square grid.

    Returns: [side * side, channels] float32; half of the channels tell the row, half the column.
    """
    quarter = channels // 4
    rates = torch.exp(-math.log(100.0) * torch.arange(quarter, dtype=torch.float32) / quarter)
    angles = torch.arange(side, dtype=torch.float32)[:, None] * rates
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows = axis[:, None].expand(side, side, -1)
    columns = axis[None].expand(side, side, -1)
    return torch.cat([rows, columns], dim=2).reshape(side * side, channels)


class LiteTower(PreTrainedModel):
    """EfficientNet-Lite0 without its classifier, as `LlavaForConditionalGeneration` wants a tower.

    Shapes: pixel_values [B, 3, image_size, image_size]; hidden_states [B, N, 432] with
    N = (image_size / 16)^2: 112 channels at stride 16 beside 320 channels at stride 32, plus
    2-D sine positions.
    Notes: always in evaluation mode (its batch statistics are the published ones).
    """

    config_class = LiteTowerConfig
    main_input_name = "pixel_values"

    def __init__(self, config: LiteTowerConfig) -> None:
        super().__init__(config)
        self.conv_stem = _convolution(3, STEM_CHANNELS, 3, 2, 1)
        self.bn0 = nn.BatchNorm2d(STEM_CHANNELS, BATCH_NORM_EPS)
        blocks, inside = [], STEM_CHANNELS
        for repeats, kernel, stride, expansion, outside in STAGES:
            for repeat in range(repeats):
                blocks.append(LiteBlock(inside, outside, kernel, stride if repeat == 0 else 1, expansion))
                inside = outside
        self.blocks = nn.ModuleList(blocks)
        self.post_init()
        self.eval()

    def train(self, mode: bool = True) -> "LiteTower":
        """Stay in evaluation mode, whatever the whole model is set to."""
        return super().train(False)

    def forward(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutput:
        """Encode pictures. `kwargs` takes the output options that transformers passes."""
        x = F.relu6(self.bn0(_same(self.conv_stem, pixel_values.to(self.dtype))))
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index == FINE_BLOCK:
                fine = x
        coarse = F.interpolate(x, size=fine.shape[-2:], mode="nearest")
        features = torch.cat([fine, coarse], dim=1).flatten(2).transpose(1, 2)
        positions = sine_positions(fine.shape[-1], features.shape[-1])
        features = features + positions.to(features)
        return BaseModelOutput(last_hidden_state=features, hidden_states=(features,))


AutoConfig.register(LiteTowerConfig.model_type, LiteTowerConfig, exist_ok=True)
AutoModel.register(LiteTowerConfig, LiteTower, exist_ok=True)
