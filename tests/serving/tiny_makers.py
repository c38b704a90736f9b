# SPDX-License-Identifier: Apache-2.0
"""Models of a few layers with random weights, each of a kind that is more than a plain decoder."""

from pathlib import Path

GLOBAL_LAYER = 2  # not the last layer, so that its output for every row of the prompt matters
START_OF_TRANSCRIPT = "<|startoftranscript|>"
SECONDS_OF_AUDIO, SAMPLING_RATE = 2, 16_000


def make_gemma3(folder: Path) -> None:
    """A global layer among five with a sliding window. It has no tokenizer."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=6,
        layer_types=["full_attention" if layer == GLOBAL_LAYER else "sliding_attention" for layer in range(6)],
        sliding_window=128,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        query_pre_attn_scalar=64,
        max_position_embeddings=4096,
        initializer_range=0.2,
        tie_word_embeddings=False,
        architectures=["Gemma3ForCausalLM"],
    )
    Gemma3ForCausalLM(config).save_pretrained(folder)


def make_gpt_oss(folder: Path) -> None:
    """A sliding window in every other layer, and sinks in all; one sink takes no attention and one takes most."""
    import torch
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=4,
        num_local_experts=4,
        num_experts_per_tok=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        sliding_window=128,
        max_position_embeddings=4096,
        initializer_range=0.2,
        architectures=["GptOssForCausalLM"],
    )
    model = GptOssForCausalLM(config)
    for layer in model.model.layers:
        layer.self_attn.sinks.data = torch.tensor([6.0, -30.0, 3.0, 10.0])
    model.save_pretrained(folder)


def make_lfm2(folder: Path) -> None:
    """Attention in every other layer; the others are convolutions, whose state is as large as 799 tokens' cache."""
    import torch
    from transformers import Lfm2Config, Lfm2ForCausalLM

    torch.manual_seed(0)
    config = Lfm2Config(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        layer_types=["conv", "full_attention"] * 2,
        num_attention_heads=2,
        num_key_value_heads=1,
        conv_L_cache=800,
        conv_dim=128,
        conv_bias=False,
        block_dim=128,
        block_ff_dim=256,
        block_multiple_of=16,
        block_ffn_dim_multiplier=1.0,
        block_auto_adjust_ff_dim=False,
        norm_eps=1e-5,
        max_position_embeddings=4096,
        initializer_range=0.2,
        architectures=["Lfm2ForCausalLM"],
    )
    Lfm2ForCausalLM(config).save_pretrained(folder)


def make_modernbert(folder: Path) -> None:
    """An encoder: every third layer has no window, and all look in both directions. vLLM wants some tokenizer."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import ModernBertConfig, ModernBertModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = ModernBertConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=2,
        local_attention=128,
        global_attn_every_n_layers=3,
        max_position_embeddings=2048,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        cls_token_id=None,
        sep_token_id=None,
        architectures=["ModernBertModel"],
    )
    ModernBertModel(config).save_pretrained(folder)
    words = Tokenizer(WordLevel({"[PAD]": 0, "[UNK]": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)


def make_whisper(folder: Path) -> None:
    """An encoder and a decoder of two layers each, a tokenizer of single bytes, and the audio feature extractor."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import (
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
        WhisperTokenizer,
    )

    torch.manual_seed(0)
    vocabulary = {letter: index for index, letter in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = WhisperTokenizer(vocabulary, merges=[], additional_special_tokens=[START_OF_TRANSCRIPT])
    features = WhisperFeatureExtractor(feature_size=16, chunk_length=SECONDS_OF_AUDIO, sampling_rate=SAMPLING_RATE)
    config = WhisperConfig(
        vocab_size=288,
        num_mel_bins=16,
        d_model=128,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        max_source_positions=50 * SECONDS_OF_AUDIO,
        max_target_positions=512,
        init_std=0.2,
        pad_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.convert_tokens_to_ids(START_OF_TRANSCRIPT),
        suppress_tokens=None,
        begin_suppress_tokens=None,
        architectures=["WhisperForConditionalGeneration"],
    )
    WhisperForConditionalGeneration(config).save_pretrained(folder)
    WhisperProcessor(features, tokenizer).save_pretrained(folder)


MAKERS = {
    "gemma3": make_gemma3,
    "gpt-oss": make_gpt_oss,
    "lfm2": make_lfm2,
    "modernbert": make_modernbert,
    "whisper": make_whisper,
}
