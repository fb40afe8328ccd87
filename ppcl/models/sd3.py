from ppcl.models.adapter import IMG_QKV, TXT_QKV, BlockParts, ModelAdapter, register

SD3 = register(
    ModelAdapter(
        name="Stable Diffusion 3.5",
        transformer="SD3Transformer2DModel",
        pipelines=("StableDiffusion3Pipeline",),
        block_lists=("transformer_blocks",),
        layer_counts=("num_layers",),
        parts={
            "transformer_blocks": {
                "img": BlockParts("norm1.linear", "norm1.norm", "norm2", "ff", "attn.to_out.0", IMG_QKV),
                "txt": BlockParts(
                    "norm1_context.linear",
                    "norm1_context.norm",
                    "norm2_context",
                    "ff_context",
                    "attn.to_add_out",
                    TXT_QKV,
                ),
            }
        },
        prompt_arguments=("encoder_hidden_states", "pooled_projections"),
        shared_arguments=(),
        encoded=("encoder_hidden_states", None, "pooled_projections", None),
        timestep_scale=1000.0,
        packed_latents=False,
        guidance_argument="guidance_scale",
        # Zeros stand for the text of the T5 then.
        optional_components=("text_encoder_3", "tokenizer_3"),
    )
)
