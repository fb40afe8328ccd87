"""The samples that everything is fitted and measured on: latents, timestep and prompt embedding of a transformer call.

`prompts` reads a file, `encoding` makes embeddings, `trajectory_recorder` keeps states of the teacher's own sampling
trajectories, `noised_images` makes states of images instead, `schedules` has the noise levels of both, `dataset` stores
the result as Parquet.
"""
