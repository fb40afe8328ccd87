from ppcl.models.adapter import IMG_QKV, TXT_QKV, BlockParts, FusedParts, ModelAdapter, register

FLUX = register(
    ModelAdapter(
        name="FLUX.1",
        transformer="FluxTransformer2DModel",
        pipelines=("FluxPipeline",),
        block_lists=("transformer_blocks", "single_transformer_blocks"),
        layer_counts=("num_layers", "num_single_layers"),
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
            },
            "single_transformer_blocks": {"img": FusedParts("norm.linear", "proj_mlp", "proj_out", IMG_QKV)},
        },
        prompt_arguments=("encoder_hidden_states", "pooled_projections"),
        shared_arguments=("img_ids", "txt_ids", "guidance"),
        encoded=("encoder_hidden_states", "pooled_projections", None),
        timestep_scale=1.0,
    )
)
