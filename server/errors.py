"""What can go wrong with a request, as one tree. `problems.py` gives each class its HTTP status; nothing here does.

ServerError
├── BadRequest                the body or a parameter is wrong
│   ├── RequestTooLarge       the body is larger than the server reads
│   └── RangeNotSatisfiable   the part of a file that was asked for lies outside it
├── AuthenticationFailed      no key, or one we do not know
├── PermissionDenied          a known key without the scope
├── ModelNotFound             no base, adapter, version or alias of that name
├── AdapterUnavailable        the version exists, but is quarantined, draining or refused by the engine
├── MergedEngineRefused       there is no room for an engine of merged weights, or the version cannot have one
├── Overloaded                too many wait, or every place is leased; worth another try after `retry_after_s`
├── InsufficientStorage       what was asked for would not fit on the disk, or in the limit for it
├── EngineUnavailable         the engine is starting or being rebuilt; worth another try after `retry_after_s`
└── CorruptedOutput           the engine produced NaN logits; nothing of the answer can be trusted

SettingsError                 the server cannot start as configured (never reaches a client)
"""

from __future__ import annotations


class ServerError(Exception):
    """Root of the tree. `code` is stable and machine-readable; `param` names the offending field."""

    code = "server_error"

    def __init__(self, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


class BadRequest(ServerError):
    code = "bad_request"


class RequestTooLarge(BadRequest):
    code = "request_too_large"


class RangeNotSatisfiable(BadRequest):
    code = "range_not_satisfiable"


class AuthenticationFailed(ServerError):
    code = "invalid_api_key"


class PermissionDenied(ServerError):
    code = "missing_scope"


class ModelNotFound(ServerError):
    code = "model_not_found"


class AdapterUnavailable(ServerError):
    code = "adapter_unavailable"


class MergedEngineRefused(ServerError):
    code = "merged_engine_refused"


class Overloaded(ServerError):
    code = "overloaded"
    retry_after_s = 1


class InsufficientStorage(ServerError):
    code = "insufficient_storage"


class EngineUnavailable(ServerError):
    code = "engine_unavailable"
    retry_after_s = 5


class CorruptedOutput(ServerError):
    code = "corrupted_output"


class SettingsError(Exception):
    """Raised while starting; the message is what the operator reads."""
