"""Architectures of the transformers library from tiny configs: a factory, an example, a second shape, another call.

Classes are named by strings, so that importing this file loads none of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

Inputs = Callable[[int], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Architecture:
    """`inputs(0)` is the example, `inputs(1)` has another shape; `changed` are keywords of a further call."""

    family: str
    make: Callable[[], nn.Module]
    inputs: Inputs
    changed: dict[str, Any] = field(default_factory=dict)


ARCHITECTURES: dict[str, Architecture] = {}


def add(
    name: str,
    family: str,
    model: str,
    config: str,
    inputs: Inputs,
    sizes: dict[str, Any] | Callable[[], dict[str, Any]],
    **changed: Any,
) -> None:
    def make() -> nn.Module:
        import transformers

        options = sizes() if callable(sizes) else sizes
        return getattr(transformers, model)(getattr(transformers, config)(**options))

    ARCHITECTURES[name] = Architecture(family, make, inputs, changed)


def _config(name: str, **sizes: Any) -> Any:
    import transformers

    return getattr(transformers, name)(**sizes)


# -- inputs ------------------------------------------------------------------------------------------------------------


def _random(i: int) -> torch.Generator:
    return torch.Generator().manual_seed(i)


def ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 60, shape, generator=_random(seed))


def tokens(lengths: tuple[int, int] = (8, 12), mask: bool = True) -> Inputs:
    def make(i: int) -> dict[str, Any]:
        found: dict[str, Any] = {"input_ids": ids(2 + i, lengths[i], seed=i)}
        if mask:
            found["attention_mask"] = torch.ones_like(found["input_ids"])
            found["attention_mask"][0, -2:] = 0
        return found

    return make


def unmasked(lengths: tuple[int, int] = (8, 12)) -> Inputs:
    return tokens(lengths, mask=False)


def pairs(i: int) -> dict[str, Any]:
    return {**tokens()(i), "decoder_input_ids": ids(2 + i, 5 + 2 * i, seed=i + 5)}


def pixels(size: int = 32, second: int | None = None, key: str = "pixel_values") -> Inputs:
    def make(i: int) -> dict[str, Any]:
        side = (size, second or size)[i]
        return {key: torch.randn(2 + i, 3, side, side, generator=_random(i))}

    return make


def waves(length: int = 2000, second: int = 2600, key: str = "input_values") -> Inputs:
    return lambda i: {key: torch.randn(2 + i, (length, second)[i], generator=_random(i))}


def pixels_and_tokens(size: int = 32) -> Inputs:
    return lambda i: {**tokens()(i), **pixels(size)(i)}


def features(channels: int, length: int, second: int, key: str = "input_features") -> Inputs:
    return lambda i: {key: torch.randn(2 + i, channels, (length, second)[i], generator=_random(i))}


# -- encoders ----------------------------------------------------------------------------------------------------------

_TEXT = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64,
}  # fmt: skip

for _name, _prefix, _model, _more in (
    ("bert", "Bert", "ForSequenceClassification", {}),
    ("roberta", "Roberta", "ForMaskedLM", {}),
    ("albert", "Albert", "ForMaskedLM", {"embedding_size": 16}),
    ("electra", "Electra", "ForTokenClassification", {"embedding_size": 16}),
    ("deberta_v2", "DebertaV2", "Model", {
        "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8, "norm_rel_ebd": "layer_norm",
    }),
    ("mpnet", "MPNet", "Model", {}),
    ("convbert", "ConvBert", "Model", {"embedding_size": 32}),
    ("mobilebert", "MobileBert", "Model", {
        "embedding_size": 32, "intra_bottleneck_size": 16, "true_hidden_size": 16, "hidden_size": 32,
    }),
    ("fnet", "FNet", "Model", {}),
    ("modernbert", "ModernBert", "ForMaskedLM", {
        "global_attn_every_n_layers": 2, "local_attention": 6, "pad_token_id": 0,
    }),
    ("squeezebert", "SqueezeBert", "Model", {"embedding_size": 32}),
    ("layoutlm", "LayoutLM", "Model", {}),
    ("roformer", "RoFormer", "Model", {"embedding_size": 32}),
    ("nystromformer", "Nystromformer", "Model", {
        "num_landmarks": 4, "segment_means_seq_len": 8, "conv_kernel_size": 3,
    }),
    ("megatron_bert", "MegatronBert", "Model", {}),
    ("ibert", "IBert", "Model", {}),
    ("esm", "Esm", "ForMaskedLM", {"pad_token_id": 1, "mask_token_id": 2, "position_embedding_type": "rotary"}),
):  # fmt: skip
    _inputs = unmasked() if _name == "fnet" else unmasked((8, 8)) if _name == "nystromformer" else tokens()
    _output = {} if _name in ("fnet", "ibert") else {"output_hidden_states": True}
    add(_name, "encoder", f"{_prefix}{_model}", f"{_prefix}Config", _inputs, {**_TEXT, **_more}, **_output)

add("distilbert", "encoder", "DistilBertModel", "DistilBertConfig", tokens(),
    {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 64},
    output_hidden_states=True)  # fmt: skip
add("longformer", "encoder", "LongformerModel", "LongformerConfig", tokens((8, 16)),
    {**_TEXT, "attention_window": 4})  # fmt: skip
add("funnel", "encoder", "FunnelModel", "FunnelConfig", tokens((8, 12)),
    {"vocab_size": 64, "block_sizes": [1, 1], "num_decoder_layers": 1, "d_model": 32, "n_head": 4, "d_head": 8,
     "d_inner": 48})  # fmt: skip
add("xlnet", "encoder", "XLNetModel", "XLNetConfig", tokens(),
    {"vocab_size": 64, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}, use_mems=True)  # fmt: skip
add("reformer", "encoder", "ReformerModel", "ReformerConfig", unmasked((16, 16)),
    {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 2, "attention_head_size": 16, "feed_forward_size": 48,
     "attn_layers": ["local", "lsh"], "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4, "num_buckets": 2,
     "axial_pos_shape": [4, 4], "axial_pos_embds_dim": [16, 16], "max_position_embeddings": 16, "is_decoder": True,
     "num_hashes": 1})  # fmt: skip

# -- decoders ----------------------------------------------------------------------------------------------------------

_DECODER = {**_TEXT, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}

for _name, _prefix, _more in (
    ("llama", "Llama", {}),
    ("mistral", "Mistral", {"sliding_window": 6}),
    ("qwen2", "Qwen2", {}),
    ("qwen3", "Qwen3", {"head_dim": 8}),
    ("gemma", "Gemma", {"head_dim": 8}),
    ("gemma2", "Gemma2", {"head_dim": 8, "sliding_window": 6}),
    ("gemma3_text", "Gemma3", {"head_dim": 8, "sliding_window": 6}),
    ("phi", "Phi", {"partial_rotary_factor": 0.5}),
    ("phi3", "Phi3", {}),
    ("olmo2", "Olmo2", {}),
    ("cohere", "Cohere", {}),
    ("starcoder2", "Starcoder2", {"sliding_window": 6}),
    ("stablelm", "StableLm", {}),
    ("granite", "Granite", {}),
    ("smollm3", "SmolLM3", {}),
    ("gpt_neox", "GPTNeoX", {}),
):
    _kind = "TextConfig" if _name == "gemma3_text" else "Config"
    add(_name, "decoder", f"{_prefix}ForCausalLM", f"{_prefix}{_kind}", tokens(), {**_DECODER, **_more},
        use_cache=False)  # fmt: skip

_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_GPT = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **_SPECIAL}
add("gpt2", "decoder", "GPT2LMHeadModel", "GPT2Config", tokens(), _GPT, use_cache=False)
add("gptj", "decoder", "GPTJForCausalLM", "GPTJConfig", tokens(), {**_GPT, "rotary_dim": 4}, use_cache=False)
add("codegen", "decoder", "CodeGenForCausalLM", "CodeGenConfig", tokens(), {**_GPT, "rotary_dim": 4}, use_cache=False)
add("gpt_bigcode", "decoder", "GPTBigCodeForCausalLM", "GPTBigCodeConfig", tokens(), _GPT, use_cache=False)
add("openai_gpt", "decoder", "OpenAIGPTLMHeadModel", "OpenAIGPTConfig", tokens(), _GPT, output_hidden_states=True)
add("gpt_neo", "decoder", "GPTNeoForCausalLM", "GPTNeoConfig", tokens(),
    {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64,
     "attention_types": [[["global", "local"], 1]], "window_size": 4, **_SPECIAL}, use_cache=False)  # fmt: skip
add("opt", "decoder", "OPTForCausalLM", "OPTConfig", tokens(),
    {**_TEXT, "ffn_dim": 48, "word_embed_proj_dim": 16, **_SPECIAL}, use_cache=False)  # fmt: skip
add("bloom", "decoder", "BloomForCausalLM", "BloomConfig", tokens(),
    {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4, **_SPECIAL}, use_cache=False)  # fmt: skip
add("falcon", "decoder", "FalconForCausalLM", "FalconConfig", tokens(), {**_TEXT, **_SPECIAL}, use_cache=False)
add("mpt", "decoder", "MptForCausalLM", "MptConfig", tokens(),
    {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, **_SPECIAL},
    use_cache=False)  # fmt: skip

# -- mixtures of experts -----------------------------------------------------------------------------------------------

add("mixtral", "moe", "MixtralForCausalLM", "MixtralConfig", tokens(),
    {**_DECODER, "num_local_experts": 4, "num_experts_per_tok": 2}, output_router_logits=True)  # fmt: skip
add("qwen2_moe", "moe", "Qwen2MoeForCausalLM", "Qwen2MoeConfig", tokens(),
    {**_DECODER, **_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16}, use_cache=False)  # fmt: skip
add("qwen3_moe", "moe", "Qwen3MoeForCausalLM", "Qwen3MoeConfig", tokens(),
    {**_DECODER, **_EXPERTS, "num_experts": 4, "head_dim": 8}, use_cache=False)  # fmt: skip
add("olmoe", "moe", "OlmoeForCausalLM", "OlmoeConfig", tokens(),
    {**_DECODER, "num_experts": 4, "num_experts_per_tok": 2}, use_cache=False)  # fmt: skip
add("deepseek_v3", "moe", "DeepseekV3ForCausalLM", "DeepseekV3Config", tokens(),
    {**_DECODER, **_EXPERTS, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 2, "topk_group": 1,
     "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
     "v_head_dim": 8}, use_cache=False)  # fmt: skip
add("switch_transformers", "moe", "SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig", pairs,
    {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "num_experts": 4,
     "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}, use_cache=False)  # fmt: skip
add("gpt_oss", "moe", "GptOssForCausalLM", "GptOssConfig", tokens(),
    {**_DECODER, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 6},
    use_cache=False)  # fmt: skip

# -- encoder-decoders --------------------------------------------------------------------------------------------------

_BART = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
    "decoder_start_token_id": 2, **_SPECIAL,
}  # fmt: skip
_T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}

add("t5", "encoder-decoder", "T5ForConditionalGeneration", "T5Config", pairs, _T5, use_cache=False)
add("umt5", "encoder-decoder", "UMT5ForConditionalGeneration", "UMT5Config", pairs, _T5, use_cache=False)
add("bart", "encoder-decoder", "BartForConditionalGeneration", "BartConfig", pairs, _BART, use_cache=False)
add("mbart", "encoder-decoder", "MBartForConditionalGeneration", "MBartConfig", pairs, _BART, use_cache=False)
add("marian", "encoder-decoder", "MarianMTModel", "MarianConfig", pairs, _BART, use_cache=False)
add("pegasus", "encoder-decoder", "PegasusForConditionalGeneration", "PegasusConfig", pairs, _BART, use_cache=False)
add("blenderbot", "encoder-decoder", "BlenderbotForConditionalGeneration", "BlenderbotConfig", pairs, _BART,
    use_cache=False)  # fmt: skip
add("led", "encoder-decoder", "LEDForConditionalGeneration", "LEDConfig",
    lambda i: {"input_ids": ids(2, 8 + 4 * i), "decoder_input_ids": ids(2, 5)},
    {**_BART, "attention_window": 4, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64},
    use_cache=False)  # fmt: skip
add("m2m_100", "encoder-decoder", "M2M100ForConditionalGeneration", "M2M100Config", pairs, _BART, use_cache=False)
add("prophetnet", "encoder-decoder", "ProphetNetForConditionalGeneration", "ProphetNetConfig", pairs,
    {"vocab_size": 64, "hidden_size": 32, "num_encoder_layers": 1, "num_decoder_layers": 1, "ngram": 2,
     "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
     "max_position_embeddings": 64, **_SPECIAL}, use_cache=False)  # fmt: skip

# -- state-space and recurrent -----------------------------------------------------------------------------------------

_STATE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, **_SPECIAL}

add("mamba", "state-space", "MambaForCausalLM", "MambaConfig", unmasked(), {**_STATE, "state_size": 4},
    use_cache=False)  # fmt: skip
add("falcon_mamba", "state-space", "FalconMambaForCausalLM", "FalconMambaConfig", unmasked(),
    {**_STATE, "state_size": 4}, use_cache=False)  # fmt: skip
add("mamba2", "state-space", "Mamba2ForCausalLM", "Mamba2Config", unmasked(),
    {**_STATE, "state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 4},
    use_cache=False)  # fmt: skip
add("rwkv", "recurrent", "RwkvForCausalLM", "RwkvConfig", unmasked(),
    {**_STATE, "attention_hidden_size": 32, "context_length": 32}, output_hidden_states=True)  # fmt: skip
add("recurrent_gemma", "recurrent", "RecurrentGemmaForCausalLM", "RecurrentGemmaConfig", tokens(),
    {**_DECODER, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 8}, use_cache=False)  # fmt: skip
add("jamba", "state-space", "JambaForCausalLM", "JambaConfig", tokens(),
    {**_DECODER, "num_hidden_layers": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
     "expert_layer_offset": 1, "num_experts": 2, "use_mamba_kernels": False, "mamba_d_state": 4,
     "mamba_dt_rank": 4}, use_cache=False)  # fmt: skip
add("bamba", "state-space", "BambaForCausalLM", "BambaConfig", tokens(),
    {**_DECODER, "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4,
     "mamba_n_groups": 1, "mamba_expand": 2, "mamba_chunk_size": 4}, use_cache=False)  # fmt: skip
add("qwen3_next", "recurrent", "Qwen3NextForCausalLM", "Qwen3NextConfig", tokens(),
    {**_DECODER, **_EXPERTS, "num_experts": 4, "head_dim": 8, "shared_expert_intermediate_size": 16,
     "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4, "linear_num_key_heads": 2,
     "linear_key_head_dim": 8, "linear_value_head_dim": 8}, use_cache=False)  # fmt: skip

# -- vision ------------------------------------------------------------------------------------------------------------

_VIT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip

add("vit", "vision", "ViTForImageClassification", "ViTConfig", pixels(), _VIT, interpolate_pos_encoding=True)
add("deit", "vision", "DeiTForImageClassificationWithTeacher", "DeiTConfig", pixels(), _VIT, output_hidden_states=True)
add("beit", "vision", "BeitForImageClassification", "BeitConfig", pixels(),
    {**_VIT, "use_relative_position_bias": True, "layer_scale_init_value": 0.1})  # fmt: skip
add("dinov2", "vision", "Dinov2ForImageClassification", "Dinov2Config", pixels(32, 40), _VIT, output_hidden_states=True)
add("vit_mae", "vision", "ViTMAEForPreTraining", "ViTMAEConfig", pixels(),
    {**_VIT, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 4,
     "decoder_intermediate_size": 24})  # fmt: skip
add("swin", "vision", "SwinForImageClassification", "SwinConfig", pixels(32, 48),
    {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 2},
    output_hidden_states=True)  # fmt: skip
add("swinv2", "vision", "Swinv2ForImageClassification", "Swinv2Config", pixels(),
    {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4],
     "window_size": 2})  # fmt: skip
_STAGES = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32]}
add("resnet", "vision", "ResNetForImageClassification", "ResNetConfig", pixels(32, 48),
    {**_STAGES, "embedding_size": 8}, output_hidden_states=True)  # fmt: skip
add("regnet", "vision", "RegNetForImageClassification", "RegNetConfig", pixels(32, 48),
    {**_STAGES, "embedding_size": 8, "groups_width": 8})  # fmt: skip
add("convnext", "vision", "ConvNextForImageClassification", "ConvNextConfig", pixels(32, 64), _STAGES)
add("convnextv2", "vision", "ConvNextV2ForImageClassification", "ConvNextV2Config", pixels(32, 64), _STAGES)
add("mobilenet_v1", "vision", "MobileNetV1ForImageClassification", "MobileNetV1Config", pixels(32, 64),
    {"depth_multiplier": 0.25, "min_depth": 4})  # fmt: skip
add("mobilenet_v2", "vision", "MobileNetV2ForImageClassification", "MobileNetV2Config", pixels(32, 48),
    {"depth_multiplier": 0.25, "min_depth": 4})  # fmt: skip
add("efficientnet", "vision", "EfficientNetForImageClassification", "EfficientNetConfig", pixels(32, 48),
    {"width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320, "image_size": 32})  # fmt: skip
add("poolformer", "vision", "PoolFormerForImageClassification", "PoolFormerConfig", pixels(64, 96), _STAGES)
add("focalnet", "vision", "FocalNetForImageClassification", "FocalNetConfig", pixels(),
    {"image_size": 32, "patch_size": 4, "embed_dim": 16, "hidden_sizes": [16, 32], "depths": [1, 1],
     "focal_levels": [1, 1], "focal_windows": [3, 3]})  # fmt: skip
add("levit", "vision", "LevitForImageClassification", "LevitConfig", pixels(64),
    {"image_size": 64, "hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 3, 4], "depths": [1, 1, 1],
     "key_dim": [8, 8, 8], "attention_ratio": [2, 2, 2], "mlp_ratio": [2, 2, 2]})  # fmt: skip
add("cvt", "vision", "CvtForImageClassification", "CvtConfig", pixels(32, 48),
    {"embed_dim": [16, 24, 32], "num_heads": [1, 2, 4], "depth": [1, 2, 10]})  # fmt: skip
add("pvt_v2", "vision", "PvtV2ForImageClassification", "PvtV2Config", pixels(64),
    {"image_size": 64, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 4],
     "sr_ratios": [8, 4, 2, 1]})  # fmt: skip
add("mobilevit", "vision", "MobileViTForImageClassification", "MobileViTConfig", pixels(64, 96),
    {"image_size": 64, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 48]})  # fmt: skip

# -- detection, segmentation, depth ------------------------------------------------------------------------------------


def _backbone() -> Any:
    return _config("ResNetConfig", **_STAGES, embedding_size=8, out_features=["stage2", "stage3", "stage4"])


_DETR = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_queries": 5,
}  # fmt: skip


def _swin() -> Any:
    return _config("SwinConfig", image_size=64, embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=2,
                   out_features=["stage1", "stage2", "stage3", "stage4"])  # fmt: skip


def _detr() -> dict[str, Any]:
    last = _config("ResNetConfig", **_STAGES, embedding_size=8, out_features=["stage4"])
    return {**_DETR, "use_timm_backbone": False, "backbone": None, "backbone_config": last}


add("detr", "detection", "DetrForObjectDetection", "DetrConfig", pixels(64, 96), _detr)
add(
    "conditional_detr", "detection", "ConditionalDetrForObjectDetection", "ConditionalDetrConfig", pixels(64, 96), _detr
)
add(
    "table_transformer",
    "detection",
    "TableTransformerForObjectDetection",
    "TableTransformerConfig",
    pixels(64, 96),
    _detr,
)
add("deformable_detr", "detection", "DeformableDetrForObjectDetection", "DeformableDetrConfig", pixels(64, 96),
    lambda: {**_detr(), "backbone_config": _backbone(), "num_feature_levels": 3, "encoder_n_points": 2,
             "decoder_n_points": 2})  # fmt: skip
add("rt_detr", "detection", "RTDetrForObjectDetection", "RTDetrConfig", pixels(64),
    lambda: {"backbone_config": _config("RTDetrResNetConfig", **_STAGES, embedding_size=8, layer_type="basic",
                                        out_features=["stage2", "stage3", "stage4"]),
             "encoder_hidden_dim": 32, "encoder_in_channels": [16, 24, 32], "encoder_layers": 1, "encoder_ffn_dim": 48,
             "encoder_attention_heads": 4, "d_model": 32, "num_queries": 8, "decoder_layers": 1,
             "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "decoder_in_channels": [32, 32, 32],
             "num_denoising": 0})  # fmt: skip
add("yolos", "detection", "YolosForObjectDetection", "YolosConfig", pixels(32, 48),
    {**_VIT, "image_size": [32, 32], "num_detection_tokens": 4, "use_mid_position_embeddings": True})  # fmt: skip
add("owlvit", "detection", "OwlViTForObjectDetection", "OwlViTConfig",
    lambda i: {"input_ids": ids(2, 8), "attention_mask": torch.ones(2, 8, dtype=torch.long), **pixels()(0)},
    lambda: {"text_config": {**_TEXT, "max_position_embeddings": 16}, "vision_config": _VIT,
             "projection_dim": 32})  # fmt: skip
add("segformer", "segmentation", "SegformerForSemanticSegmentation", "SegformerConfig", pixels(32, 64),
    {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16], "num_attention_heads": [1, 1, 2, 2],
     "decoder_hidden_size": 16}, output_hidden_states=True)  # fmt: skip
add("maskformer", "segmentation", "MaskFormerForInstanceSegmentation", "MaskFormerConfig", pixels(64, 96),
    lambda: {"backbone_config": _swin(),
             "decoder_config": _config("DetrConfig", **_detr()), "fpn_feature_size": 32,
             "mask_feature_size": 32})  # fmt: skip
add("mask2former", "segmentation", "Mask2FormerForUniversalSegmentation", "Mask2FormerConfig", pixels(64, 96),
    lambda: {"backbone_config": _swin(),
             "feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 32,
             "encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 4, "dim_feedforward": 32,
             "num_queries": 5})  # fmt: skip
add("upernet", "segmentation", "UperNetForSemanticSegmentation", "UperNetConfig", pixels(64, 96),
    lambda: {"backbone_config": _config("ConvNextConfig", **_STAGES,
                                        out_features=["stage1", "stage2", "stage3", "stage4"]),
             "hidden_size": 16, "auxiliary_in_channels": 24, "auxiliary_channels": 16, "num_labels": 5})  # fmt: skip
add("sam", "segmentation", "SamModel", "SamConfig",
    lambda i: {**pixels()(i), "input_points": torch.rand(2 + i, 1, 2, 2, generator=_random(i)) * 30},
    lambda: {"vision_config": _config("SamVisionConfig", **_VIT, output_channels=16, mlp_dim=48, window_size=2,
                                      global_attn_indexes=[1], num_pos_feats=8),
             "prompt_encoder_config": _config("SamPromptEncoderConfig", hidden_size=16, image_size=32, patch_size=8),
             "mask_decoder_config": _config("SamMaskDecoderConfig", hidden_size=16, mlp_dim=32, num_attention_heads=2,
                                            iou_head_hidden_dim=16, num_hidden_layers=2)},
    multimask_output=False)  # fmt: skip
add("dpt", "depth", "DPTForDepthEstimation", "DPTConfig", pixels(),
    {**_VIT, "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8, 8, 16, 16],
     "fusion_hidden_size": 16, "is_hybrid": False})  # fmt: skip
add("glpn", "depth", "GLPNForDepthEstimation", "GLPNConfig", pixels(64, 96),
    {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16], "num_attention_heads": [1, 1, 2, 2],
     "decoder_hidden_size": 8})  # fmt: skip

# -- audio and speech --------------------------------------------------------------------------------------------------

_WAVE = {
    "vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "conv_dim": [16, 16, 16], "conv_stride": [5, 2, 2], "conv_kernel": [10, 3, 3], "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.1, "mask_time_length": 2,
}  # fmt: skip

for _name, _prefix in (
    ("wav2vec2", "Wav2Vec2"), ("hubert", "Hubert"), ("wavlm", "WavLM"), ("unispeech", "UniSpeech"),
    ("data2vec_audio", "Data2VecAudio"), ("sew", "SEW"), ("unispeech_sat", "UniSpeechSat"),
):  # fmt: skip
    _more = (
        {"squeeze_factor": 2} if _name == "sew" else {"conv_pos_kernel_size": 5} if _name == "data2vec_audio" else {}
    )
    add(_name, "audio", f"{_prefix}ForCTC", f"{_prefix}Config", waves(), {**_WAVE, **_more}, output_hidden_states=True)

add("wav2vec2_conformer", "audio", "Wav2Vec2ConformerForCTC", "Wav2Vec2ConformerConfig", waves(),
    {**_WAVE, "position_embeddings_type": "rotary", "conv_depthwise_kernel_size": 3})  # fmt: skip
add("wav2vec2_bert", "audio", "Wav2Vec2BertForCTC", "Wav2Vec2BertConfig",
    lambda i: {"input_features": torch.randn(2 + i, 12 + 4 * i, 160, generator=_random(i))},
    {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
     "conv_depthwise_kernel_size": 3})  # fmt: skip
add("whisper", "audio", "WhisperForConditionalGeneration", "WhisperConfig",
    lambda i: {**features(8, 40, 40)(i), "decoder_input_ids": ids(2 + i, 5 + i)},
    {**_BART, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 32}, use_cache=False)  # fmt: skip
add("speech_to_text", "audio", "Speech2TextForConditionalGeneration", "Speech2TextConfig",
    lambda i: {"input_features": torch.randn(2 + i, 20 + 8 * i, 8, generator=_random(i)),
               "decoder_input_ids": ids(2 + i, 5 + i)},
    {**_BART, "input_feat_per_channel": 8, "conv_channels": 16, "max_source_positions": 64,
     "max_target_positions": 32}, use_cache=False)  # fmt: skip
add("ast", "audio", "ASTForAudioClassification", "ASTConfig",
    lambda i: {"input_values": torch.randn(2 + i, 24, 16, generator=_random(i))},
    {**_VIT, "patch_size": 4, "max_length": 24, "num_mel_bins": 16, "frequency_stride": 4,
     "time_stride": 4})  # fmt: skip
add("encodec", "audio", "EncodecModel", "EncodecConfig",
    lambda i: {"input_values": torch.randn(1 + i, 1, 640 + 320 * i, generator=_random(i))},
    {"hidden_size": 16, "num_filters": 4, "codebook_dim": 16, "codebook_size": 32, "num_lstm_layers": 1,
     "upsampling_ratios": [4, 4, 2, 2], "target_bandwidths": [6.0], "sampling_rate": 24000})  # fmt: skip
add("vits", "speech synthesis", "VitsModel", "VitsConfig", tokens((8, 10)),
    {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 32,
     "flow_size": 16, "spectrogram_bins": 9, "upsample_initial_channel": 16, "upsample_rates": [4, 4],
     "upsample_kernel_sizes": [8, 8], "resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 3]],
     "depth_separable_num_layers": 2, "duration_predictor_flow_bins": 4, "duration_predictor_filter_channels": 16,
     "duration_predictor_num_flows": 2, "prior_encoder_num_flows": 2, "prior_encoder_num_wavenet_layers": 2,
     "wavenet_dilation_rate": 1})  # fmt: skip
add("speecht5", "speech synthesis", "SpeechT5ForTextToSpeech", "SpeechT5Config",
    lambda i: {"input_ids": ids(2 + i, 8 + i), "decoder_input_values": torch.randn(2 + i, 6, 8, generator=_random(i)),
               "speaker_embeddings": torch.randn(2 + i, 12, generator=_random(i))},
    {"vocab_size": 64, "hidden_size": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
     "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8,
     "speech_decoder_prenet_units": 16, "speech_decoder_postnet_units": 16, "speaker_embedding_dim": 12,
     "conv_dim": [16, 16], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_conv_pos_embeddings": 16,
     "num_conv_pos_embedding_groups": 2, "reduction_factor": 2}, use_cache=False)  # fmt: skip
add("speecht5_hifigan", "speech synthesis", "SpeechT5HifiGan", "SpeechT5HifiGanConfig",
    lambda i: {"spectrogram": torch.randn(2 + i, 6 + i, 8, generator=_random(i))},
    {"model_in_dim": 8, "upsample_initial_channel": 16, "upsample_rates": [4, 4], "upsample_kernel_sizes": [8, 8],
     "resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 3]]})  # fmt: skip

# -- multimodal --------------------------------------------------------------------------------------------------------

_CLIP_TEXT = {**_TEXT, "max_position_embeddings": 16, "projection_dim": 16, **_SPECIAL}

add("clip", "multimodal", "CLIPModel", "CLIPConfig", pixels_and_tokens(),
    lambda: {"text_config": _CLIP_TEXT, "vision_config": {**_VIT, "projection_dim": 16}, "projection_dim": 16},
    return_loss=True)  # fmt: skip
add("siglip", "multimodal", "SiglipModel", "SiglipConfig", lambda i: {**unmasked((8, 8))(i), **pixels()(i)},
    lambda: {"text_config": {**_TEXT, "max_position_embeddings": 16}, "vision_config": _VIT})  # fmt: skip
add("blip", "multimodal", "BlipForConditionalGeneration", "BlipConfig", pixels_and_tokens(),
    lambda: {"text_config": {**_TEXT, "projection_dim": 16, "encoder_hidden_size": 32, **_SPECIAL},
             "vision_config": _VIT, "projection_dim": 16})  # fmt: skip
add("vilt", "multimodal", "ViltModel", "ViltConfig", pixels_and_tokens(), {**_TEXT, **_VIT, "max_image_length": -1})
add("git", "multimodal", "GitForCausalLM", "GitConfig", pixels_and_tokens(),
    lambda: {**_TEXT, "vision_config": _VIT, **_SPECIAL}, use_cache=False)  # fmt: skip
add("flava", "multimodal", "FlavaModel", "FlavaConfig", pixels_and_tokens(),
    lambda: {"text_config": _TEXT, "image_config": _VIT, "multimodal_config": {k: _VIT[k] for k in list(_VIT)[:4]},
             "hidden_size": 32, "projection_dim": 16})  # fmt: skip
add("llava", "multimodal", "LlavaForConditionalGeneration", "LlavaConfig",
    lambda i: {"input_ids": torch.cat([torch.full((1 + i, 16), 63), ids(1 + i, 4 + i)], 1), **{
        k: v[: 1 + i] for k, v in pixels()(i).items()}},
    lambda: {"text_config": _config("LlamaConfig", **_DECODER), "vision_config": _config("CLIPVisionConfig", **_VIT),
             "image_token_index": 63, "image_token_id": 63, "vision_feature_layer": -1}, use_cache=False)  # fmt: skip
add("align", "multimodal", "AlignModel", "AlignConfig", pixels_and_tokens(),
    lambda: {"text_config": _TEXT, "projection_dim": 80, "vision_config": {
        "width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 80, "image_size": 32}})  # fmt: skip

# -- time series, trajectories -----------------------------------------------------------------------------------------

add("patchtst", "time series", "PatchTSTForPrediction", "PatchTSTConfig",
    lambda i: {"past_values": torch.randn(2 + i, 16, 2, generator=_random(i))},
    {"num_input_channels": 2, "context_length": 16, "patch_length": 4, "patch_stride": 4, "d_model": 16,
     "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 24, "prediction_length": 4})  # fmt: skip
add("decision_transformer", "trajectories", "DecisionTransformerModel", "DecisionTransformerConfig",
    lambda i: {"states": torch.randn(2, 4 + i, 5, generator=_random(i)), "actions": torch.randn(2, 4 + i, 3),
               "rewards": torch.randn(2, 4 + i, 1), "returns_to_go": torch.randn(2, 4 + i, 1),
               "timesteps": torch.arange(4 + i).expand(2, -1), "attention_mask": torch.ones(2, 4 + i)},
    {"state_dim": 5, "act_dim": 3, "hidden_size": 32, "max_ep_len": 20, "n_layer": 1, "n_head": 4,
     "n_positions": 64})  # fmt: skip
