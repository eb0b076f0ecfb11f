"""Explain errors of other libraries in one sentence, so that no user has to read a traceback."""

from __future__ import annotations

import errno
import re

_KEYS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true for public data"


def explain(error: BaseException) -> str | None:
    """Explain an error that the user can act on, in one sentence; return None for every other error.

    Kinds are compared by name, so that an error costs no import.
    """
    kinds = [f"{kind.__module__}.{kind.__name__}" for kind in type(error).__mro__]
    names = {kind.rpartition(".")[2] for kind in kinds}
    if any(kind.startswith("distributed.") for kind in kinds) or "CancelledError" in names:
        return _explain_cluster(error, names)
    if any(kind.startswith("obstore.") for kind in kinds):
        return _explain_object_store(str(error), names)
    if isinstance(error, MemoryError):
        return "this machine has too little memory for it; close other programs, or use a machine with more"
    if isinstance(error, OSError) and error.errno != errno.EPIPE:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or one_line(error)}; check that the place is there and can be read and written"
    return None


def one_line(error: object) -> str:
    """Put the text of an error on one line, and cut its middle where it is very long."""
    text = " ".join(str(error).split())
    return text if len(text) <= 1000 else f"{text[:600]} ... {text[-300:]}"


def _explain_cluster(error: BaseException, names: set[str]) -> str:
    if "KilledWorker" in names:
        times = getattr(error, "allowed_failures", 0) + 1
        return (
            f"a worker died on it {times} times, most often for lack of memory; give each worker more memory "
            "(`dask worker --memory-limit`)"
        )
    return "the Dask scheduler is gone; what is committed is safe, so start it and run the same command again"


def _explain_object_store(text: str, names: set[str]) -> str:
    # The rest is for those who debug obstore: a dump of its own values over dozens of lines.
    said = one_line(text.partition("Debug source:")[0])
    said = re.sub(r" in [\d.]+[mµn]?s\b|, after \d+ retries|, max_retries: \d+|, retry_timeout: \d+s", "", said)
    if "169.254.169.254" in said or "/latest/api/token" in said:
        return f"the object store needs keys and none are set; set {_KEYS}"
    if names & {"PermissionDeniedError", "UnauthenticatedError"}:
        return f"the object store refused the keys ({said}); check the bucket and {_KEYS}"
    if "NotFoundError" in names or "NoSuchBucket" in said:
        return f"the object store has no such bucket or object ({said}); check the URL of --store"
    return (
        f"the object store does not answer as expected ({said}); check the URL, its endpoint (AWS_ENDPOINT_URL) and the network"
    )
