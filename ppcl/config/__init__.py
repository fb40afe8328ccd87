"""The configuration of a job: its schema, how it is loaded, and the type of a location."""
