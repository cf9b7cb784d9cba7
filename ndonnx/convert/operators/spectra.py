"""Converters of Fourier transforms; complex numbers are pairs along the last axis."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ndonnx.convert.registry import OnnxNode, converts, opset_of
from ndonnx.convert.tables import Numbers


@converts("DFT")
class DFT(nn.Module):
    """`DFT` of data whose last axis holds real numbers (1) or complex ones (2), along one axis."""

    def __init__(self, node: OnnxNode) -> None:
        super().__init__()
        attributes = node.attributes
        self.axis = int(attributes.get("axis", 1)) if opset_of(node) < 20 else -2
        self.inverse, self.onesided = (bool(attributes.get(name, 0)) for name in ("inverse", "onesided"))
        self.length, self.place = Numbers(), Numbers()
        if self.inverse and self.onesided:
            raise NotImplementedError("DFT that is both inverse and onesided")

    def forward(self, data: Tensor, dft_length: Tensor | None = None, axis: Tensor | None = None) -> Tensor:
        length = None if dft_length is None else int(self.length(dft_length)[0])
        place = self.axis if axis is None else int(self.place(axis)[0])
        # The last axis goes, so an axis that is counted from the end is one less far from it.
        place = place + 1 if place < 0 else place
        with torch.autocast(data.device.type, enabled=False):
            numbers = data.float()[..., 0] if data.shape[-1] == 1 else torch.view_as_complex(data.float().contiguous())
            if self.onesided:
                return torch.view_as_real(torch.fft.rfft(numbers.real, length, place))
            transform = torch.fft.ifft if self.inverse else torch.fft.fft
            return torch.view_as_real(transform(numbers, length, place).resolve_conj())


@converts("STFT")
class STFT(nn.Module):
    """`STFT` of a signal (N, length, 1 or 2): (N, frames, frequencies, 2), as many whole frames as fit in."""

    def __init__(self, node: OnnxNode) -> None:
        super().__init__()
        self.onesided = bool(node.attributes.get("onesided", 1))
        self.step, self.length = Numbers(), Numbers()

    def forward(
        self, signal: Tensor, frame_step: Tensor, window: Tensor | None = None, frame_length: Tensor | None = None
    ) -> Tensor:
        step = int(self.step(frame_step)[0])
        length = int(self.length(frame_length)[0]) if window is None and frame_length is not None else None
        with torch.autocast(signal.device.type, enabled=False):
            whole = signal.float()
            numbers = whole[..., 0] if whole.shape[-1] == 1 else torch.view_as_complex(whole.contiguous())
            size = len(window) if window is not None else length
            assert size is not None, "ONNX asks for a window or a frame length"
            frames = numbers.unfold(-1, size, step)
            frames = frames if window is None else frames * window.float()
            return torch.view_as_real(torch.fft.rfft(frames) if self.onesided else torch.fft.fft(frames))
