"""The parameters of a request: OpenAI's and ours."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from serve.api.errors import from_validation, invalid, shown
from serve.protocol import AUTO, WITH

Scale = Annotated[float, Field(ge=0, le=100)]


class LoraParameters(BaseModel):
    """The LoRA of a request: one of the server's, by name."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    name: str = Field(min_length=1, max_length=256, description="a LoRA that the list of models names")
    scale: float = Field(1.0, ge=-10, le=10, description="how strongly it is on, times what it was trained to")


LARGEST_SEED = 2**32 - 1


class ImageRequest(BaseModel):
    """The body of `POST /v1/images/generations`. A key that is null counts as left out."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    prompt: str = Field(description="what the images show")
    model: str = Field(
        AUTO,
        min_length=1,
        max_length=4096,
        description="a variant, a plan as text, or auto: the largest that meets the deadline; `+NAME` adds a LoRA",
    )
    n: int = Field(1, ge=1, le=10, description="number of images; image i has the seed `seed + i`")
    size: str = Field(
        "auto", pattern="^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$", description="WIDTHxHEIGHT in pixels, or auto"
    )
    response_format: Literal["b64_json"] = Field(
        "b64_json", description="the answer contains the images; there is no store to link to"
    )
    output_format: Literal["png", "jpeg", "webp"] = Field("png", description="the images' file format")
    output_compression: int | None = Field(None, ge=0, le=100, description="quality of jpeg and webp, 100 unless given")
    quality: Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"] = Field(
        "auto", description="accepted and returned; `model` and `num_inference_steps` determine the quality of an image"
    )
    background: Literal["auto", "opaque"] = Field("auto", description="images are opaque")
    stream: bool = Field(False, description="answer with server-sent events")
    partial_images: int = Field(0, ge=0, le=3, description="previews of each image, in a stream")

    style: Any = Field(None, description="accepted and ignored, like the next three parameters")
    moderation: Any = None
    user: Any = None
    safety_identifier: Any = None

    negative_prompt: str | None = Field(
        None, description="what the images must not show; used by guidance with two calls per step"
    )
    num_inference_steps: int | None = Field(None, ge=1, description="denoising steps")
    guidance_scale: Scale | None = Field(None, description="guidance scale of a guidance-distilled model")
    true_cfg_scale: Scale | None = Field(None, description="classifier-free guidance with two calls per step; 1 is off")
    seed: int | None = Field(
        None,
        ge=0,
        le=LARGEST_SEED,
        description="seed of the noise; chosen at random and returned in the answer unless given",
    )
    lora: LoraParameters | None = Field(None, description="a LoRA of the server: `{name, scale}`")
    min_variant: str | None = Field(
        None, min_length=1, max_length=256, description="the smallest variant that auto may choose"
    )
    deadline_ms: int | None = Field(
        None, ge=1, le=86_400_000, description="milliseconds until the images must be finished"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> ImageRequest:
        if not self.prompt.strip():
            raise invalid("prompt is empty; describe the image", "prompt")
        if self.partial_images and not self.stream:
            raise invalid(
                f"partial_images is {self.partial_images} without a stream; set stream to true", "partial_images"
            )
        if self.output_format == "png" and self.output_compression not in (None, 100):
            raise invalid(
                f"output_compression is {self.output_compression}, but png keeps every pixel; "
                "set output_format to jpeg or webp",
                "output_compression",
            )
        if self.lora is not None and WITH in self.model:
            raise invalid(f"the model {shown(self.model)} names a LoRA already; leave lora out", "lora")
        if self.min_variant is not None and self.model.partition(WITH)[0] != AUTO:
            raise invalid(
                f"min_variant applies only to the model {AUTO}; {shown(self.model)} is never changed", "min_variant"
            )
        return self

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of the pipeline's call that this request gives."""
        given = {name: getattr(self, name) for name in ("negative_prompt", "guidance_scale", "true_cfg_scale")}
        return {name: value for name, value in given.items() if value is not None}


def parse(values: dict[str, Any]) -> ImageRequest:
    """Raises `Refused` that names the first key that is wrong."""
    known = ImageRequest.model_fields
    for key in values:
        if key not in known:
            near = get_close_matches(key[:60], known, n=1)
            nearest = f"; the nearest is {near[0]}" if near else f"; known are {', '.join(known)}"
            raise invalid(f"unknown parameter {shown(key)}{nearest}", shown(key).strip("'\""), "unknown_parameter")
        if isinstance(values[key], str) and not _is_text(values[key]):
            raise invalid(f"{key} is {shown(values[key])}, with half of a surrogate pair; send whole characters", key)
    try:
        return ImageRequest.model_validate({key: value for key, value in values.items() if value is not None})
    except ValidationError as error:
        raise from_validation(error) from None


def _is_text(value: str) -> bool:
    """JSON can write code points that are no characters, which nothing behind the API could encode."""
    return not any("\ud800" <= character <= "\udfff" for character in value)
