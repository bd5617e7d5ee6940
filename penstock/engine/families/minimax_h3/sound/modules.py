"""The half of MiniMax-H3's audio VAE that decodes, as modules of plain torch: BigVGAN over a
projection of the latents. Names, shapes and bits are those of diffusers'
``AutoencoderKLMiniMaxH3Audio``; all of it is in fp32, and mono: two channels are a batch of two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from penstock.engine.families.minimax_h3.sound.config import AUDIO
from penstock.engine.family.layers import NetworkConfig, parameter

_RATIO, _TAPS = 2, 12
"""Of the filters around an activation, which runs at twice the rate: no new tone is folded back."""

_TINY = 1e-9


class NormedConv1d(nn.Module):
    """A convolution whose weight is kept as directions and lengths, or folded.

    Args:
        stride: of one that is transposed; 0: it is not.
    """

    def __init__(
        self, into: int, out: int, kernel: int, *, dilation: int = 1, padding: int = 0,
        stride: int = 0, bias: bool = True, folded: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        shape = (into, out, kernel) if stride else (out, into, kernel)
        self.bias = parameter(out) if bias else None
        if folded:
            self.weight = parameter(*shape)
        else:
            self.weight_g, self.weight_v = parameter(shape[0], 1, 1), parameter(*shape)
        self._folded, self._stride = folded, stride
        self._dilation, self._padding = dilation, padding

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (b, into, n) to (b, out, n')."""
        weight = self.weight if self._folded else torch._weight_norm(self.weight_v, self.weight_g)
        if self._stride:
            return F.conv_transpose1d(
                hidden, weight, self.bias, stride=self._stride, padding=self._padding
            )
        return F.conv1d(hidden, weight, self.bias, padding=self._padding, dilation=self._dilation)


class PlainConv1d(nn.Conv1d):
    """`torch.nn.Conv1d`."""

    def __init__(self, into: int, out: int, kernel: int) -> None:
        super().__init__(into, out, kernel, device=torch.device("meta"))

    def reset_parameters(self) -> None:
        """Nothing."""


class MiniMaxH3AudioSnakeBeta(nn.Module):
    """``x + sin(a x)^2 / b``; frequency and magnitude of each channel are kept as logarithms."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha, self.beta = parameter(channels), parameter(channels)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (b, c, n) to the same shape."""
        alpha, beta = (torch.exp(each[None, :, None]) for each in (self.alpha, self.beta))
        waves = (alpha * hidden).sin_().pow_(2)
        return waves.mul_((beta + _TINY).reciprocal()).add_(hidden)


class _Filter(nn.Module):
    """One filter for all channels, as the checkpoint holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("filter", torch.empty(1, 1, _TAPS, device="meta"))

    def _for(self, channels: int) -> Tensor:
        taps = self.get_buffer("filter")
        return taps.expand(channels, -1, -1)


class MiniMaxH3AudioUpSample1d(_Filter):
    """Twice as many samples, without new tones."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (b, c, n) to (b, c, 2 n)."""
        channels, pad = hidden.shape[1], _TAPS // _RATIO - 1
        hidden = F.pad(hidden, (pad, pad), mode="replicate")
        wide = F.conv_transpose1d(hidden, self._for(channels), stride=_RATIO, groups=channels)
        left = pad * _RATIO + (_TAPS - _RATIO) // 2
        right = pad * _RATIO + (_TAPS - _RATIO + 1) // 2
        return wide.mul_(_RATIO)[..., left:-right]


class MiniMaxH3AudioLowPassFilter1d(_Filter):
    """Half as many samples, without tones that they cannot hold."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (b, c, 2 n) to (b, c, n)."""
        channels = hidden.shape[1]
        hidden = F.pad(hidden, (_TAPS // 2 - 1, _TAPS // 2), mode="replicate")
        return F.conv1d(hidden, self._for(channels), stride=_RATIO, groups=channels)


class MiniMaxH3AudioDownSample1d(nn.Module):
    """``lowpass``."""

    def __init__(self) -> None:
        super().__init__()
        self.lowpass = MiniMaxH3AudioLowPassFilter1d()


class MiniMaxH3AudioActivation1d(nn.Module):
    """An activation at twice the rate."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.act = MiniMaxH3AudioSnakeBeta(channels)
        self.upsample = MiniMaxH3AudioUpSample1d()
        self.downsample = MiniMaxH3AudioDownSample1d()

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (b, c, n) to the same shape."""
        return self.downsample.lowpass(self.act(self.upsample(hidden)))  # type: ignore[no-any-return]


class MiniMaxH3AudioAMPBlock(nn.Module):
    """Pairs of convolutions, each after an activation, beside shortcuts."""

    def __init__(self, channels: int, kernel: int, dilations: Any, *, folded: bool) -> None:
        super().__init__()

        def conv(dilation: int) -> NormedConv1d:
            around = (kernel - 1) * dilation // 2
            return NormedConv1d(
                channels, channels, kernel, dilation=dilation, padding=around, folded=folded
            )

        self.convs1 = nn.ModuleList(conv(each) for each in dilations)
        self.convs2 = nn.ModuleList(conv(1) for _ in dilations)
        self.activations = nn.ModuleList(
            MiniMaxH3AudioActivation1d(channels) for _ in range(2 * len(dilations))
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (b, c, n) to the same shape."""
        pairs = zip(self.convs1, self.convs2, strict=True)
        for number, (first, second) in enumerate(pairs):
            inner = first(self.activations[2 * number](hidden))
            inner = second(self.activations[2 * number + 1](inner))
            hidden = inner.add_(hidden)
        return hidden


class MiniMaxH3AudioBigVGANDecoder(nn.Module):
    """Widened latents to samples, a rate at a time."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        folded, width = config.folded, config.decoder_dim
        self.conv_pre = NormedConv1d(config.latent_dim, width, 7, padding=3, folded=folded)
        self.ups, self.resblocks = nn.ModuleList(), nn.ModuleList()
        kinds = list(zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True))
        for rate, kernel in zip(config.decoder_rates, config.decoder_kernel_sizes, strict=True):
            up = NormedConv1d(
                width, width // 2, kernel, stride=rate, padding=(kernel - rate) // 2, folded=folded
            )
            self.ups.append(nn.ModuleList([up]))
            width //= 2
            for size, dilations in kinds:
                self.resblocks.append(MiniMaxH3AudioAMPBlock(width, size, dilations, folded=folded))
        self.activation_post = MiniMaxH3AudioActivation1d(width)
        self.conv_post = NormedConv1d(width, 1, 7, padding=3, bias=False, folded=folded)
        self._kinds = len(kinds)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (b, latent_dim, n) to (b, 1, hop * n) in -1..1."""
        hidden = self.conv_pre(hidden)
        for number, up in enumerate(self.ups):
            hidden = up[0](hidden)  # type: ignore[index]
            blocks = self.resblocks[number * self._kinds : (number + 1) * self._kinds]
            total = blocks[0](hidden)
            for block in blocks[1:]:
                total = total.add_(block(hidden))
            hidden = total.div_(self._kinds)
        return self.conv_post(self.activation_post(hidden)).clamp_(-1.0, 1.0)  # type: ignore[no-any-return]


class AutoencoderKLMiniMaxH3Audio(nn.Module):
    """What decodes; what encodes is never read."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = own = NetworkConfig(AUDIO, config)
        self.dec_in_proj = PlainConv1d(own.latent_channels, own.latent_dim, 1)
        self.decoder = MiniMaxH3AudioBigVGANDecoder(own)


def build(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """Build the network; it has no blocks that stream."""
    known = {name: value for name, value in config.items() if name in AUDIO}
    module = AutoencoderKLMiniMaxH3Audio(**known)
    return module.eval().requires_grad_(False), None
