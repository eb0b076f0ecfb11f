"""Explain errors of other libraries in one sentence, instead of a traceback."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator

from minecube.errors import (
    BusyError,
    LostReadError,
    MinecubeError,
    UnansweredError,
    UnreadArchiveError,
    UnreadWeightsError,
    UnusableFileError,
)

LONGEST_TEXT = 1000
"""Most characters of an error's text on one line."""

CLASSES = ("network", "data", "memory", "disk", "bug")
"""Classes of errors: what a user can do about them. `classify` explains each."""
_NETWORK = (UnansweredError, LostReadError, UnreadArchiveError, UnreadWeightsError, BusyError)
_NETWORK_MODULES = ("obstore.", "requests.", "urllib3.")
_DISK = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EIO,
    errno.EROFS,
    errno.EMFILE,
    errno.ENFILE,
    errno.ESTALE,
}

# obstore's name for a kind of store -> variables for its keys.
_KEYS = {
    "S3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true for public data",
    "GCS": "GOOGLE_APPLICATION_CREDENTIALS, or GOOGLE_SKIP_SIGNATURE=true for public data",
    "MicrosoftAzure": (
        "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, "
        "or AZURE_SKIP_SIGNATURE=true for public data"
    ),
}
# Places where obstore looks for a virtual machine's keys, if it has no keys.
_MACHINE_KEYS = (
    "169.254.169.254",
    "/latest/api/token",
    "metadata.google.internal",
    "/computeMetadata/",
    "Account must be",
)


def explain(error: BaseException) -> str | None:
    """Explain an error in one sentence, if the user can act on it.

    Returns None for every other error.

    Types are compared by name, to avoid imports.
    """
    kinds = [f"{kind.__module__}.{kind.__name__}" for kind in type(error).__mro__]
    names = {kind.rpartition(".")[2] for kind in kinds}
    if any(kind.startswith("distributed.") for kind in kinds) or "CancelledError" in names:
        return _explain_cluster(error, names)
    if any(kind.startswith("obstore.") for kind in kinds):
        return _explain_object_store(str(error), names)
    if "minecube.catalog.fields.FieldError" in kinds:
        return one_line(error)
    if isinstance(error, RecursionError):
        return "a file is nested too deeply to be read; check the files that you named"
    if isinstance(error, MemoryError):
        return (
            "this machine has too little memory for it; "
            "close other programs, or use a machine with more"
        )
    if isinstance(error, OSError) and error.errno != errno.EPIPE:
        return _explain_system(error)
    return None


def classify(error: BaseException) -> str:
    """Return the class of an error.

    network: a server did not answer; try again later.
    data: the input is missing, wrong or does not fit; a repetition fails again.
    memory: too little memory, or a worker died; try again with smaller blocks.
    disk: full, forbidden or broken; try again once it is mended.
    bug: an error of minecube.
    """
    chain = list(_iterate_causes(error))
    names = {kind.__name__ for cause in chain for kind in type(cause).__mro__}
    if names & {"MemoryError", "KilledWorker", "BrokenProcessPool"}:
        return "memory"
    if any(isinstance(cause, OSError) and cause.errno in _DISK for cause in chain):
        return "disk"
    if isinstance(error, UnusableFileError):
        return "data"
    modules = [type(cause).__module__ + "." for cause in chain]
    if any(module.startswith(_NETWORK_MODULES) for module in modules):
        return "network"
    if isinstance(error, _NETWORK) or names & {"TimeoutError", "ConnectionError", "WorkerError"}:
        return "network"
    if isinstance(error, PermissionError):
        return "disk"
    if isinstance(error, MinecubeError):
        return "data"
    return "bug"


def _iterate_causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def describe_failure(error: BaseException) -> str:
    """Describe a task's failure in one line: the error's own text, `explain`, or type and text."""
    if isinstance(error, MinecubeError):
        return str(error)
    return explain(error) or f"{type(error).__name__}: {one_line(error)}"


def exit_code_of(error: BaseException) -> int:
    """Return the exit code for an error known to `explain`: 2 for bad input, 1 for a failure."""
    if isinstance(error, ValueError | RecursionError):
        return 2
    return 1


def one_line(error: object) -> str:
    """Put an error's text on one line. Cut the middle of text over 1000 characters."""
    text = " ".join(str(error).split())
    if len(text) <= LONGEST_TEXT:
        return text
    return f"{text[:600]} ... {text[-300:]}"


def _explain_system(error: OSError) -> str:
    text = error.strerror or one_line(error)
    if error.filename:
        text = f"{error.filename}: {text}"
    return f"{text}; check that the place is there and can be read and written"


def _explain_cluster(error: BaseException, names: set[str]) -> str:
    if "KilledWorker" in names:
        deaths = getattr(error, "allowed_failures", 0) + 1
        return (
            f"a worker died on it {deaths} times, most often for lack of memory; "
            "give each worker more memory (`dask worker --memory-limit`)"
        )
    return (
        "the Dask scheduler is gone; committed site-years are safe, "
        "so start it and run the same command again"
    )


def _explain_object_store(text: str, names: set[str]) -> str:
    # Cut obstore's debug output, a dump of its values over dozens of lines.
    summary = one_line(text.partition("Debug source:")[0])
    summary = re.sub(
        r" in [\d.]+[mµn]?s\b|, after \d+ retries|, max_retries: \d+|, retry_timeout: \d+s",
        "",
        summary,
    )
    keys = next((variables for kind, variables in _KEYS.items() if kind in summary), _KEYS["S3"])
    if any(place in summary for place in _MACHINE_KEYS):
        return f"the object store needs keys and none are set; set {keys}"
    if names & {"PermissionDeniedError", "UnauthenticatedError"}:
        return f"the object store refused the keys ({summary}); check the bucket, and {keys}"
    if "NotFoundError" in names or "NoSuchBucket" in summary:
        return f"the object store has no such bucket or object ({summary}); check the URL"
    if "builder error" in summary:
        return (
            f"the object store's endpoint is no https:// URL ({summary}); "
            "correct it, or set AWS_ALLOW_HTTP=true for http://"
        )
    return (
        f"the object store does not answer as expected ({summary}); "
        "check the URL, its endpoint and the network"
    )
