# SPDX-License-Identifier: Apache-2.0
"""More models of a few layers with random weights: a plain decoder, hybrids, latent attention, images."""

from pathlib import Path
from typing import Any

# The settings of all language models here; each has two layers of attention with heads of 64.
COMMON: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4096,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
}
END, IMAGE = 256, 257  # the tokens that stand for no byte
IMAGE_SIZE = 64
STATE_SIZE = 256  # makes a layer's state as large as the keys and values of 512 tokens


def byte_tokenizer() -> Any:
    """A token for each byte, one that ends a text, and one that stands for an image."""
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.decoders import ByteLevel as Decoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import PreTrainedTokenizerFast

    letters = {letter: index for index, letter in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), Decoder()
    tokenizer.add_special_tokens([AddedToken("<end>", special=True), AddedToken("<image>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def make_llama(folder: Path) -> None:
    """A plain decoder with four query heads and two KV heads, which two ranks can share; with a tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **COMMON | {"num_attention_heads": 4, "num_key_value_heads": 2},
        head_dim=64,
        eos_token_id=END,
        architectures=["LlamaForCausalLM"],
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def make_granite_hybrid(folder: Path) -> None:
    """State space layers (Mamba-2) and attention by turns."""
    import torch
    from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

    torch.manual_seed(0)
    config = GraniteMoeHybridConfig(
        **COMMON | {"num_hidden_layers": 4},
        layer_types=["mamba", "attention"] * 2,
        num_local_experts=2,
        num_experts_per_tok=2,
        shared_intermediate_size=128,
        mamba_n_heads=4,
        mamba_d_head=64,
        mamba_n_groups=1,
        mamba_d_state=STATE_SIZE,
        mamba_expand=2,
        position_embedding_type="rope",
        architectures=["GraniteMoeHybridForCausalLM"],
    )
    GraniteMoeHybridForCausalLM(config).save_pretrained(folder)


def make_qwen3_next(folder: Path) -> None:
    """Linear attention (gated delta net) and attention by turns. vLLM's CPU kernels for it want bfloat16."""
    import torch
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    torch.manual_seed(0)
    config = Qwen3NextConfig(
        **COMMON | {"num_hidden_layers": 4},
        layer_types=["linear_attention", "full_attention"] * 2,
        head_dim=64,
        linear_num_value_heads=1,
        linear_num_key_heads=1,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        num_experts=2,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        shared_expert_intermediate_size=128,
        architectures=["Qwen3NextForCausalLM"],
    )
    Qwen3NextForCausalLM(config).save_pretrained(folder)


def make_deepseek(folder: Path) -> None:
    """Multi-head latent attention (MLA), in the only size that vLLM's kernels support."""
    import torch
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    torch.manual_seed(0)
    config = DeepseekV2Config(
        **COMMON | {"num_key_value_heads": 2},
        first_k_dense_replace=2,
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_nope_head_dim=64,
        qk_rope_head_dim=64,
        v_head_dim=64,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        architectures=["DeepseekV2ForCausalLM"],
    )
    DeepseekV2ForCausalLM(config).save_pretrained(folder)


def make_blip2(folder: Path) -> None:
    """A decoder that sees images: an encoder and a query transformer, one layer each, turn one into eight tokens."""
    import torch
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2Processor,
        Blip2QFormerConfig,
        Blip2VisionConfig,
        OPTConfig,
    )
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    torch.manual_seed(0)
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision = Blip2VisionConfig(**small, image_size=IMAGE_SIZE, patch_size=16)
    config = Blip2Config(
        vision_config=vision.to_dict(),
        qformer_config=Blip2QFormerConfig(**small, vocab_size=512, encoder_hidden_size=64).to_dict(),
        text_config=OPTConfig(
            vocab_size=512,
            hidden_size=128,
            word_embed_proj_dim=128,
            ffn_dim=256,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=4096,
            init_std=0.1,
        ).to_dict(),
        num_query_tokens=8,
        image_token_index=IMAGE,
        initializer_range=0.1,
        architectures=["Blip2ForConditionalGeneration"],
    )
    Blip2ForConditionalGeneration(config).save_pretrained(folder)
    images = BlipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    Blip2Processor(images, byte_tokenizer(), num_query_tokens=8).save_pretrained(folder)
