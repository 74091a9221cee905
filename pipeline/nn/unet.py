"""The U-Net denoiser of SeDA Table 3: it treats feature vectors as small square images, with one channel per modality."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.nn.layers import Dropout, TimeEmbedding

NUM_NORM_GROUPS = 4  # GroupNorm, unlike BatchNorm, uses statistics of one sample only


class ResidualBlock(nn.Module):
    """A residual block of DDPM's U-Net (Ho et al. 2020).

    Order: norm, SiLU, convolution, addition of the time embedding, norm, SiLU, dropout, convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, time_width: int, dropout: float) -> None:
        super().__init__()
        self.dropout = Dropout(dropout)
        self.norm1, self.norm2 = nn.GroupNorm(NUM_NORM_GROUPS, in_channels), nn.GroupNorm(NUM_NORM_GROUPS, out_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.from_time = nn.Linear(time_width, out_channels)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """Map [B,Cin,H,W] to [B,Cout,H,W]; e is the time embedding [E] or [B,E]."""
        h = self.conv1(F.silu(self.norm1(x))) + self.from_time(e)[..., None, None]
        return self.skip(x) + self.conv2(self.dropout(F.silu(self.norm2(h))))


class UNet(nn.Module):
    """X_theta as a U-Net over sqrt(D) x sqrt(D) images; see `denoisers.Denoiser`.

    Vectors are padded with zeros to a square whose side is divisible by 2^(number of levels - 1); by default, that is 8. The
    defaults are 8 base channels, channel multipliers 1, 2, 2, 2, and two residual blocks per level. There is no attention. The
    time embedding enters every residual block.
    """

    def __init__(
        self,
        width: int,
        num_steps: int,
        channels: int = 8,
        multipliers: tuple[int, ...] = (1, 2, 2, 2),
        num_blocks: int = 2,
        time_width: int = 128,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        stride = 2 ** (len(multipliers) - 1)
        self.width = width
        self.side = math.ceil(math.sqrt(width) / stride) * stride
        self.embed = TimeEmbedding(num_steps, time_width)
        self.from_text = nn.Conv2d(1, channels, 3, padding=1)
        self.from_image = nn.Conv2d(1, channels, 3, padding=1, bias=False)
        self.down, self.middle, self.up = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        self.shrink, self.grow = nn.ModuleList(), nn.ModuleList()
        current_channels, skip_channels = channels, [channels]
        for level, multiplier in enumerate(multipliers):
            for _ in range(num_blocks):
                self.down.append(ResidualBlock(current_channels, channels * multiplier, time_width, dropout))
                current_channels = channels * multiplier
                skip_channels.append(current_channels)
            if level < len(multipliers) - 1:
                self.shrink.append(nn.Conv2d(current_channels, current_channels, 3, stride=2, padding=1))
                skip_channels.append(current_channels)
        self.middle.extend(ResidualBlock(current_channels, current_channels, time_width, dropout) for _ in range(2))
        for level, multiplier in enumerate(reversed(multipliers)):
            for _ in range(num_blocks + 1):
                self.up.append(
                    ResidualBlock(current_channels + skip_channels.pop(), channels * multiplier, time_width, dropout)
                )
                current_channels = channels * multiplier
            if level < len(multipliers) - 1:
                self.grow.append(nn.Conv2d(current_channels, current_channels, 3, padding=1))
        self.num_blocks = num_blocks
        self.norm = nn.GroupNorm(NUM_NORM_GROUPS, current_channels)
        self.out = nn.Conv2d(current_channels, 1, 3, padding=1)

    def image_context(self, x_v: Tensor) -> Tensor:
        """Map x_v [B,D] to the contribution of the visual channel to the first convolution, [B,channels,side,side]."""
        return self.from_image(self._to_square(x_v))

    def embed_step(self, n: Tensor) -> Tensor:
        """Map step numbers [...] to e_n [..., time_width]."""
        return self.embed(n)

    def forward(self, x_n: Tensor, e: Tensor, context: Tensor) -> Tensor:
        """See `denoisers.Denoiser`."""
        h = self.from_text(self._to_square(x_n)) + context
        skips = [h]
        for i, block in enumerate(self.down):
            h = block(h, e)
            skips.append(h)
            level, block_in_level = divmod(i + 1, self.num_blocks)
            if block_in_level == 0 and level <= len(self.shrink):
                h = self.shrink[level - 1](h)
                skips.append(h)
        for block in self.middle:
            h = block(h, e)
        for i, block in enumerate(self.up):
            h = block(torch.cat([h, skips.pop()], dim=1), e)
            level, block_in_level = divmod(i + 1, self.num_blocks + 1)
            if block_in_level == 0 and level <= len(self.grow):
                h = self.grow[level - 1](F.interpolate(h, scale_factor=2.0, mode="nearest"))
        return self.out(F.silu(self.norm(h))).flatten(1)[:, : self.width]

    def _to_square(self, x: Tensor) -> Tensor:
        """Map vectors [B,D] to zero-padded images [B,1,side,side]."""
        return F.pad(x, (0, self.side**2 - self.width)).reshape(-1, 1, self.side, self.side)
