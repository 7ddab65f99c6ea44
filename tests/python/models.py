"""Tiny random Transformers models, every kind of mask among them; nothing is downloaded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor

from device import DEVICE, DTYPE

BATCH, SEQLEN, VOCAB = 2, 24, 64
PADDINGS = ("none", "left", "right", "holes")
IMAGE_TOKEN, IMAGE_TOKENS = 60, 4


@dataclass(frozen=True)
class Tiny:
    """One architecture; `inputs` maps a padding to the arguments of a forward call."""

    architecture: str
    config: Callable[[], transformers.PretrainedConfig]
    inputs: Callable[[str], dict]
    paddings: tuple[str, ...] = PADDINGS
    outputs: tuple[str, ...] = ("logits",)
    since: str = "4.53.0"  # the first Transformers whose attention of this model can be replaced


def padding_mask(padding: str, batch: int = BATCH, seqlen: int = SEQLEN) -> Tensor | None:
    """[batch, seqlen] of 0 and 1; the last entry of the batch has no padding."""
    if padding == "none":
        return None
    mask = torch.ones(batch, seqlen, dtype=torch.long)
    if padding == "left":
        mask[0, : seqlen // 3] = 0
    elif padding == "right":
        mask[0, -seqlen // 3 :] = 0
    elif padding == "holes":
        mask[0, 1::4] = 0
        mask[0, seqlen // 2 : seqlen // 2 + 3] = 0
    elif padding == "all":
        mask[0] = 0
    return mask.to(DEVICE)


def tokens(
    batch: int = BATCH, seqlen: int = SEQLEN, seed: int = 0, vocab: int = IMAGE_TOKEN
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab, (batch, seqlen), generator=generator).to(DEVICE)


def pixels(size: int, batch: int = BATCH) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1)).to(DEVICE)


def _with_mask(inputs: dict, padding: str, name: str = "attention_mask") -> dict:
    mask = padding_mask(padding)
    return inputs if mask is None else {**inputs, name: mask}


def _text(padding: str) -> dict:
    return _with_mask({"input_ids": tokens()}, padding)


def _text_to_text(padding: str) -> dict:
    inputs = {"input_ids": tokens(), "decoder_input_ids": tokens(seqlen=10, seed=1)}
    return _with_mask(inputs, padding)


def _speech(padding: str) -> dict:
    features = torch.randn(BATCH, 8, 40, generator=torch.Generator().manual_seed(1))
    inputs = {"input_features": features.to(DEVICE), "decoder_input_ids": tokens()}
    return _with_mask(inputs, padding, "decoder_attention_mask")


def _image_and_text(padding: str) -> dict:
    """Text, an image, text and, in the entry without padding, a second image."""
    ids = tokens()
    ids[:, 9 : 9 + IMAGE_TOKENS] = IMAGE_TOKEN
    return _with_mask(
        {
            "input_ids": ids,
            "pixel_values": pixels(28),
            "token_type_ids": (ids == IMAGE_TOKEN).long(),
        },
        padding,
    )


def _two_images_and_text(padding: str) -> dict:
    inputs = _image_and_text(padding)
    ids = inputs["input_ids"]
    ids[:, 16 : 16 + IMAGE_TOKENS] = IMAGE_TOKEN
    return {
        **inputs,
        "pixel_values": pixels(28, 2 * BATCH),
        "token_type_ids": (ids == IMAGE_TOKEN).long(),
    }


def _prefix_and_suffix(padding: str) -> dict:
    """PaliGemma's prefix (image and question, type 0) sees itself whole; the answer is causal."""
    inputs = _image_and_text(padding)
    types = torch.zeros(BATCH, SEQLEN, dtype=torch.long, device=DEVICE)
    types[:, 15:] = 1
    if padding == "right":  # the processor pads types with 0
        types[padding_mask(padding) == 0] = 0
    return {**inputs, "token_type_ids": types, "labels": inputs["input_ids"]}


def _image(padding: str) -> dict:
    return {"pixel_values": pixels(32)}


def _image_and_phrase(padding: str) -> dict:
    inputs = {"pixel_values": pixels(32), "input_ids": tokens(seqlen=8, vocab=VOCAB - 2)}
    mask = padding_mask(padding, seqlen=8)
    return inputs if mask is None else {**inputs, "attention_mask": mask}


_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_DECODER = {
    **_SMALL,
    "vocab_size": VOCAB,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_WINDOW = {"sliding_window": 6}
_SIGLIP = {**_SMALL, "image_size": 28, "patch_size": 14, "vision_use_head": False}


def _config(name: str, **arguments) -> Callable[[], transformers.PretrainedConfig]:
    return lambda: getattr(transformers, name)(**copy.deepcopy(arguments))


def _alternating(name: str, **arguments) -> Callable[[], transformers.PretrainedConfig]:
    layers = ["sliding_attention", "full_attention"]
    return _config(name, **{**_DECODER, **_WINDOW, "layer_types": layers, **arguments})


def _gemma3():
    return transformers.Gemma3Config(
        text_config=_alternating("Gemma3TextConfig")().to_dict(),
        vision_config=dict(_SIGLIP),
        mm_tokens_per_image=IMAGE_TOKENS,
        image_token_index=IMAGE_TOKEN,
        boi_token_index=61,
        eoi_token_index=62,
    )


def _paligemma():
    return transformers.PaliGemmaConfig(
        text_config={**_DECODER, "model_type": "gemma"},
        vision_config={**_SIGLIP, "model_type": "siglip_vision_model"},
        image_token_index=IMAGE_TOKEN,
        vocab_size=VOCAB,
        projection_dim=32,
        hidden_size=32,
    )


def _sam3():
    part = {"hidden_size": 32, "num_attention_heads": 4, "dropout": 0.0}
    stack = {**part, "num_layers": 2, "intermediate_size": 48}
    return transformers.Sam3Config(
        vision_config={
            "backbone_config": {
                **_SMALL,
                "model_type": "sam3_vit_model",
                "image_size": 32,
                "pretrain_image_size": 32,
                "patch_size": 4,
                "window_size": 4,
                "global_attn_indexes": [1],
            },
            "fpn_hidden_size": 32,
            "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
        },
        text_config={
            **_SMALL,
            "model_type": "clip_text_model",
            "vocab_size": VOCAB,
            "projection_dim": 32,
            "max_position_embeddings": 16,
            "eos_token_id": VOCAB - 1,
        },
        geometry_encoder_config=stack,
        detr_encoder_config=stack,
        detr_decoder_config={**stack, "num_queries": 6},
        mask_decoder_config={**part, "num_upsampling_stages": 2},
    )


MODELS = {
    "llama": Tiny("LlamaForCausalLM", _config("LlamaConfig", **_DECODER), _text),
    "mistral": Tiny("MistralForCausalLM", _config("MistralConfig", **_DECODER, **_WINDOW), _text),
    "qwen3": Tiny("Qwen3ForCausalLM", _config("Qwen3Config", **_DECODER), _text),
    "gemma2": Tiny(
        "Gemma2ForCausalLM",
        _alternating("Gemma2Config", query_pre_attn_scalar=8, attn_logit_softcapping=2.0),
        _text,
    ),
    "gemma3_text": Tiny(
        "Gemma3ForCausalLM", _alternating("Gemma3TextConfig", query_pre_attn_scalar=8), _text
    ),
    "gemma3": Tiny("Gemma3ForConditionalGeneration", _gemma3, _two_images_and_text),
    "paligemma": Tiny("PaliGemmaForConditionalGeneration", _paligemma, _prefix_and_suffix),
    "llama4_text": Tiny(
        "Llama4ForCausalLM",
        _config(
            "Llama4TextConfig",
            **_DECODER,
            attention_chunk_size=7,
            intermediate_size_mlp=48,
            num_local_experts=2,
            interleave_moe_layer_step=2,
            no_rope_layers=[1, 0],
            layer_types=["chunked_attention", "full_attention"],
        ),
        _text,
    ),
    "gpt_oss": Tiny(
        "GptOssForCausalLM",
        _alternating("GptOssConfig", num_local_experts=2, num_experts_per_tok=2),
        _text,
        since="4.55.0",
    ),
    "bert": Tiny(
        "BertForMaskedLM",
        _config("BertConfig", **_SMALL, vocab_size=VOCAB, max_position_embeddings=64),
        _text,
        since="5.0.0",
    ),
    "t5": Tiny(
        "T5ForConditionalGeneration",
        _config(
            "T5Config",
            vocab_size=VOCAB,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            relative_attention_num_buckets=8,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        ),
        _text_to_text,
        since="5.15.0",
    ),
    "vit": Tiny(
        "ViTForImageClassification",
        _config("ViTConfig", **_SMALL, image_size=32, patch_size=8),
        _image,
        paddings=("none",),
    ),
    "sam3": Tiny(
        "Sam3Model",
        _sam3,
        _image_and_phrase,
        paddings=("none", "right"),
        outputs=("pred_masks", "pred_boxes", "pred_logits", "presence_logits", "semantic_seg"),
        since="5.0.0",
    ),
    "whisper": Tiny(
        "WhisperForConditionalGeneration",
        _config(
            "WhisperConfig",
            vocab_size=VOCAB,
            d_model=32,
            num_mel_bins=8,
            max_source_positions=20,
            max_target_positions=64,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=3,
            dropout=0.0,
        ),
        _speech,
    ),
    "bart": Tiny(
        "BartForConditionalGeneration",
        _config(
            "BartConfig",
            vocab_size=VOCAB,
            d_model=32,
            max_position_embeddings=64,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            dropout=0.0,
        ),
        _text_to_text,
    ),
}


def available(name: str) -> Tiny:
    """The model, or a skip that names the version of Transformers that has it."""
    tiny = MODELS[name]
    if Version(transformers.__version__) < Version(tiny.since):
        pytest.skip(
            f"{tiny.architecture} attends through AttentionInterface since Transformers "
            f"{tiny.since}, this is {transformers.__version__}"
        )
    try:
        getattr(transformers, tiny.architecture)
    except ImportError as error:
        pytest.skip(f"{tiny.architecture} of Transformers {transformers.__version__}: {error}")
    return tiny


def build(
    tiny: Tiny,
    attention: str,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    device: str = DEVICE,
    **changes,
):
    """The model in eval mode, by default in DTYPE with heed and in float32 with another attention.

    Equal seeds give equal weights in all dtypes, so large that attention matters.
    """
    torch.manual_seed(seed)
    if dtype is None:
        dtype = DTYPE if attention.removeprefix("paged|") == "heed" else torch.float32
    config = tiny.config()
    if dtype == torch.float64:
        config._experts_implementation = "eager"  # the others know no float64
    elif dtype != torch.float32 or device != "cpu":
        config._experts_implementation = "batched_mm"  # the default one wants bfloat16 on a GPU
    for key, value in changes.items():
        setattr(config, key, value)
    model = getattr(transformers, tiny.architecture)._from_config(
        config, attn_implementation=attention
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.15)
    return model.to(DTYPE).to(device, dtype).eval()
