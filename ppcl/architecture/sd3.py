from ppcl.architecture.record import Architecture, register

SD3 = register(
    Architecture(
        name="Stable Diffusion 3.5",
        transformer="SD3Transformer2DModel",
        pipelines=("StableDiffusion3Pipeline",),
        block_lists=("transformer_blocks",),
        ffn={"transformer_blocks": ("ff", "ff_context")},
        prompt_arguments=("encoder_hidden_states", "pooled_projections"),
        shared_arguments=(),
        encoded=("encoder_hidden_states", None, "pooled_projections", None),
        timestep_scale=1000.0,
        packed_latents=False,
    )
)
