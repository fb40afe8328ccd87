"""The OpenAI Images API over a backend, as a FastAPI app."""

from serve.api.app import create_app
from serve.api.auth import ApiKeys, check_exposure

__all__ = ["ApiKeys", "check_exposure", "create_app"]
