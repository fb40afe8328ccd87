from ppcl.architecture.record import Architecture, register

FLUX = register(
    Architecture(
        name="FLUX.1",
        transformer="FluxTransformer2DModel",
        pipelines=("FluxPipeline",),
        block_lists=("transformer_blocks", "single_transformer_blocks"),
        # A single-stream block's FFN shares its output projection with the attention: there is no module to replace.
        ffn={"transformer_blocks": ("ff", "ff_context"), "single_transformer_blocks": (None, None)},
        prompt_arguments=("encoder_hidden_states", "pooled_projections"),
        shared_arguments=("img_ids", "txt_ids", "guidance"),
        encoded=("encoder_hidden_states", "pooled_projections", None),
        timestep_scale=1.0,
    )
)
