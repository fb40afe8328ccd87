from ppcl.architecture.record import Architecture, register

QWEN_IMAGE = register(
    Architecture(
        name="Qwen-Image",
        transformer="QwenImageTransformer2DModel",
        pipelines=("QwenImagePipeline",),
        block_lists=("transformer_blocks",),
        ffn={"transformer_blocks": ("img_mlp", "txt_mlp")},
        prompt_arguments=("encoder_hidden_states", "encoder_hidden_states_mask"),
        text_mask="encoder_hidden_states_mask",
        shared_arguments=("img_shapes", "guidance"),
        encoded=("encoder_hidden_states", "encoder_hidden_states_mask"),
        timestep_scale=1.0,
    )
)
