"""Where progress, losses and results are logged to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ppcl.config.loading import Section
from ppcl.config.sections.fields import OPERATIONAL


def _no_url(folder: Any) -> Any:
    if "://" in str(folder):
        raise ValueError(
            "its files are appended to, which no bucket can do; give a folder of the coordinator's machine"
        )
    return folder


class MlflowTracking(Section):
    """An MLflow server; its user, password or token come from MLflow's own environment variables."""

    uri: str | None = Field(
        None, min_length=1, description="URL of the tracking server, or a folder; null: MLFLOW_TRACKING_URI"
    )
    experiment: str = Field("ppcl", min_length=1, description="name of the experiment; made where it does not exist")


class WandbTracking(Section):
    """A project of Weights & Biases; its key comes from `WANDB_API_KEY` or `wandb login`."""

    project: str = Field("ppcl", min_length=1, description="name of the project")
    entity: str | None = Field(None, description="user or team; null: that of the key")
    mode: Literal["online", "offline"] = Field(
        "online", description="offline: files in the folder wandb of the output, for `wandb sync`"
    )


class Tracking(Section):
    """What a job logs to while it runs; a change makes nothing anew. Needs `ppcl[tracking]`."""

    tensorboard: Annotated[Path, BeforeValidator(_no_url)] | None = Field(
        None, json_schema_extra=OPERATIONAL, description="folder of TensorBoard's files, one folder a job in it"
    )
    mlflow: MlflowTracking | None = Field(
        None, json_schema_extra=OPERATIONAL, description="{uri, experiment} of an MLflow server"
    )
    wandb: WandbTracking | None = Field(
        None, json_schema_extra=OPERATIONAL, description="{project, entity, mode} of Weights & Biases"
    )
