"""Whatever a driver raises → one of our own errors, without what may be a secret. The edge to libraries of others."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

from adapters.errors import AdapterError, SourceError, SourceForbidden, SourceNotFound, SourceUnavailable
from adapters.sources.address import Source, shown

log = logging.getLogger(__name__)

EXTRAS = {"s3": "loraplex[s3]", "s3a": "loraplex[s3]", "hf": "huggingface_hub", "gs": "gcsfs", "gcs": "gcsfs"}
NO_CREDENTIALS = re.compile(r"NoCredentials|CredentialRetrieval|PartialCredentials|Unauthori[sz]ed|Forbidden")


@contextmanager
def reporting(source: Source) -> Iterator[None]:
    """Raises SourceError or one of its kind for anything but our own errors."""
    place = source.shown[:200]
    try:
        yield
    except AdapterError:
        raise
    except ImportError as error:
        wanted = EXTRAS.get(source.protocol)
        advice = f"pip install '{wanted}'" if wanted else "install what it names"
        raise SourceError(
            f"{source.protocol}:// needs a driver that is not installed on the server ({error}); {advice}",
            code="missing_driver",
        ) from None
    except FileNotFoundError:
        raise SourceNotFound(f"there is nothing at {place}; check the address") from None
    except PermissionError:
        raise _forbidden(place) from None
    except Exception as error:
        if NO_CREDENTIALS.search(type(error).__name__):
            raise _forbidden(place) from None
        log.warning("a source could not be read", exc_info=error, extra={"source": place})
        raise _unavailable(place, error) from None


def _forbidden(place: str) -> SourceForbidden:
    return SourceForbidden(f"{place} does not let this server in; give the server credentials that may read it")


def _unavailable(place: str, error: Exception) -> SourceUnavailable:
    name = type(error).__name__
    if "timeout" in name.lower():
        return SourceUnavailable(f"{place} did not answer in time ({name}); try again", code="source_timeout")
    reason = shown(str(error).partition("\n")[0])[:200]
    return SourceUnavailable(f"{place} could not be read ({name}: {reason}); try again, or check the address")
