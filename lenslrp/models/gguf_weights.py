"""A language model from a GGUF file: read once by transformers' loader, kept as safetensors."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lenslrp.errors import LoadError
from lenslrp.files import whole
from lenslrp.progress import progress_bar

logger = logging.getLogger("lenslrp")


def convert_gguf(files: list[Path], folder: Path) -> None:
    """Write a GGUF model and its tokenizer into ``folder`` as float16 safetensors.

    Models loaded from GGUF refuse ``save_pretrained``, so the weights and the configuration are
    written out directly. Tied weights are written once.

    Raises:
        LoadError: the loader left quantised weights.
    """
    (gguf,) = files
    logger.info("converting %s, once", gguf.name)
    with progress_bar(f"converting {gguf.stem}, once", total=2, shown=True, unit="part") as bar:
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
        bar.update()
        source = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
        bar.update()
    weights: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in source.state_dict().items():
        if not tensor.is_floating_point():
            raise LoadError(f"{gguf.name}: {name} is still quantised ({tensor.dtype})")
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            weights[name] = tensor.half().contiguous()
    with whole(folder / "model.safetensors") as part:
        save_file(weights, part, metadata={"format": "pt"})
    config = source.config
    del config.quantization_config
    config.architectures = [type(source).__name__]
    config.dtype = torch.float16
    config.save_pretrained(folder)
