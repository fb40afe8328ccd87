"""The samples everything is fitted and measured on: latents, timestep and prompt embedding, one row a transformer call.

`prompts` are read from a file, `encoding` turns them into embeddings, `recording` keeps states of the teacher's own
sampling trajectories, `noising` makes states of pictures instead, `store` holds the result as Parquet.
"""
