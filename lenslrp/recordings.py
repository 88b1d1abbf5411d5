"""Recordings: arrays and wav files, made into what a model reads by its own feature extractor.

Each is prepared as it is alone. Waveforms of unlike length are then padded with zeros on the right,
under a mask; spectrograms have one length.
"""

from __future__ import annotations

import wave
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lenslrp.errors import InputError, first_line

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

FRAME = {"ASTFeatureExtractor": (0.025, 0.010)}
"""Extractors that cut what is longer than ``max_length`` frames: seconds of a frame, and a step."""


def is_recording(value: Any) -> bool:
    """Whether something is an array, the path of a wav file, or a list of them."""
    one = value[0] if isinstance(value, list | tuple) and value else value
    return isinstance(one, np.ndarray | Path) or (
        isinstance(one, str) and one.lower().endswith(".wav")
    )


def features_of(
    model: TransformerBridge, name: str, recordings: Any
) -> tuple[dict[str, Tensor], Tensor | None]:
    """What a model reads of recordings, and the mask of waveforms of unlike length.

    Args:
        model: a ``TransformerBridge`` with the checkpoint's feature extractor as ``processor``.
        name: of what it reads.
        recordings: one, or a list of them: samples [sample] between -1 and 1 at the extractor's
            sampling rate, or the path of a wav file.

    Raises:
        InputError: no extractor, what is no recording, another sampling rate, or one that is
            longer than what the extractor makes of it.
    """
    extractor: Any = getattr(model, "processor", None)
    rate = getattr(extractor, "sampling_rate", None)
    if rate is None:
        raise InputError(
            "this model has no feature extractor: load it from a directory with "
            f"preprocessor_config.json, set model.processor, or give {name}="
        )
    given = recordings if isinstance(recordings, list | tuple) else [recordings]
    weight = next(p for p in model.parameters() if p.is_floating_point())
    rows: list[Tensor] = []
    for index, recording in enumerate(given):
        samples = _samples(recording, int(rate), f"recording {index}")
        longest = _longest(extractor)
        if longest is not None and len(samples) > longest:
            raise InputError(
                f"recording {index} has {len(samples)} samples, and {type(extractor).__name__} "
                f"reads {longest} ({longest / rate:g} s): cut it"
            )
        made = extractor(samples, sampling_rate=rate, return_tensors="pt")
        rows.append(made[name][0].to(weight.dtype))
    lengths = torch.tensor([len(row) for row in rows])
    if len({*map(len, rows)}) == 1:
        return {name: torch.stack(rows)}, None
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return {name: torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)}, mask.long()


def _samples(recording: Any, rate: int, what: str) -> np.ndarray[Any, Any]:
    if isinstance(recording, str | Path):
        return _read(Path(recording), rate)
    if not isinstance(recording, np.ndarray) or recording.ndim != 1 or not len(recording):
        shape = getattr(recording, "shape", None)
        got = type(recording).__name__ if shape is None else f"an array {list(shape)}"
        raise InputError(f"{what} must be an array [sample] of one channel, not {got}")
    if not np.issubdtype(recording.dtype, np.floating):
        raise InputError(f"{what} is {recording.dtype}: samples are floats between -1 and 1")
    return recording


def _read(path: Path, rate: int) -> np.ndarray[Any, Any]:
    """The samples of a wav file, between -1 and 1."""
    try:
        with wave.open(str(path), "rb") as file:
            width, channels, own = file.getsampwidth(), file.getnchannels(), file.getframerate()
            data = file.readframes(file.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise InputError(f"{path} cannot be read as a wav file: {first_line(error)}") from error
    if own != rate:
        raise InputError(f"{path} is sampled at {own} Hz, and the model reads {rate} Hz: resample")
    if channels != 1 or width not in (2, 4):
        raise InputError(
            f"{path} has {channels} channels of {8 * width} bits: give one channel of 16 or 32 "
            "bits, or an array"
        )
    samples: np.ndarray[Any, Any] = np.frombuffer(data, f"<i{width}").astype(np.float32)
    if not len(samples):
        raise InputError(f"{path} has no samples")
    return samples / np.float32(1 << (8 * width - 1))


def _longest(extractor: Any) -> int | None:
    """The samples beyond which an extractor cuts a recording off; ``None`` where it never does."""
    frame = FRAME.get(type(extractor).__name__)
    if frame is None:
        length = getattr(extractor, "n_samples", None)
        return None if length is None else int(length)
    size, step = (round(seconds * extractor.sampling_rate) for seconds in frame)
    return int(size + step * extractor.max_length - 1)
