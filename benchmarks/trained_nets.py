"""Trained nets to be made smaller, each with inputs to calibrate on, data to finetune on, and what it is judged by.

One is trained by others and ships in a package: the voice encoder of resemblyzer, on speech that espeak-ng speaks. Two
are trained here, in minutes, and kept in a folder: a language model on the sources of Python's standard library, and a
ResNet-20 on CIFAR-10. What is measured on, and what is calibrated and finetuned on, are apart: other speakers and
sentences, other files, other images.
"""

from __future__ import annotations

import io
import itertools
import math
import os
import shutil
import subprocess
import sys
import wave
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from harness import progress
from quality import Data, Setting, accuracy, cosine, dense
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]  # inputs, and labels where the net has any (else the inputs once more)


@dataclass(frozen=True)
class TrainedNet:
    """A trained net and all that is needed to compress it, train it on, and judge it.

    Attributes:
        name: What it is called in tables.
        model: In evaluation mode; ``model(inputs)`` gives one tensor.
        measure: What :attr:`quality` measures, with its unit.
        higher_is_better: Whether more of it is better.
        quality: Measures a model on data that nothing else sees.
        inputs: ``inputs(generator, count)`` draws inputs, without labels, to calibrate on.
        batches: ``batches(seed)`` gives batches to finetune on, without end.
        held_out: Batches of the same kind that a learning rate is chosen by.
        labeled: The loss of outputs against labels; None where there are none.
        distance: Of outputs from the original's, to distill by.
        rates: Learning rates to choose from.
    """

    name: str
    model: nn.Module
    measure: str
    higher_is_better: bool
    quality: Callable[[nn.Module], float]
    inputs: Callable[[torch.Generator, int], Tensor]
    batches: Callable[[int], Iterator[Batch]]
    held_out: Sequence[Batch]
    labeled: Callable[[Tensor, Tensor], Tensor] | None
    distance: Callable[[Tensor, Tensor], Tensor]
    rates: tuple[float, ...] = (1e-4, 5e-4, 2e-3)

    def calibration(self, seed: int, count: int, size: int = 16) -> list[Tensor]:
        """Batches of what ``model(x)`` takes, ``count`` inputs in all."""
        return [*self.inputs(torch.Generator().manual_seed(seed), count).split(size)]


def divergence(outputs: Tensor, originals: Tensor) -> Tensor:
    """The mean Kullback-Leibler divergence from the original's classes, of logits (..., classes)."""
    classes = outputs.shape[-1]
    logs = [F.log_softmax(logits.reshape(-1, classes), -1) for logits in (outputs, originals)]
    return F.kl_div(*logs, reduction="batchmean", log_target=True)


def drawn(inputs: Tensor) -> Callable[[torch.Generator, int], Tensor]:
    """Draws so many of these inputs, each at most once."""

    def draw(generator: torch.Generator, count: int) -> Tensor:
        return inputs[torch.randperm(len(inputs), generator=generator)[:count]]

    return draw


# --------------------------------------------------------------------------------------------------------------- voice

WHEEL = "resemblyzer==0.1.4"
RATE, WINDOW, STEP, BANDS = 16_000, 400, 160, 40  # samples a second, a window, a step; mel bands
FRAMES = 160  # of what the encoder gets at once
LOUDNESS = 10 ** (-30 / 20)
PITCHES = (40, 50, 60)
TEST_VOICES = ("f1", "f2", "f3", "f4", "m1", "m2", "m3", "m4", "m5", "m6", "m7", "Andy", "Annie", "Alex", "linda", "ed")
OTHER_VOICES = ("f5", "m8", "belinda", "david", "steph", "paul", "Alicia", "john", "max", "quincy", "rob", "anika")
TEST_SENTENCES = (
    "The birch canoe slid on the smooth planks, and the lake lay still below it.",
    "Glue the sheet to the dark blue background before the paint has dried.",
    "It is easy to tell the depth of a well by the echo of a falling stone.",
    "These days a chicken leg is a rare dish, served on cold winter evenings.",
)
OTHER_SENTENCES = (
    "A large box was thrown beside the parked truck at the end of the road.",
    "The hogs were fed chopped corn and garbage early in the morning.",
    "Four hours of steady work faced us before we could go home to rest.",
    "A large size in stockings is hard to sell to people in this town.",
    "The boy was there when the sun rose over the hills and the harbor.",
    "A rod is used to catch pink salmon where the river meets the sea.",
)


class VoiceEncoder(nn.Module):
    """What resemblyzer's encoder computes: embeddings of unit length (n, 256) of mel frames (n, 160, 40)."""

    def __init__(self, width: int = 256, layers: int = 3) -> None:
        super().__init__()
        self.lstm = nn.LSTM(BANDS, width, layers, batch_first=True)
        self.linear = nn.Linear(width, width)

    def forward(self, frames: Tensor) -> Tensor:
        _, (hidden, _) = self.lstm(frames)
        return F.normalize(F.relu(self.linear(hidden[-1])), dim=1)


def mel_filters() -> Tensor:
    """Slaney's triangular filters of equal area (bands, frequencies), linear up to 1 kHz and logarithmic above."""
    linear, step = 3 / 200, math.log(6.4) / 27  # bands for each Hz, and natural logarithm of Hz for each band
    top = 15 + math.log(RATE / 2 / 1000) / step
    mels = torch.linspace(0, top, BANDS + 2, dtype=torch.float64)
    edges = torch.where(mels < 15, mels / linear, 1000 * torch.exp(step * (mels - 15)))
    frequencies = torch.linspace(0, RATE / 2, WINDOW // 2 + 1, dtype=torch.float64)
    rising = (frequencies - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - frequencies) / (edges[2:] - edges[1:-1])[:, None]
    return torch.minimum(rising, falling).clamp_min(0) * (2 / (edges[2:] - edges[:-2]))[:, None]


def mel_frames(samples: Tensor) -> Tensor:
    """The power of each band (frames, bands) of 16 kHz sound, as ``librosa.feature.melspectrogram`` gives it."""
    window = torch.hann_window(WINDOW, dtype=samples.dtype)
    waves = torch.stft(samples, WINDOW, STEP, window=window, pad_mode="constant", return_complex=True)
    return (mel_filters().to(samples.dtype) @ waves.abs().square()).T


def spoken(voice: str, pitch: int, sentence: str) -> Tensor:
    """One sentence as mel frames, as loud as resemblyzer makes what is not loud enough."""
    from scipy.signal import resample_poly

    command = ["espeak-ng", "-v", f"en-us+{voice}", "-p", str(pitch), "--stdout", sentence]
    sound = subprocess.run(command, check=True, capture_output=True).stdout
    with wave.open(io.BytesIO(sound)) as file:  # a stream's header does not know the length
        rate, data = file.getframerate(), sound[44:]
    samples = numpy.frombuffer(data[: len(data) // 2 * 2], "<i2") / 32768
    common = math.gcd(RATE, rate)
    samples = torch.from_numpy(resample_poly(samples, RATE // common, rate // common))
    return mel_frames(samples * max(1.0, LOUDNESS / float(samples.square().mean().sqrt()))).float()


def speech(cache: Path) -> list[tuple[int, Tensor]]:
    """Speaker and mel frames of every utterance, those of the test first; spoken once and kept in a file."""
    path = cache / "voice-frames.npz"
    if not path.exists():
        if shutil.which("espeak-ng") is None:
            raise SystemExit("the voice encoder is measured on the speech of espeak-ng: apt-get install espeak-ng")
        progress("espeak-ng speaks")
        parts = ((TEST_VOICES, TEST_SENTENCES), (OTHER_VOICES, OTHER_SENTENCES))
        speakers, utterances = [], []
        for speaker, (voice, pitch, sentences) in enumerate(
            (voice, pitch, sentences) for voices, sentences in parts for voice in voices for pitch in PITCHES
        ):
            for sentence in sentences:
                speakers.append(speaker)
                utterances.append(spoken(voice, pitch, sentence).numpy())
        ends = numpy.cumsum([len(utterance) for utterance in utterances])
        numpy.savez_compressed(path, frames=numpy.concatenate(utterances), ends=ends, speakers=speakers)
    with numpy.load(path) as file:
        frames, ends, speakers = (torch.from_numpy(file[key]) for key in ("frames", "ends", "speakers"))
    return [*zip(speakers.tolist(), frames.tensor_split(ends[:-1]), strict=True)]


def partials(utterance: Tensor) -> Tensor:
    """Windows of 160 frames (n, 160, bands), each half over the next, silence behind the last."""
    count = max(1, math.ceil((len(utterance) - FRAMES) / (FRAMES // 2)) + 1)
    length = FRAMES + (count - 1) * (FRAMES // 2)
    padded = F.pad(utterance, (0, 0, 0, max(0, length - len(utterance))))
    return padded[:length].unfold(0, FRAMES, FRAMES // 2).transpose(1, 2).contiguous()


def equal_error_rate(embeddings: Tensor, speakers: Tensor) -> float:
    """Percent of pairs taken wrongly where as many of one speaker are refused as of two are accepted."""
    rows, columns = torch.triu_indices(len(speakers), len(speakers), 1)
    likeness = (embeddings @ embeddings.T)[rows, columns]
    same = (speakers[rows] == speakers[columns])[likeness.argsort()]
    refused = same.cumsum(0) / same.sum()
    accepted = 1 - (~same).cumsum(0) / (~same).sum()
    nearest = int((refused - accepted).abs().argmin())
    return 50 * float(refused[nearest] + accepted[nearest])


def voice(cache: Path, data: Path | None) -> TrainedNet:
    """Resemblyzer's voice encoder, judged by telling voices apart that it was never trained on."""
    wheel = next(cache.glob("[Rr]esemblyzer-*.whl"), None)
    if wheel is None:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache), WHEEL]
        subprocess.run(pip, check=True)
        wheel = next(cache.glob("[Rr]esemblyzer-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        file = io.BytesIO(archive.read("resemblyzer/pretrained.pt"))
    weights = torch.load(file, map_location="cpu", weights_only=True)["model_state"]
    model = VoiceEncoder().eval()
    model.load_state_dict({key: value for key, value in weights.items() if not key.startswith("similarity")})

    utterances = speech(cache)
    test_speakers = len(TEST_VOICES) * len(PITCHES)
    tests = [(speaker, partials(frames)) for speaker, frames in utterances if speaker < test_speakers]
    others = torch.cat([partials(frames) for speaker, frames in utterances if speaker >= test_speakers])
    # By strides: each speaker and sentence is in both.
    held, rest = others[::8], torch.cat([others[start::8] for start in range(1, 8)])
    speakers, sizes = torch.tensor([speaker for speaker, _ in tests]), [len(part) for _, part in tests]
    windows = torch.cat([part for _, part in tests])

    @torch.inference_mode()
    def quality(model: nn.Module) -> float:
        parts = torch.cat([model(batch) for batch in windows.split(128)]).split(sizes)
        return equal_error_rate(F.normalize(torch.stack([part.mean(0) for part in parts])), speakers)

    def batches(seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            for chosen in torch.randperm(len(rest), generator=generator).split(32)[:-1]:
                yield rest[chosen], rest[chosen]

    def distance(outputs: Tensor, originals: Tensor) -> Tensor:
        return (outputs - originals).square().sum(-1).mean()

    held_out = [(batch, batch) for batch in held.split(64)]
    return TrainedNet(
        *("voice", model, "equal error rate, %", False, quality, drawn(rest), batches, held_out, None, distance)
    )


# ---------------------------------------------------------------------------------------------------------------- text

LENGTH = 128  # bytes of one input
TEXT_STEPS = 800
HELD_FILES = 10  # one file of so many is measured on


class LanguageModel(nn.Module):
    """A transformer of transformers' Llama kind on bytes: logits (n, length, 256) of the next byte."""

    def __init__(self, width: int = 128, blocks: int = 6, heads: int | None = None) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = {"hidden_size": width, "intermediate_size": 8 * width // 3, "num_attention_heads": heads or width // 32}
        longest = {"max_position_embeddings": LENGTH, "tie_word_embeddings": False, "use_cache": False}
        tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        self.net = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_hidden_layers=blocks, **sizes, **longest, **tokens))

    def forward(self, text: Tensor) -> Tensor:
        return self.net(input_ids=text, use_cache=False, return_dict=False)[0]


def sources() -> tuple[Tensor, Tensor]:
    """Bytes of the standard library's modules, to train on and to measure on."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    tests = files[::HELD_FILES]
    parts = [file for file in files if file not in tests], tests
    train, test = (
        torch.frombuffer(bytearray().join(file.read_bytes() for file in part), dtype=torch.uint8) for part in parts
    )
    return train, test


def windows_of(text: Tensor, starts: Tensor) -> Batch:
    """Bytes from each start on, and the byte after each."""
    window = text[starts[:, None] + torch.arange(LENGTH + 1)].long()
    return window[:, :-1], window[:, 1:]


def next_byte_loss(logits: Tensor, text: Tensor) -> Tensor:
    """Cross entropy of bytes (n, length)."""
    return F.cross_entropy(logits.flatten(0, 1), text.flatten())


def random_windows(text: Tensor, size: int, generator: torch.Generator) -> Batch:
    """From so many random starts."""
    return windows_of(text, torch.randint(len(text) - LENGTH, (size,), generator=generator))


def warm_cosine(done: float) -> float:
    """A rate that rises over the first twentieth of the steps and falls to nothing by a cosine."""
    return min(20 * done, cosine(done))


def train_text(model: nn.Module, text: Tensor, steps: int, rate: float = 3e-3, size: int = 32) -> None:
    """AdamW, with a warm-up and a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.95), weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for step in range(steps):
        done = (step + 1) / steps
        for group in optimizer.param_groups:
            group["lr"] = rate * warm_cosine(done)
        inputs, following = random_windows(text, size, generator)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(inputs)
        loss = next_byte_loss(logits.float(), following)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            progress(f"the language model, step {step} of {steps}, loss {float(loss.detach()):.3f}")
    model.eval()


def text(cache: Path, data: Path | None) -> TrainedNet:
    """A language model, judged by how often the most likely byte is the next one."""
    train, test = sources()
    torch.manual_seed(0)
    model = LanguageModel().eval()
    path = cache / "text.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
    else:
        train_text(model, train, TEXT_STEPS)
        torch.save(model.state_dict(), path)
    train, held = train[: -len(train) // 20], train[-len(train) // 20 :]
    tests = windows_of(test, torch.linspace(0, len(test) - LENGTH - 1, 256).long())

    @torch.inference_mode()
    def quality(model: nn.Module) -> float:
        right = [model(x).argmax(-1) == y for x, y in zip(*(part.split(32) for part in tests), strict=True)]
        return 100 * float(torch.cat(right).float().mean())

    def batches(seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield random_windows(train, 16, generator)

    def inputs(generator: torch.Generator, count: int) -> Tensor:
        return random_windows(train, count, generator)[0]

    held_out = [random_windows(held, 32, torch.Generator().manual_seed(0))]
    return TrainedNet(
        *("text", model, "next bytes right, %", True, quality, inputs, batches, held_out, next_byte_loss, divergence)
    )


# -------------------------------------------------------------------------------------------------------------- images

TEST_IMAGES = 4000


def images(cache: Path, data: Path | None) -> TrainedNet:
    """A ResNet-20 of 8,000 images of CIFAR-10, judged by its accuracy."""
    of = Data("cifar10", data, 8000, TEST_IMAGES)
    setting = Setting(of, "resnet20", 24, 128, 0.1, "bf16-mixed", "channel", seed=0)
    path = cache / "resnet20.pt"
    if path.exists():
        model = setting.build()
        model.load_state_dict(torch.load(path, weights_only=True))
    else:
        progress("ResNet-20 is trained")
        model = dense(setting)
        torch.save(model.state_dict(), path)
    every, labels = of.images().train
    held_out = [*zip(every[-512:].split(128), labels[-512:].split(128), strict=True)]

    def quality(model: nn.Module) -> float:
        return 100 * accuracy(model, setting)

    def batches(seed: int) -> Iterator[Batch]:
        for epoch in itertools.count():
            yield from of.images().batches(64, 1 + seed, epoch)

    return TrainedNet(
        *("images", model.eval(), "accuracy, %", True, quality, drawn(every[:-512]), batches, held_out),
        labeled=F.cross_entropy,
        distance=divergence,
    )


NETS: dict[str, Callable[[Path, Path | None], TrainedNet]] = {"voice": voice, "text": text, "images": images}
