"""Everything that can go wrong with an adapter as an artifact, as one tree.

AdapterError
├── UploadError                  what was sent cannot be taken in
│   ├── UploadTooLarge           larger than the server allows, before or while unpacking
│   ├── ChecksumMismatch         what arrived has another SHA-256 than the client said
│   ├── SourceError              a source cannot be read as it is named
│   │   ├── SourceRefused        the settings of this server do not open it
│   │   ├── SourceNotFound       there is nothing
│   │   ├── SourceForbidden      it does not let this server in
│   │   └── SourceUnavailable    it did not answer, broke off or took too long
│   └── UnsafeArchive            a path, link, device or bomb that no honest archive needs
├── InvalidAdapter               unpacked, but it is not an adapter this base can serve
├── NotFound                     no such adapter, version or alias
├── Conflict                     the request contradicts what is registered
│   ├── JobCancelled             somebody asked to stop the job that does this
│   ├── JobPaused                somebody asked to put the job that does this aside
│   ├── JobLost                  another worker has the job
│   └── Changed                  the adapter is not what the caller saw any more (If-Match)
├── StoreError                   the blob store is damaged or cannot be written
│   └── StoreUnreachable         the object store did not do what we asked; worth another try
├── RemoteError                  a server that we called did not do what we asked
│   ├── RemoteUnreachable        it did not answer, or it is no server of ours
│   └── RemoteRefusal            it refused; its message and code are passed on
├── MergeError                   a merge cannot be done as it was asked for
│   ├── NotMergeable             this adapter has no place in this base's weights; the message says which part
│   └── Unfaithful               what was merged is further from the adapter than the budget allows
├── ExportError                  an export cannot be made, or is not what it should be
│   ├── NotExportable            this model or adapter cannot be written in this format
│   └── NotTheSame               loaded again, the export computes something else than its source
└── TrainError                   a training run cannot start or cannot go on
    ├── ConfigError              the configuration is wrong
    ├── DataError                the data is wrong; the message names file:line:field
    ├── WouldNotFit              the estimate says that the memory is not enough
    ├── Diverged                 the loss or a gradient is not a finite number any more
    ├── RunStopped               somebody asked it to stop; a checkpoint is kept to go on from
    └── NotServable              training ended, but the result would not be served

A message says what was got, what was expected and what to do. `code` is a stable, machine-readable reason; the
server turns the class into an HTTP status (server/problems.py) and passes `code` on. Nothing here knows HTTP.
"""

from __future__ import annotations


class AdapterError(Exception):
    """Root of the tree. `code` names the reason in a form that programs can compare."""

    code = "adapter_error"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        if code is not None:
            self.code = code


class UploadError(AdapterError):
    code = "bad_upload"


class UploadTooLarge(UploadError):
    code = "upload_too_large"


class ChecksumMismatch(UploadError):
    code = "sha256_mismatch"


class SourceError(UploadError):
    code = "bad_source"


class SourceRefused(SourceError):
    code = "source_not_allowed"


class SourceNotFound(SourceError):
    code = "source_not_found"


class SourceForbidden(SourceError):
    code = "source_forbidden"


class SourceUnavailable(SourceError):
    code = "source_unavailable"


class UnsafeArchive(UploadError):
    code = "unsafe_archive"


class InvalidAdapter(AdapterError):
    code = "invalid_adapter"


class NotFound(AdapterError):
    code = "not_found"


class Conflict(AdapterError):
    code = "conflict"


class JobCancelled(Conflict):
    code = "job_cancelled"


class JobPaused(Conflict):
    code = "job_paused"


class JobLost(Conflict):
    code = "job_lost"


class Changed(Conflict):
    code = "precondition_failed"


class StoreError(AdapterError):
    code = "store_error"


class StoreUnreachable(StoreError):
    code = "store_unreachable"
    retry_after_s = 5


class RemoteError(AdapterError):
    code = "remote_error"


class RemoteUnreachable(RemoteError):
    code = "server_unreachable"


class RemoteRefusal(RemoteError):
    """`status`: what it answered."""

    code = "refused"

    def __init__(self, message: str, *, code: str | None = None, status: int = 500) -> None:
        super().__init__(message, code=code)
        self.status = status


class MergeError(AdapterError):
    code = "merge_error"


class NotMergeable(MergeError):
    code = "not_mergeable"


class Unfaithful(MergeError):
    code = "unfaithful_merge"


class ExportError(AdapterError):
    code = "export_error"


class NotExportable(ExportError):
    code = "not_exportable"


class NotTheSame(ExportError):
    code = "export_differs"


class TrainError(AdapterError):
    code = "train_error"


class ConfigError(TrainError):
    code = "bad_training_config"


class DataError(TrainError):
    code = "bad_data"


class WouldNotFit(TrainError):
    code = "would_not_fit"


class Diverged(TrainError):
    code = "diverged"


class RunStopped(TrainError):
    code = "training_stopped"


class NotServable(TrainError):
    code = "not_servable"
