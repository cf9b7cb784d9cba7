"""Voices without a recording: a source of pulses through moving formants, between pauses, tones and noise."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.signal import lfilter

RATE = 16_000
"""Samples a second."""
_VOWELS = (
    (730, 1090, 2440),
    (270, 2290, 3010),
    (300, 870, 2240),
    (530, 1840, 2480),
    (570, 840, 2410),
    (490, 1350, 1690),
)
"""First three formants of vowels, in Hz."""

Wave = NDArray[np.float32]


def clip(rng: np.random.Generator, seconds: float) -> Wave:
    """Stretches of voice, pause, tone and noise, with noise over all of it."""
    parts: list[Wave] = []
    while sum(map(len, parts)) < seconds * RATE:
        length = int(rng.uniform(0.2, 1.5) * RATE)
        kind = rng.choice(["voice", "voice", "pause", "tone", "noise"])
        loud = float(10 ** rng.uniform(-1.6, -0.3))
        parts.append((loud * _stretch(rng, str(kind), length)).astype(np.float32))
    sweep = np.concatenate(parts)[: int(seconds * RATE)]
    return (sweep + rng.normal(0, 10 ** rng.uniform(-4, -2), len(sweep))).astype(np.float32)


def _stretch(rng: np.random.Generator, kind: str, length: int) -> NDArray[np.float64]:
    if kind == "voice":
        return _voice(rng, length)
    if kind == "tone":
        times = np.arange(length) / RATE
        return np.asarray(sum(np.sin(2 * np.pi * f * times) for f in rng.uniform(100, 3000, 3)) / 3)
    return rng.normal(0, 0.3, length) if kind == "noise" else np.zeros(length)


def _voice(rng: np.random.Generator, length: int) -> NDArray[np.float64]:
    """Syllables: a vowel each, hissed into now and then, swelling and fading."""
    pitch = rng.uniform(85, 250) * np.exp(np.cumsum(rng.normal(0, 0.0006, length)))
    pulses = np.diff(np.floor(np.cumsum(pitch / RATE)), prepend=0.0) + rng.normal(0, 0.02, length)
    source = lfilter([1.0], [1.0, -0.95], pulses)
    out = np.zeros(length)
    start = 0
    while start < length:
        stop = min(length, start + int(rng.uniform(0.08, 0.3) * RATE))
        piece = source[start:stop]
        if rng.random() < 0.2:
            piece = lfilter([1.0, -0.9], [1.0], rng.normal(0, 1.0, stop - start))
        for formant in _VOWELS[int(rng.integers(0, len(_VOWELS)))]:
            piece = _resonance(piece, formant * rng.uniform(0.9, 1.1), rng.uniform(60, 120))
        envelope = np.hanning(max(2, stop - start))[: stop - start]
        out[start:stop] = envelope * piece / (np.abs(piece).max() + 1e-9)
        start = stop
    return out


def _resonance(sweep: NDArray[np.float64], frequency: float, width: float) -> NDArray[np.float64]:
    radius = np.exp(-np.pi * width / RATE)
    return np.asarray(lfilter([1.0], [1.0, -2 * radius * np.cos(2 * np.pi * frequency / RATE), radius**2], sweep))
