"""A small drum synthesiser: grooves as sound, without samples."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np

RATE = 22050


def sounds(rate: int = RATE) -> np.ndarray:
    """(6, n) one stroke of each drum, from decaying noise and sine sweeps."""
    t = np.arange(int(0.6 * rate)) / rate
    noise = np.random.default_rng(0).standard_normal(len(t))
    bright = np.diff(noise, prepend=0.0)  # a first difference lifts high frequencies

    def sweep(start: float, end: float, decay: float) -> np.ndarray:
        return np.sin(2 * np.pi * (end * t + (start - end) * (1 - np.exp(-t * decay)) / decay))

    made = {  # in the order of a line's columns
        "crash": 0.35 * bright * np.exp(-t * 6),
        "ride": 0.12 * bright * np.exp(-t * 9) + 0.1 * np.sin(2 * np.pi * 3100 * t) * np.exp(-t * 8),
        "snare": 0.5 * noise * np.exp(-t * 22) + 0.4 * sweep(260, 180, 40) * np.exp(-t * 25),
        "kick": 1.0 * sweep(150, 48, 30) * np.exp(-t * 10),
        "hi-hat": 0.25 * bright * np.exp(-t * 45),
        "toms": 0.8 * sweep(190, 110, 12) * np.exp(-t * 9),
    }
    return np.stack(list(made.values()))


def render(lines: np.ndarray, bpm: float = 100.0, rate: int = RATE) -> np.ndarray:
    """Samples in [-1, 1] of a piece at a tempo.

    Raises:
        ValueError: the tempo is not positive, or a line is not a number from 0 to 63.
    """
    if bpm <= 0:
        raise ValueError(f"bpm is {bpm}, expected a positive number")
    lines = np.asarray(lines)
    if len(lines) and not (lines.min() >= 0 and lines.max() < 64):
        raise ValueError("lines must be numbers from 0 to 63")
    kit = sounds(rate)
    starts = np.round(np.arange(len(lines)) * rate * 15 / bpm).astype(int)
    out = np.zeros(len(lines) and int(starts[-1]) + kit.shape[1])
    for drum in range(6):  # one convolution a drum
        hits = starts[(lines >> (5 - drum) & 1).astype(bool)]
        if len(hits):
            places = hits[:, None] + np.arange(kit.shape[1])
            out += np.bincount(places.ravel(), np.tile(kit[drum], len(hits)), minlength=len(out))
    return np.tanh(out)


def write_wav(path: Path, lines: np.ndarray, bpm: float = 100.0, rate: int = RATE) -> None:
    """A piece as a 16-bit mono WAV file."""
    samples = (render(lines, bpm, rate) * 32000).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())
