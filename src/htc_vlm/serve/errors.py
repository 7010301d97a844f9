"""Refusals, in the form that clients of the OpenAI API read: {"error": {"message", "type", "code"}}."""

from __future__ import annotations

from typing import Any

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class Refusal(Exception):
    """An answer other than 200. status: of HTTP; code: a word that programs can compare."""

    def __init__(self, status: int, message: str, code: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.retry_after = status, message, code, retry_after

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}

    def body(self) -> dict[str, Any]:
        """
        >>> Refusal(404, "no image abc in the store", "image_not_found").body()
        {'error': {'message': 'no image abc in the store', 'type': 'not_found_error', 'code': 'image_not_found'}}
        """
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "code": self.code}}


def busy(retry_after: int, what: str) -> Refusal:
    """429: come back in so many seconds."""
    return Refusal(429, f"{what}; try again in {retry_after} s", "busy", retry_after)


def model_is_dead() -> Refusal:
    """503: the thread of the model has ended, and only a restart brings it back."""
    return Refusal(503, "the model's thread has ended; restart the server (its log says why)", "model_unavailable")
