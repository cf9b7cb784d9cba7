"""Pictures of nothing that a convolution takes for photographs: 1/f noise and dead leaves.

What they share with photographs is generic: power that falls with the frequency, colour channels that
vary together, things that hide each other behind sharp edges, and a brightness and a contrast that differ
from one picture to the next. No statistic of any data set went in. `TEXTURE` and `LEAVES` were raised from
first guesses of 1 and 24 because students of one CIFAR-10 teacher then did better on held-out training images.

A picture is made of random numbers of its own by element-wise operations, so it is the same to the bit
whatever pictures are made beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

SLOPES = (0.7, 1.7)
"""Exponents a of the amplitude 1/f^a, one drawn for every picture; photographs have about 1."""
SHARED = (0.6, 1.0)
"""Part of a texture's variance that all channels have in common, drawn for every picture."""
LEAF_SHARED = 0.85
"""The same for the colours of leaves."""
TEXTURE = 2.0
"""Largest deviation of the texture on a leaf, where the colours of leaves have 1."""
GRADIENT = 0.7
"""Deviation of the shading over a leaf's radius."""
RADII = (1 / 20, 0.6)
"""Least and largest radius of a leaf, by the shorter side of the picture."""
LEAVES = 32
"""Leaves in a picture of 32 by 32; more and smaller ones in a larger picture."""
ASPECT = 0.8
"""Largest logarithm of a leaf's length over its width."""
BLUR = 0.2
"""Largest weight of each neighbour where edges are softened."""
BRIGHTNESS = 0.5
"""Deviation of a picture's mean, where all pixels of all pictures have 1."""
TINT = 0.2
"""The same for each channel by itself."""
CONTRAST = 0.35
"""Deviation of the logarithm of a picture's contrast."""

_SIDE = 32
_PIXELS = 2**14
"""Pixels worked on at a time: 64 KiB of floats a plane stay in a core's cache."""
_PER_LEAF = 7
"""Uniform numbers for the radius, the aspect, the angle, the place (2) and the texture of a leaf, and one to spare."""


@dataclass(frozen=True)
class Painter:
    """Makes pictures of one size: `normals` and `uniforms` random numbers each, in any batches."""

    channels: int
    height: int
    width: int
    leaves: int = 0
    """Leaves in a picture; 0: 1/f noise alone."""
    slopes: tuple[float, float] = SLOPES

    @classmethod
    def of_leaves(cls, channels: int, height: int, width: int) -> Painter:
        """As many leaves as suit the size: twice as many where the sides are four times as long."""
        return cls(channels, height, width, max(8, round(LEAVES * math.sqrt(min(height, width) / _SIDE))))

    @property
    def normals(self) -> int:
        """Standard normal numbers that a picture takes."""
        return self._spectrum + self.leaves * (self.channels + 3) + 2 * self.channels + 2

    @property
    def uniforms(self) -> int:
        """Numbers from 0 to 1 that a picture takes."""
        return self.leaves * _PER_LEAF + 3

    def paint(self, normal: Array, uniform: Array) -> Array:
        """Pictures (n, channels, height, width) of mean 0 and deviation 1 over all their pixels.

        Args:
            normal: (n, normals), standard normal.
            uniform: (n, uniforms), from 0 to 1.
        """
        pictures = np.empty((len(normal), self.channels, self.height, self.width), np.float32)
        step = max(1, _PIXELS // (self.height * self.width))
        for start in range(0, len(normal), step):
            part = slice(start, start + step)
            pictures[part] = self._paint(normal[part], uniform[part])
        return pictures

    def _paint(self, normal: Array, uniform: Array) -> Array:
        ends = np.cumsum([self._spectrum, self.leaves * (self.channels + 3), self.channels])
        spectrum, leaf_normal, tint, own = np.split(normal, ends, axis=1)
        leaf_uniform, (slope, shared, blur) = uniform[:, :-3], uniform[:, -3:].T
        planes = self._texture(spectrum, _between(self.slopes, slope))
        picture = _mix(tint[:, :, None, None] * planes[:, :1], planes[:, 1:], _between(SHARED, shared))
        if self.leaves:
            shape = (len(normal), self.leaves, -1)
            picture = self._fall(leaf_normal.reshape(shape), leaf_uniform.reshape(shape), picture)
            picture = soften(picture, BLUR * blur)
        return expose(picture, own)

    @property
    def _spectrum(self) -> int:
        return 2 * self.height * (self.width // 2 + 1) * 2

    def _texture(self, normal: Array, slope: Array) -> Array:
        """Two planes of 1/f^slope noise with mean 0 and deviation 1: of colour, and of brightness."""
        logarithm, weight = self._frequencies
        amplitude = np.exp(-slope[:, None, None] * logarithm)
        amplitude[:, 0, 0] = 0
        power = (np.square(amplitude) * weight).reshape(len(amplitude), -1).sum(axis=1)
        # A term and its conjugate add up; where a column is its own conjugate's, `irfft2` keeps half of its power.
        amplitude *= self.height * self.width / np.sqrt(np.maximum(power, 1e-30))[:, None, None]
        amplitude *= np.where(weight == 1, 1, math.sqrt(0.5))
        size = (self.height, self.width)
        terms = np.ascontiguousarray(normal).view(np.complex64)
        terms = terms.reshape(len(normal), 2, self.height, self.width // 2 + 1)
        planes = np.empty((*terms.shape[:2], *size), np.float32)
        for plane, term, scale in zip(planes, terms, amplitude, strict=True):
            # One by one: the transform of many at a time may round otherwise.
            plane[...] = np.fft.irfft2(term * scale, s=size)
        return planes

    @cached_property
    def _frequencies(self) -> tuple[Array, Array]:
        """For each term of `irfft2`: logarithm of the frequency, and how many terms of `ifft2` it stands for."""
        rows, columns = np.fft.fftfreq(self.height)[:, None], np.fft.rfftfreq(self.width)[None]
        frequency = np.sqrt(rows * rows + columns * columns)
        frequency[0, 0] = 1
        weight = np.full(frequency.shape[1], 2, np.float32)
        weight[0] = 1
        if self.width % 2 == 0:
            weight[-1] = 1
        return np.log(frequency).astype(np.float32), weight

    def _fall(self, normal: Array, uniform: Array, texture: Array) -> Array:
        """Leaves over each other, each with a colour, a shading and a part of the texture.

        The radii have a density of r^-3, by which a picture has no scale of its own (Ruderman 1997; Lee, Mumford
        and Huang 2001). Every second leaf is a rectangle.
        """
        count, channels = len(normal), self.channels
        radius = self._radii(uniform[:, :, 0])
        place = uniform[:, :, 3:5] * np.array([self.height, self.width], np.float32)
        labels = self._labels(radius, uniform, place)
        colour = _mix(normal[:, :, :channels], normal[:, :, channels : channels + 1], np.float32(LEAF_SHARED))
        slope = normal[:, :, channels + 1 :] * (GRADIENT / radius)[:, :, None]
        # Brightness is c + s (x - x0): the part that is the same all over the leaf goes into its colour.
        colour = colour - (slope * place).sum(axis=2, keepdims=True)
        table = np.concatenate([colour, slope, TEXTURE * np.square(uniform[:, :, 5:6])], axis=2)
        table = np.ascontiguousarray(table.transpose(2, 0, 1)).reshape(channels + 3, -1)
        index = labels.astype(np.intp) + (np.arange(count) * self.leaves)[:, None, None]
        rows, columns, amount = (np.take(part, index, mode="clip") for part in table[channels:])
        shade = rows * _centres(self.height)[:, None] + columns * _centres(self.width)
        picture: Array = texture * amount[:, None]
        for channel in range(channels):
            picture[:, channel] += np.take(table[channel], index, mode="clip")
            picture[:, channel] += shade
        return picture

    def _radii(self, uniform: Array) -> Array:
        side = min(self.height, self.width)
        # In a larger picture leaves are smaller, but not by as much: there is texture for what is smaller still.
        least, largest = max(1.0, RADII[0] * math.sqrt(_SIDE * side)), max(1.5, RADII[1] * side)
        return np.asarray(1 / np.sqrt(least**-2 - uniform * (least**-2 - largest**-2)), np.float32)

    def _labels(self, radius: Array, uniform: Array, place: Array) -> NDArray[np.uint16]:
        """Which leaf lies uppermost at every pixel: (n, height, width); the first covers all."""
        stretch = np.exp((uniform[:, :, 1] - 0.5) * ASPECT)
        angle = uniform[:, :, 2] * math.pi
        cosine, sine = np.cos(angle), np.sin(angle)
        along, across = 1 / (radius * stretch), stretch / radius
        down, right = (
            _centres(size)[:, None, None] - place[:, :, axis] for axis, size in enumerate((self.height, self.width))
        )
        down, right = down.transpose(1, 2, 0)[..., None], right.transpose(1, 2, 0)[:, :, None]
        labels = np.zeros((len(radius), self.height, self.width), np.uint16)
        one, other = np.empty(labels.shape, np.float32), np.empty(labels.shape, np.float32)
        inside, raised = np.empty(labels.shape, np.bool_), np.empty_like(labels)
        for leaf in range(1, self.leaves):
            a, b, c, s = (part[:, leaf, None, None] for part in (along, across, cosine, sine))
            np.add(s * a * down[:, leaf], c * a * right[:, leaf], out=one)
            np.subtract(c * b * down[:, leaf], s * b * right[:, leaf], out=other)
            if leaf % 2:
                np.add(np.square(one, out=one), np.square(other, out=other), out=one)
            else:
                np.maximum(np.abs(one, out=one), np.abs(other, out=other), out=one)
            np.less(one, 1, out=inside)
            np.multiply(inside, np.uint16(leaf), out=raised)
            np.maximum(labels, raised, out=labels)
        return labels


def soften(picture: Array, weight: Array) -> Array:
    """Each pixel averaged with its neighbours, of this weight (n) each, first down, then across."""
    side = weight[:, None, None, None]
    for axis in (2, 3):
        near, rest = np.moveaxis(picture * side, axis, 0), np.moveaxis(picture * (1 - 2 * side), axis, 0)
        rest[1:] += near[:-1]
        rest[:-1] += near[1:]
        rest[0] += near[0]
        rest[-1] += near[-1]
        picture = np.moveaxis(rest, 0, axis)
    return picture


def expose(picture: Array, normal: Array) -> Array:
    """Each picture standardised, then given a contrast, a brightness and a tint by channels + 2 normal numbers."""
    count, channels = picture.shape[:2]
    flat = picture.reshape(count, -1)
    flat = flat - flat.mean(axis=1, keepdims=True)
    flat /= np.sqrt(np.square(flat).mean(axis=1, keepdims=True)) + 1e-6
    rest = math.sqrt(1 - BRIGHTNESS**2 - TINT**2)  # what is left of the variance for what is inside a picture
    contrast = rest * np.exp(CONTRAST * normal[:, :1] - CONTRAST**2)
    mean = BRIGHTNESS * normal[:, 1:2] + TINT * normal[:, 2:]
    exposed = (flat * contrast).reshape(picture.shape) + mean.reshape(count, channels, 1, 1)
    return np.asarray(exposed, np.float32)


def _between(limits: tuple[float, float], uniform: Array) -> Array:
    return np.asarray(limits[0] + (limits[1] - limits[0]) * uniform, np.float32)


def _mix(own: Array, common: Array, share: Array | np.float32) -> Array:
    """Values of which the part `share` (n) of the variance is common to all channels."""
    share = np.reshape(share, (-1, *(1,) * (own.ndim - 1)))
    return np.asarray(np.sqrt(1 - share) * own + np.sqrt(share) * common, np.float32)


def _centres(size: int) -> Array:
    return np.arange(size, dtype=np.float32) + np.float32(0.5)
