# SPDX-License-Identifier: Apache-2.0
"""Small models with random weights: a draft head and an adapter for another model, and a mixture of experts."""

import json
from pathlib import Path


def make_eagle_head(folder: Path, model: Path) -> None:
    """EAGLE's drafter for a model: one layer that sees its last hidden states, without an embedding."""
    import torch
    from safetensors.torch import save_file

    geometry = json.loads((model / "config.json").read_text())
    hidden, inner = geometry["hidden_size"], geometry["intermediate_size"]
    num_heads, num_kv_heads = geometry["num_attention_heads"], geometry["num_key_value_heads"]
    head_dim = geometry.get("head_dim") or hidden // num_heads
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 1,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "vocab_size": geometry["vocab_size"],
        "max_position_embeddings": geometry["max_position_embeddings"],
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "torch_dtype": "float32",
    }
    shapes = {
        "fc": (hidden, 2 * hidden),
        "layers.0.self_attn.q_proj": (num_heads * head_dim, hidden),
        "layers.0.self_attn.k_proj": (num_kv_heads * head_dim, hidden),
        "layers.0.self_attn.v_proj": (num_kv_heads * head_dim, hidden),
        "layers.0.self_attn.o_proj": (hidden, num_heads * head_dim),
        "layers.0.mlp.gate_proj": (inner, hidden),
        "layers.0.mlp.up_proj": (inner, hidden),
        "layers.0.mlp.down_proj": (hidden, inner),
    }
    torch.manual_seed(0)
    weights = {f"{name}.weight": 0.02 * torch.randn(shape) for name, shape in shapes.items()}
    weights["layers.0.post_attention_layernorm.weight"] = torch.ones(hidden)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def make_adapter(folder: Path, model: Path, rank: int = 8) -> None:
    """A LoRA adapter of the queries and outputs of every layer, with weights large enough to change answers."""
    import torch
    from safetensors.torch import save_file

    geometry = json.loads((model / "config.json").read_text())
    hidden, inner = geometry["hidden_size"], geometry["num_attention_heads"] * geometry["head_dim"]
    torch.manual_seed(1)
    weights = {}
    for layer in range(geometry["num_hidden_layers"]):
        for name, (rows, columns) in {"q_proj": (inner, hidden), "o_proj": (hidden, inner)}.items():
            module = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{module}.lora_A.weight"] = 0.3 * torch.randn(rank, columns)
            weights[f"{module}.lora_B.weight"] = 0.3 * torch.randn(rows, rank)
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": ["q_proj", "o_proj"],
        "bias": "none",
    }
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(weights, folder / "adapter_model.safetensors")


def make_qwen3_moe(folder: Path) -> None:
    """Every token uses all experts, so that rounding cannot change which experts it uses."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=256,
        moe_intermediate_size=128,
        num_experts=4,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        initializer_range=0.1,
        tie_word_embeddings=False,
        architectures=["Qwen3MoeForCausalLM"],
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
