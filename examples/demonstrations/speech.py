"""Synthetic speech: words spoken by eSpeak NG with the voices of many languages.

A voice reads an English word by the rules of its own language, which makes it an accent. Nothing
here was recorded: the differences between voices are those that a synthesiser makes.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
import zipfile
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .data import DataError, installed

INSTALL = "pip install espeakng-loader==0.2.4"
VERSION = "espeakng-loader 0.2.4, form 3"  # part of the cache's key
VARIANTS = ("m1", "m3", "m5", "m7", "f1", "f2", "f4", "f5")
VOICES_OF_A_LANGUAGE = 3
#: Languages that pronounce as many of the words alike count as one.
ALIKE = 0.7

RATE, SECONDS = 22_050, 0.8
NOISE = (10.0, 30.0)  # dB below the voice
FFT, HOP = 512, 441
BANDS, FRAMES = 32, 40
LOWEST, HIGHEST = 60.0, 8000.0  # Hz

# Constants of speak_lib.h, version 1.52.
_SYNCHRONOUS, _UTF8 = 2, 1
_SPEED, _PITCH, _SPREAD = 1, 3, 4


class Spoken(NamedTuple):
    """Every word in every voice."""

    spectra: Tensor  # float32 [N, 1, BANDS, FRAMES], log-mel
    words: Tensor  # int64 [N]
    languages: Tensor  # int64 [N]; languages that sound alike share a number


class _Voice(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("languages", ctypes.c_char_p),
        ("identifier", ctypes.c_char_p),
        ("numbers", ctypes.c_ubyte * 4),
        ("score", ctypes.c_int),
        ("spare", ctypes.c_void_p),
    )


class Synthesiser:
    """The library eSpeak NG, of which a process has one.

    Raises:
        DataError: the package is missing, or its library does not load here.
    """

    def __init__(self) -> None:
        path = installed("espeakng-loader", "phontab", INSTALL)
        self.dictionaries = path.parent
        ending = {"win32": "espeak-ng.dll", "darwin": "libespeak-ng.dylib"}
        library = path.parents[1] / ending.get(sys.platform, "libespeak-ng.so")
        try:
            self.lib = ctypes.CDLL(str(library))
        except OSError as error:
            raise DataError(f"eSpeak NG does not load ({error}); try: {INSTALL}") from None
        self.lib.espeak_ListVoices.restype = ctypes.POINTER(ctypes.POINTER(_Voice))
        self.lib.espeak_TextToPhonemes.restype = ctypes.c_char_p
        if self.lib.espeak_Initialize(_SYNCHRONOUS, 0, str(path.parent).encode(), 0) < 0:
            raise DataError(f"eSpeak NG does not start with {path.parent}; try: {INSTALL}")
        self._heard: list[np.ndarray] = []
        made = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
        )

        @made
        def keep(samples: ctypes._Pointer[ctypes.c_short], count: int, events: int) -> int:
            if samples and count > 0:
                self._heard.append(np.ctypeslib.as_array(samples, (count,)).copy())
            return 0

        self._keep = keep  # the library holds no reference to it
        self.lib.espeak_SetSynthCallback(keep)

    def voices(self) -> Iterator[str]:
        """Identifiers of all languages' voices, such as "gmw/de"."""
        listed, i = self.lib.espeak_ListVoices(None), 0
        while listed[i]:
            yield listed[i].contents.identifier.decode()
            i += 1

    def choose(self, voice: str) -> bool:
        """Speaks with this voice from now on; False if its language has no dictionary."""
        if not (self.dictionaries / f"{language(voice)}_dict").is_file():
            return False  # the library would complain on the terminal
        return self.lib.espeak_SetVoiceByName(voice.encode()) == 0

    def phonemes(self, word: str) -> str:
        """The word's sounds in the voice's language, without stress."""
        text = ctypes.c_char_p(word.encode())
        place = ctypes.pointer(ctypes.cast(text, ctypes.c_void_p))
        sounds = self.lib.espeak_TextToPhonemes(place, _UTF8, 0).decode()
        return sounds.translate(str.maketrans("", "", "',_")).strip()

    def say(self, word: str, rate: int, pitch: int, spread: int) -> np.ndarray:
        """float32 samples within ±1."""
        for parameter, value in ((_SPEED, rate), (_PITCH, pitch), (_SPREAD, spread)):
            self.lib.espeak_SetParameter(parameter, value, 0)
        self._heard.clear()
        # It draws the noise of breath and hiss, and seeds that by the clock when it starts.
        self.lib.espeak_ng_SetRandSeed(ctypes.c_long(rate))
        text = word.encode()
        failed = self.lib.espeak_Synth(text, len(text) + 1, 0, 0, 0, _UTF8, None, None)
        if failed or not self._heard:
            raise DataError(f"eSpeak NG says nothing for {word!r}; install it again: {INSTALL}")
        return np.concatenate(self._heard).astype(np.float32) / 2**15


def pronunciations(synthesiser: Synthesiser, words: Sequence[str]) -> dict[str, list[str]]:
    """Voices that tell the words apart by their own language's rules, and what they say.

    A language of another script hands Latin letters to the English voice or spells them, which
    the phonemes show as "(en)" and as spaces: it is left out. So is a dialect after the third.
    """
    found: dict[str, list[str]] = {}
    counts: dict[str, int] = {}
    for voice in sorted(synthesiser.voices()):
        if not synthesiser.choose(voice):
            continue
        sounds = [synthesiser.phonemes(word) for word in words]
        foreign = any("(" in sound or " " in sound for sound in sounds)
        of_language = counts.get(language(voice), 0)
        if foreign or len(set(sounds)) < len(words) or of_language == VOICES_OF_A_LANGUAGE:
            continue
        counts[language(voice)] = of_language + 1
        found[voice] = sounds
    return found


def language(voice: str) -> str:
    """The language of a voice's identifier: "gmw/en-US" is "en"."""
    return voice.rpartition("/")[2].split("-")[0].split("+")[0]


def groups(said: dict[str, list[str]]) -> dict[str, int]:
    """Voice → number of its group: one language, or several that sound alike."""
    number = {voice: i for i, voice in enumerate(said)}
    for one, other in combinations(said, 2):
        pairs = zip(said[one], said[other], strict=True)
        alike = sum(a == b for a, b in pairs) >= ALIKE * len(said[one])
        if (alike or language(one) == language(other)) and number[one] != number[other]:
            kept, gone = sorted((number[one], number[other]))
            number = {voice: kept if n == gone else n for voice, n in number.items()}
    order = {n: i for i, n in enumerate(sorted(set(number.values())))}
    return {voice: order[n] for voice, n in number.items()}


def synthesise(words: Sequence[str], seed: int = 0) -> Spoken:
    """Speaks every word in every voice and variant, each at a rate and a pitch of its own."""
    synthesiser = Synthesiser()
    said = pronunciations(synthesiser, words)
    of = groups(said)
    random = np.random.default_rng(seed)
    spectra, spoken, languages = [], [], []
    for voice, number in of.items():
        waves = []
        for variant in VARIANTS:
            synthesiser.choose(f"{voice}+{variant}")
            for label, word in enumerate(words):
                rate, pitch, spread = random.integers((130, 25, 20), (220, 75, 80)).tolist()
                waves.append(placed(synthesiser.say(word, rate, pitch, spread), random))
                spoken.append(label)
                languages.append(number)
        spectra.append(log_mel(torch.from_numpy(np.stack(waves))))
    return Spoken(torch.cat(spectra).unsqueeze(1), torch.tensor(spoken), torch.tensor(languages))


def placed(wave: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Puts a wave somewhere into `SECONDS`, with white noise some dB below it."""
    length = int(RATE * SECONDS)
    wave = wave[:length]
    out = np.zeros(length, np.float32)
    start = random.integers(length - len(wave) + 1)
    out[start : start + len(wave)] = wave
    loudness = np.sqrt(np.mean(np.square(wave))) * 10 ** (-random.uniform(*NOISE) / 20)
    return out + random.standard_normal(length, np.float32) * np.float32(loudness)


def filterbank() -> Tensor:
    """[BANDS, FFT // 2 + 1] triangles of one area, evenly spaced on the mel scale."""

    def mel(hertz: Tensor) -> Tensor:
        return 2595 * torch.log10(1 + hertz / 700)

    ends = mel(torch.tensor([LOWEST, HIGHEST]))
    edges = torch.linspace(ends[0].item(), ends[1].item(), BANDS + 2)
    place = mel(torch.linspace(0, RATE / 2, FFT // 2 + 1))
    rising = (place - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - place) / (edges[2:] - edges[1:-1])[:, None]
    triangles = torch.minimum(rising, falling).clamp(min=0)
    return triangles / triangles.sum(1, keepdim=True).clamp(min=1e-6)


def log_mel(waves: Tensor) -> Tensor:
    """float32 [N, BANDS, FRAMES] of [N, samples]."""
    window = torch.hann_window(FFT)
    power = torch.stft(waves, FFT, HOP, window=window, return_complex=True).abs().square()
    return torch.log(filterbank() @ power + 1e-6)[..., :FRAMES]


def load(words: Sequence[str], folder: Path) -> Spoken:
    """The spoken words from the folder, which they are written to the first time.

    A file that is damaged is made again.
    """
    key = hashlib.sha256(repr((VERSION, tuple(words), VARIANTS)).encode()).hexdigest()[:12]
    path = folder / f"speech-{key}.npz"
    if path.is_file():
        try:
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as kept:
                arrays = [torch.from_numpy(kept[name]) for name in Spoken._fields]
            if len({len(x) for x in arrays}) == 1 and arrays[0].shape[1:] == (1, BANDS, FRAMES):
                return Spoken(arrays[0].float(), *arrays[1:])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            pass
    made = synthesise(words)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.npz")
    half = made._replace(spectra=made.spectra.half())
    np.savez(unfinished, **{name: x.numpy() for name, x in half._asdict().items()})
    unfinished.replace(path)
    return half._replace(spectra=half.spectra.float())
