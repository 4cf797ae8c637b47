"""Small networks of many architectures: the cases of the test and of the table.

Each is built from a configuration, with random weights and without the network: most have about 30,000 weights. The task is to
learn one batch of four examples by heart.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

Task = Literal["causal", "masked", "seq2seq", "image", "audio", "speech", "both"]
"""What the network does: predict the next token, tokens in their place, another sequence, the class of an image or a recording,
the words of a recording, or which image belongs to which text."""

BATCH, LENGTH, WORDS, CLASSES, SIDE = 4, 16, 48, 4, 32

AUTO = {
    "causal": "AutoModelForCausalLM",
    "masked": "AutoModelForMaskedLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "image": "AutoModelForImageClassification",
    "audio": "AutoModelForAudioClassification",
    "speech": "AutoModelForSpeechSeq2Seq",
    "both": "AutoModel",
}
TOKENS = ("causal", "masked", "seq2seq")

STILL = dict.fromkeys(
    (
        *("dropout", "attention_dropout", "hidden_dropout", "activation_dropout", "dropout_rate", "drop_path_rate"),
        *("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout_prob", "classifier_dropout"),
        *("resid_pdrop", "embd_pdrop", "attn_pdrop", "resid_dropout", "embed_dropout", "seq_classif_dropout"),
        *("layerdrop", "encoder_layerdrop", "decoder_layerdrop", "feat_proj_dropout", "final_dropout"),
        *("mask_time_prob", "mask_feature_prob", "summary_last_dropout"),
    ),
    0.0,
)
"""No dropout, so that two recipes see the same task."""
WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TEXT = {**WIDTHS, "vocab_size": WORDS, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1}
TEXT |= {"eos_token_id": 2}
LLAMA = {"num_key_value_heads": 1, "head_dim": 16}
BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
}
BART |= {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "decoder_start_token_id": 2, "forced_eos_token_id": None}
IMAGES = {"image_size": SIDE, "num_labels": CLASSES}
MIXTURE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@dataclass(frozen=True)
class Case:
    """One architecture.

    Args:
        name: model type of transformers.
        task: what it does.
        options: changes of its configuration.
        left: pattern of the names of the layers that may stay in full precision although they multiply matrices.
        convolves: whether it has chains of convolution, normalization and activation.
        lr: learning rate of AdamW, in float as in 4 bits.
        fast: whether the test of every day has it.
    """

    name: str
    task: Task
    options: Mapping[str, Any] = field(default_factory=dict)
    left: str = "^$"
    convolves: bool = False
    lr: float = 3e-3
    fast: bool = False

    @property
    def generates(self) -> bool:
        """Whether it writes tokens one after the other."""
        return self.task in ("causal", "seq2seq", "speech")

    def build(self) -> Any:
        """The network in full precision, in training mode; the same weights every time."""
        import transformers

        basis = TEXT if self.task in TOKENS else IMAGES if self.task in ("image", "audio") else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = transformers.AutoConfig.for_model(self.name, **{**STILL, **basis, **self.options})
            torch.manual_seed(0)
            model = getattr(transformers, AUTO[self.task]).from_config(config).train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.ones_(
                    module.weight
                )  # MobileViT and EfficientNet start here with weights near 0, and learn nothing
        return model

    def batch(self) -> dict[str, Tensor]:
        """The arguments of the network, with the labels that give its output a `loss`."""
        generator = torch.Generator().manual_seed(1)

        def tokens(length: int = LENGTH) -> Tensor:
            return torch.randint(3, WORDS, (BATCH, length), generator=generator)

        def numbers(*shape: int) -> Tensor:
            return torch.randn(BATCH, *shape, generator=generator)

        classes = torch.arange(BATCH) % CLASSES
        if self.task == "causal":
            ids = tokens()
            return {"input_ids": ids, "labels": ids}
        if self.task in ("masked", "seq2seq"):
            return {"input_ids": tokens(), "labels": tokens()}
        if self.task == "image":
            return {"pixel_values": numbers(3, SIDE, SIDE), "labels": classes}
        if self.task == "audio":
            return {"input_values": numbers(400), "labels": classes}
        if self.task == "speech":
            return {"input_features": numbers(8, 32), "labels": tokens(8)}
        return {"input_ids": tokens(), "pixel_values": numbers(3, SIDE, SIDE)}


def _case(name: str, task: Task, **options: Any) -> Case:
    chosen = {key: options.pop(key) for key in ("lr", "fast", "left", "convolves") if key in options}
    return Case(name, task, options, **chosen)


CASES = (
    _case("bert", "masked", fast=True),
    _case("roberta", "masked"),
    _case("distilbert", "masked", dim=32, n_layers=2, n_heads=2, hidden_dim=64),
    _case("albert", "masked", embedding_size=16),
    _case("electra", "masked", embedding_size=16),
    _case("deberta", "masked", relative_attention=True, pos_att_type=["c2p", "p2c"], type_vocab_size=0),
    _case("deberta-v2", "masked", relative_attention=True, pos_att_type=["c2p", "p2c"], share_att_key=True),
    _case("modernbert", "masked"),
    _case(
        "convbert",
        "masked",
        left=r"(intermediate|output)\.dense$",
        conv_kernel_size=3,
        num_groups=2,
        head_ratio=1,
        embedding_size=32,
    ),
    _case("gpt2", "causal", n_embd=32, n_layer=2, n_head=2, n_positions=32, fast=True),
    _case("gpt_neo", "causal", num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]], window_size=8),
    _case("gpt_neox", "causal"),
    _case("gptj", "causal", n_embd=32, n_layer=2, n_head=2, n_positions=32, rotary_dim=8),
    _case("opt", "causal", ffn_dim=64, word_embed_proj_dim=32),
    _case("bloom", "causal", n_layer=2, n_head=2),
    _case("falcon", "causal", num_kv_heads=2),
    _case("mpt", "causal", d_model=32, n_heads=2, n_layers=2, max_seq_len=32, expansion_ratio=2),
    _case("phi", "causal"),
    _case("phi3", "causal", **LLAMA),
    _case("llama", "causal", **LLAMA),
    _case("mistral", "causal", sliding_window=8, **LLAMA),
    _case("gemma", "causal", **LLAMA),
    _case("gemma2", "causal", **LLAMA),
    _case("qwen2", "causal", **LLAMA),
    _case("qwen3", "causal", **LLAMA),
    _case("olmo2", "causal", **LLAMA),
    _case("starcoder2", "causal", **LLAMA),
    _case("stablelm", "causal", **LLAMA),
    _case("cohere", "causal", logit_scale=1.0, **LLAMA),
    _case("mixtral", "causal", fast=True, **LLAMA, **MIXTURE),
    _case("qwen2_moe", "causal", shared_expert_intermediate_size=32, **LLAMA, **MIXTURE),
    _case("qwen3_moe", "causal", decoder_sparse_step=1, **LLAMA, **MIXTURE),
    _case("gpt_oss", "causal", **LLAMA, **MIXTURE),
    _case("olmoe", "causal", **LLAMA, **MIXTURE),
    _case("granitemoe", "causal", **LLAMA, **MIXTURE),
    _case(
        "deepseek_v3",
        "causal",
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
        num_key_value_heads=2,
    ),
    _case(
        "jetmoe",
        "causal",
        left=r"(input|output)_linear$",
        num_key_value_heads=2,
        kv_channels=16,
        num_local_experts=4,
        num_experts_per_tok=1,
    ),
    _case("mamba", "causal", state_size=8, expand=2, time_step_rank=4),
    _case("mamba2", "causal", state_size=8, expand=2, num_heads=4, head_dim=16, n_groups=1, chunk_size=8),
    _case("rwkv", "causal", attention_hidden_size=32, context_length=32),
    _case("t5", "seq2seq", d_model=32, num_layers=2, num_heads=2, d_kv=16, d_ff=64, decoder_start_token_id=0),
    _case("bart", "seq2seq", **BART),
    _case("marian", "seq2seq", **BART),
    _case("pegasus", "seq2seq", **BART),
    _case(
        "switch_transformers",
        "seq2seq",
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_heads=2,
        num_layers=2,
        num_decoder_layers=2,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        num_experts=4,
        decoder_start_token_id=0,
    ),
    _case(
        "whisper",
        "speech",
        **BART,
        vocab_size=WORDS,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    ),
    _case(
        "wav2vec2",
        "audio",
        left=r"pos_conv_embed\.conv$",
        lr=6e-3,
        **WIDTHS,
        conv_dim=[16, 16],
        conv_stride=[5, 2],
        conv_kernel=[10, 3],
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=16,
        vocab_size=WORDS,
    ),
    _case(
        "hubert",
        "audio",
        left=r"pos_conv_embed\.conv$",
        lr=6e-3,
        **WIDTHS,
        conv_dim=[16, 16],
        conv_stride=[5, 2],
        conv_kernel=[10, 3],
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=16,
        vocab_size=WORDS,
    ),
    _case("vit", "image", **WIDTHS, patch_size=8, fast=True),
    _case("deit", "image", architectures=["DeiTForImageClassification"], **WIDTHS, patch_size=8),
    _case("dinov2", "image", **WIDTHS, patch_size=8),
    _case("beit", "image", **WIDTHS, patch_size=8),
    _case("swin", "image", patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4),
    _case("swinv2", "image", patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4),
    _case(
        "segformer",
        "image",
        convolves=True,
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[16, 32],
        strides=[4, 2],
        patch_sizes=[7, 3],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
    ),
    _case(
        "pvt",
        "image",
        num_encoder_blocks=2,
        depths=[1, 1],
        sequence_reduction_ratios=[2, 1],
        hidden_sizes=[16, 32],
        strides=[4, 2],
        patch_sizes=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
    ),
    _case(
        "poolformer",
        "image",
        convolves=True,
        depths=[1, 1],
        hidden_sizes=[16, 32],
        num_encoder_blocks=2,
        patch_sizes=[7, 3],
        strides=[4, 2],
        padding=[2, 1],
        mlp_ratio=2.0,
    ),
    _case("convnext", "image", convolves=True, hidden_sizes=[16, 32], depths=[1, 1], num_stages=2, patch_size=4),
    _case("convnextv2", "image", convolves=True, hidden_sizes=[16, 32], depths=[1, 1], num_stages=2, patch_size=4),
    _case(
        "resnet",
        "image",
        convolves=True,
        embedding_size=16,
        hidden_sizes=[16, 32],
        depths=[1, 1],
        layer_type="basic",
        fast=True,
    ),
    _case("regnet", "image", convolves=True, embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], groups_width=8),
    _case("mobilenet_v1", "image", convolves=True, depth_multiplier=0.25),
    _case("mobilenet_v2", "image", convolves=True, depth_multiplier=0.25),
    _case(
        "efficientnet",
        "image",
        left=r"depthwise_conv$",
        convolves=True,
        width_coefficient=0.25,
        depth_coefficient=0.25,
        hidden_dim=320,
    ),
    _case(
        "mobilevit",
        "image",
        convolves=True,
        **WIDTHS,
        hidden_sizes=[16, 24, 32],
        neck_hidden_sizes=[8, 8, 16, 16, 24, 32, 32],
    ),
    _case(
        "levit",
        "image",
        convolves=True,
        architectures=["LevitForImageClassification"],
        patch_size=16,
        hidden_sizes=[16, 24, 32],
        num_attention_heads=[2, 2, 2],
        depths=[1, 1, 1],
        key_dim=[8, 8, 8],
        drop_path_rate=0,
    ),
    _case(
        "clip",
        "both",
        projection_dim=32,
        text_config={**STILL, **TEXT},
        vision_config={**STILL, **WIDTHS, "image_size": SIDE, "patch_size": 8},
    ),
)
"""In the order of the table."""
