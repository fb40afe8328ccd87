"""The sections of a job's configuration, a module a group; `ppcl.config.schema` puts them together."""
