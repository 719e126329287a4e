"""The weights of a norm as they multiply: found, refitted channel by channel, and put back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from lmprune.healing.solving import share


class Norm:
    """A norm with one weight a channel, whose output is that of itself without weights times `gain`.

    In Gemma the weight is what the gain is above 1.
    """

    def __init__(self, norm: Any) -> None:
        self._norm = norm
        probe = torch.randn(8, len(norm.weight), generator=torch.Generator().manual_seed(0)).to(norm.weight)
        bare = self._with(0.0, probe)
        self._offset = round(float((bare * self.unit(probe)).sum() / self.unit(probe).square().sum()))

    def _with(self, weight: float, states: Tensor) -> Tensor:
        parameters = {"weight": torch.full_like(self._norm.weight, weight)}
        if getattr(self._norm, "bias", None) is not None:
            parameters["bias"] = torch.zeros_like(self._norm.bias)
        output: Tensor = functional_call(self._norm, parameters, (states,))
        return output

    def unit(self, states: Tensor) -> Tensor:
        """``states`` normed, without weights."""
        return self._with(1.0, states) - self._with(0.0, states)

    @property
    def gain(self) -> Tensor:
        """What each channel is multiplied by, in float64 on the CPU."""
        weight: Tensor = self._norm.weight.detach().to("cpu", torch.float64)
        return weight + self._offset

    def before_bias(self, wanted: Tensor) -> Tensor:
        """``wanted`` without what the norm's bias makes of it."""
        bias: Tensor | None = getattr(self._norm, "bias", None)
        return wanted if bias is None else wanted - bias.detach().to(wanted)

    def set_gain(self, gain: Tensor) -> None:
        """Change it."""
        with torch.no_grad():
            self._norm.weight.copy_(gain - self._offset)

    def undone(self, states: Tensor, wanted: Tensor) -> Tensor:
        """What the norm should be given to make ``wanted``, if the size of ``states`` stayed; (tokens, width) each."""
        size = states.float().square().mean(-1, keepdim=True).sqrt()
        gain = self.gain.to(states)
        return torch.where(gain.abs() > 1e-3 * gain.abs().max(), wanted / gain * size, states)

    def sums(self) -> GainSums:
        """Sums that its gain is refitted from."""
        return GainSums(len(self._norm.weight))


class GainSums:
    """Sums over tokens of normed states z and wanted outputs y, channel by channel, in float64 on the CPU."""

    def __init__(self, width: int) -> None:
        self._square, self._cross = (torch.zeros(width, dtype=torch.float64) for _ in range(2))
        self._size = 0.0

    def add(self, units: Tensor, wanted: Tensor) -> None:
        """With these tokens, (tokens, width) each."""
        units, wanted = units.to("cpu", torch.float64), wanted.to("cpu", torch.float64)
        self._square += units.square().sum(0)
        self._cross += (units * wanted).sum(0)
        self._size += float(wanted.square().sum())

    def best(self) -> Tensor:
        """The gain of least squared error."""
        return torch.where(self._square > 0, self._cross / self._square, torch.zeros_like(self._square))

    def error(self, gain: Tensor) -> float:
        """The squared error of that gain, as a share of the squares of y."""
        error = self._size + float((gain * (gain * self._square - 2 * self._cross)).sum())
        return share(error, self._size)
