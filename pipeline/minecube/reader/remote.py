"""Bytes of remote files by range requests: signed when made, retried by the class of what went wrong, never half.

GDAL's own network layer caches a failure or a short answer and replays it, does not say what it retried, and knows the
tokens of few providers. Here it asks for byte ranges through a Python file object instead (`RemoteFile`), which holds
neither credentials nor a signed URL, and every request is one of `Remote.fetch`: answered in full, tried again, or lost.

What is tried again: connections that fail, answers that stop short or stall, and HTTP 408, 425, 429 and 5xx (RFC 9110,
sections 15.5 and 15.6), after a pause that doubles, drawn at random, or as long as the server asks for (Retry-After). 401 and
403 (and 400, S3's answer to an expired session) are tried again with a new signature where requests are signed. Anything else
is final: it would be the same next time.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import random
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any, Protocol
from urllib.parse import urlsplit

import obstore
import obstore.exceptions
import obstore.store
import urllib3
from rasterio.abc import MultiByteRangeResourceContainer

from minecube.catalog import Access
from minecube.errors import CatalogError

log = logging.getLogger(__name__)

HEAD = 16384
"""Bytes of a file that come with its first request: the header of a COG of a whole Sentinel-2 tile fits."""
_BLOCK = 65536  # least that is asked for beyond the head by plain reads; ranges of tiles are asked for as they are
_HEADS = 2048  # heads kept, 32 MB: every block of a site opens the same files
PATIENCE_S = 180.0
"""How long one request is tried again before its read counts as lost."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 15.0
# Silence on a connection that ends a try: short at first, for most answers begin within a second, then twice as long each time.
_CONNECT_S, _STALL_S, _LONGEST_STALL_S = 10.0, 2.5, 40.0
_SIGNATURES = 4  # new ones that a request is tried with
_AGAIN = {408, 425, 429, 500, 502, 503, 504}
_UNSIGNED = {400, 401, 403}
_SIGNED_FOR = timedelta(minutes=30)


interrupted = threading.Event()
"""Set while the process is to end: requests in trouble are then given up instead of tried again."""


class RequestError(OSError):
    """A request that was not answered in the end; the message shows no signature."""


@dataclass
class Tally:
    """What one read asked of the network."""

    requests: int = 0
    retried: int = 0
    bytes: int = 0
    error: Exception | None = None
    """Why GDAL was given no bytes, or false ones: whoever has read through it must ask."""


@dataclass(frozen=True)
class Head:
    """The beginning of a file, which holds a COG's header."""

    data: bytes
    size: int
    version: str
    """ETag: bytes of two versions of a file would make an image that never was."""


class Remote:
    """Requests in one way of access; one a process (`remote_for`), for any thread."""

    def __init__(self, access: Access) -> None:
        self.access = access
        self._pool = urllib3.PoolManager(maxsize=access.connections, block=True, num_pools=16)
        self._heads: dict[str, Head] = {}
        self._tokens: dict[str, tuple[str, float]] = {}
        self._lock, self._signing = threading.Lock(), threading.Lock()
        for name in ("connectionpool", "poolmanager", "util.retry"):
            logging.getLogger(f"urllib3.{name}").addFilter(_without_queries)

    def head(self, href: str, tally: Tally) -> Head:
        """The file's first bytes, its size and version; raises RequestError."""
        known = self._heads.get(href)
        if known is None:
            known = self._fetch(href, 0, HEAD, tally, None)
            with self._lock:
                if len(self._heads) >= _HEADS:
                    del self._heads[next(iter(self._heads))]
                self._heads[href] = known
        return known

    def fetch(self, href: str, head: Head, start: int, length: int, tally: Tally) -> bytes:
        """Exactly these bytes, or all up to the file's end; raises RequestError."""
        stop = min(start + length, head.size)
        if stop <= len(head.data):
            return head.data[start:stop]
        return self._fetch(href, start, stop - start, tally, head).data

    def _fetch(self, href: str, start: int, length: int, tally: Tally, head: Head | None) -> Head:
        began, pause, stall, signatures, tried = 0.0, _FIRST_PAUSE_S, _STALL_S, 0, 0
        while True:
            tally.requests += 1
            asked_to_wait = 0.0
            try:
                url, key = self._signed(href)
                answer = self._pool.request(
                    "GET",
                    url,
                    headers={"Range": f"bytes={start}-{start + length - 1}", "Accept-Encoding": "identity"},
                    retries=urllib3.Retry(connect=0, read=0, status=0, other=0, redirect=5, raise_on_status=False),
                    timeout=urllib3.Timeout(connect=_CONNECT_S, read=stall),
                    preload_content=False,
                )
                try:
                    if answer.status in (200, 206):
                        return self._checked(answer, href, start, length, tally, head)
                    answer.drain_conn()
                finally:
                    answer.release_conn()
                problem = f"HTTP {answer.status}"
                resign = answer.status in _UNSIGNED and key is not None and signatures < _SIGNATURES
                if not (resign or answer.status in _AGAIN):
                    raise RequestError(f"{problem} {answer.reason or ''}".strip())
                if resign:
                    signatures += 1
                    self._forget(key, url)
                asked_to_wait = _retry_after(answer.headers.get("Retry-After"))
            except _IncompleteError as error:
                problem = str(error)
            except urllib3.exceptions.HTTPError as error:
                problem = without_query(_reason(error))
                if isinstance(error, urllib3.exceptions.LocationValueError) or "CERTIFICATE_VERIFY_FAILED" in problem:
                    raise RequestError(problem) from error
            began = began or time.monotonic()  # of the trouble: a request may have queued for its connection long before
            if time.monotonic() - began + asked_to_wait > PATIENCE_S:
                raise RequestError(f"{problem}, after {tried + 1} tries in {time.monotonic() - began:.0f} s")
            tally.retried += 1
            tried += 1
            log.debug("%s: %s; try %d", without_query(href), problem, tried + 1)
            # All of it random: requests that failed together must not come back together.
            wait = max(asked_to_wait, random.uniform(0, pause))  # noqa: S311  no secret depends on it
            if interrupted.wait(wait):
                raise RequestError(f"{problem}; interrupted")
            pause, stall = min(2 * pause, _LONGEST_PAUSE_S), min(2 * stall, _LONGEST_STALL_S)

    def _checked(
        self, answer: urllib3.BaseHTTPResponse, href: str, start: int, length: int, tally: Tally, head: Head | None
    ) -> Head:
        """The answer's bytes if they are those that were asked for."""
        place = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", answer.headers.get("Content-Range", ""))
        if answer.status == 200:
            # A file shorter than the range may come whole; one that is longer is not wanted whole.
            size = int(answer.headers.get("Content-Length", -1))
            if start or not 0 <= size <= length:
                answer.close()
                raise RequestError("the server does not answer byte ranges, which reading windows of images needs")
        elif not place or int(place[1]) != start:
            answer.close()
            raise _IncompleteError(f"Content-Range {answer.headers.get('Content-Range')!r} for bytes from {start} on")
        else:
            size = int(place[3])
        data = answer.read()
        tally.bytes += len(data)
        if len(data) != min(length, size - start):
            raise _IncompleteError(f"{len(data)} bytes of {min(length, size - start)}")
        version = answer.headers.get("ETag", "")
        if head and (size != head.size or (version and head.version and version != head.version)):
            with self._lock:
                self._heads.pop(href, None)
            raise RequestError("the file changed while it was read")
        return Head(data, size, version)

    def _signed(self, href: str) -> tuple[str, str | None]:
        """The URL to ask, and what its signature is kept under; None where nothing is signed."""
        if self.access.kind == "planetary-computer":
            parts = urlsplit(href)
            container = f"{parts.netloc.split('.')[0].split(':')[0]}/{parts.path.split('/')[1]}"
            token = self._token(container)
            return f"{href}{'&' if parts.query else '?'}{token}", container
        if href.startswith("s3://"):
            return self._presigned(href)
        return href, None

    def _token(self, container: str) -> str:
        """The container's token, asked for anew once most of its life is over."""
        with self._signing:
            token, until = self._tokens.get(container, ("", 0.0))
            if time.time() >= until:
                answer = self._pool.request("GET", f"{self.access.href}/{container}", timeout=30.0, retries=_TOKEN_RETRIES)
                try:
                    content = json.loads(answer.data)
                    token = content["token"]
                    left = (datetime.fromisoformat(content["msft:expiry"]) - datetime.now(tz=UTC)).total_seconds()
                except (ValueError, KeyError, TypeError) as error:
                    said = f"HTTP {answer.status}" if answer.status != 200 else f"an answer without token ({error})"
                    raise RequestError(f"{self.access.href} gives no token for {container}: {said}") from error
                until = time.time() + left - min(60.0, left / 10)
                self._tokens[container] = token, until
            return token

    def _presigned(self, href: str) -> tuple[str, str | None]:
        bucket, _, path = href.removeprefix("s3://").partition("/")
        if self.access.anonymous:
            region = self.access.region or "us-east-1"
            return f"{self.access.href or f'https://s3.{region}.amazonaws.com'}/{bucket}/{path}", None
        try:
            return obstore.sign(_bucket(self.access, bucket), "GET", path, _SIGNED_FOR), bucket
        except (obstore.exceptions.BaseError, ValueError) as error:
            raise RequestError(f"s3://{bucket}: requests cannot be signed ({type(error).__name__})") from error

    def _forget(self, key: str | None, url: str) -> None:
        """No longer use the signature that was refused; another thread may have renewed it already."""
        with self._signing:
            if key in self._tokens and url.endswith(self._tokens[key][0]):
                del self._tokens[key]


# Raised where it goes on failing: the read that wanted the token is then tried again itself.
_TOKEN_RETRIES = urllib3.Retry(total=5, backoff_factor=0.3, backoff_jitter=0.3, status_forcelist=_AGAIN)


_REMOTES: dict[Access, Remote] = {}
_MAKING = threading.Lock()  # two at once would have twice the connections


def remote_for(access: Access) -> Remote:
    """The process's connections for one way of access."""
    with _MAKING:
        if access not in _REMOTES:
            _REMOTES[access] = Remote(access)
        return _REMOTES[access]


@functools.cache
def _bucket(access: Access, name: str) -> Any:
    """obstore's store of a bucket, asked for nothing but signatures; it takes keys from the environment."""
    options: dict[str, Any] = {"region": access.region} if access.region else {}
    if access.href:
        options |= {"endpoint": access.href, "virtual_hosted_style_request": False}
        if access.href.startswith("http://"):
            options["client_options"] = {"allow_http": True}
    return obstore.store.S3Store(name, **options)


def check_credentials(access: Access, source_id: str) -> None:
    """Raises CatalogError where requests are to be signed with keys that the environment lacks."""
    if access.kind != "s3" or access.anonymous or not access.href:
        return  # AWS itself knows other ways than keys: roles of machines, profiles
    lacking = [name for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY") if not os.environ.get(name)]
    if lacking:
        raise CatalogError(
            f"source {source_id!r} reads from {access.href}, which needs keys: {' and '.join(lacking)} not set in the "
            "environment; get them from the provider's site and export them"
        )


class _IncompleteError(Exception):
    """An answer that is not what was asked for, though the server says that all is well."""


def _retry_after(value: str | None) -> float:
    """Seconds that the server asks to wait (RFC 9110, 10.2.3: a number or a date); 0 where it does not."""
    if not value:
        return 0.0
    try:
        return max(0.0, float(value) if value.strip().isdigit() else parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0


def _reason(error: BaseException) -> str:
    inner = getattr(error, "reason", None)
    return _reason(inner) if isinstance(inner, BaseException) else f"{type(error).__name__}: {error}"


def _without_queries(record: logging.LogRecord) -> bool:
    """For urllib3's log, which tells every URL, and with it its signature."""
    if isinstance(record.args, tuple):
        record.args = tuple(without_query(a) if isinstance(a, str) else a for a in record.args)
    return True


def without_query(text: str) -> str:
    """Text without the queries of URLs, which may hold a signature that must not reach a log."""
    return re.sub(r"\?[^\s'\")]*", "", text)


class Ranges(Protocol):
    """Where the bytes of a file come from."""

    def fetch(self, href: str, head: Head, start: int, length: int, tally: Tally) -> bytes:
        """These bytes, or all up to the file's end; raises OSError."""


class RemoteFile:
    """A remote file as GDAL wants it: seekable, read by one thread; ranges of tiles are fetched as they are.

    GDAL calls it from C++, where a Python exception ends the process. So none leaves it: what went wrong is left in the tally,
    and GDAL is given zeros, which whoever called GDAL must not take for pixels.
    """

    def __init__(self, source: Ranges, href: str, head: Head, tally: Tally, least: int = _BLOCK) -> None:
        self._source, self._href, self._head, self._tally, self._least = source, href, head, tally, least
        self._at, self._start, self._buffer = 0, 0, b""

    def __enter__(self) -> RemoteFile:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is held open."""

    def close(self) -> None:
        """Nothing is held open."""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a position, as files do."""
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._head.size}[whence]
        return self._at

    def tell(self) -> int:
        """The position."""
        return self._at

    def read(self, length: int = -1) -> bytes:
        """The bytes from the position on; fewer only at the file's end."""
        stop = self._head.size if length < 0 else min(self._at + length, self._head.size)
        if stop <= self._at:
            return b""
        if stop <= len(self._head.data):
            data = self._head.data[self._at : stop]
        else:
            if not self._start <= self._at <= stop <= self._start + len(self._buffer):
                self._start, self._buffer = self._at, self._fetched(self._at, max(stop - self._at, self._least))
            data = self._buffer[self._at - self._start : stop - self._start]
        self._at += len(data)
        return data

    def get_byte_ranges(self, offsets: Sequence[int], sizes: Sequence[int]) -> list[bytes]:
        """The bytes of each range, as many as were asked for."""
        found = [self._fetched(start, length) for start, length in zip(offsets, sizes, strict=True)]
        if any(len(data) < length for data, length in zip(found, sizes, strict=True)) and not self._tally.error:
            self._tally.error = RequestError(f"it ends after {self._head.size} bytes, before the tiles that its header names")
        return [data.ljust(length, b"\0") for data, length in zip(found, sizes, strict=True)]

    def _fetched(self, start: int, length: int) -> bytes:
        if not self._tally.error:
            try:
                return self._source.fetch(self._href, self._head, start, length, self._tally)
            except Exception as error:  # kept, and raised by the reader: see above
                self._tally.error = error
        return bytes(min(length, max(self._head.size - start, 0)))


@MultiByteRangeResourceContainer.register
class Opened:
    """One remote file for `rasterio.open(..., opener=)`."""

    def __init__(self, source: Ranges, href: str, head: Head, tally: Tally, least: int = _BLOCK) -> None:
        self._made_of = source, href, head, tally, least

    def open(self, path: str, mode: str = "rb", **_: Any) -> RemoteFile:
        """The file, whatever it is called: names that GDAL sees, and may log, hold no URL."""
        del path, mode
        return RemoteFile(*self._made_of)

    def isfile(self, path: str) -> bool:
        """Yes."""
        del path
        return True

    def isdir(self, path: str) -> bool:
        """No."""
        del path
        return False

    def ls(self, path: str) -> list[str]:
        """Nothing lies beside it: sidecars would be asked for, one request each."""
        del path
        return []

    def mtime(self, path: str) -> int:
        """Unknown."""
        del path
        return 0

    def size(self, path: str) -> int:
        """Bytes of the file."""
        del path
        return self._made_of[2].size
