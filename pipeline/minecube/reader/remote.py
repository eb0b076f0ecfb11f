"""Remote files by byte-range requests: signed on use, retried by kind of error, never partial.

GDAL's own network layer caches and replays failures and short answers. It does not report its
retries, and supports the tokens of few providers. Here GDAL requests byte ranges through a Python
file object instead (`RemoteFile`). This object holds neither credentials nor a signed URL. Every
request is one call of `Remote.fetch`: answered in full, tried again, or lost.

Broken connections, short or stalled answers, and HTTP 408, 425, 429 and 5xx are tried again (RFC
9110, sections 15.5 and 15.6). The pause before a retry is random with a doubling limit, or as long
as the server asks (Retry-After). 401 and 403 are tried again with a new signature if requests are
signed. So is 400, S3's answer to an expired session. An unreachable host is tried for seconds only
and then remembered (`network`). All other errors are final, since a retry would give the same
result.

Tokens and signatures go only to the hosts and buckets named by the source
(`Access.credentials_for`). All others get unsigned requests. Redirects are also followed without
tokens. Every connection follows the rules of `network`.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any, Protocol
from urllib.parse import quote, urlsplit

import obstore
import obstore.exceptions
import obstore.store
import requests
import urllib3
from rasterio.abc import MultiByteRangeResourceContainer

from minecube import network
from minecube.catalog import Access
from minecube.errors import CatalogError
from minecube.network import ForbiddenError, MissingError, RequestError, without_query

log = logging.getLogger(__name__)

HEAD = 16384
"""Bytes of a file fetched by its first request. The header of a COG of a whole Sentinel-2 tile
fits."""
_BLOCK = 65536  # smallest plain read beyond the head; ranges of tiles are fetched exactly
_HEADS = 2048  # heads in the cache, 32 MB: all blocks of a site open the same files
PATIENCE_S = network.PATIENCE_S
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 15.0
# Silence on a connection ends a try. The limit is short at first, since most answers begin within a
# second, and doubles with each try.
_CONNECT_S, _STALL_S, _LONGEST_STALL_S = 10.0, 2.5, 40.0
_SIGNATURES = 4  # new signatures per request
_AGAIN = {408, 425, 429, 500, 502, 503, 504}
_UNSIGNED = {400, 401, 403}
_MISSING = {403, 404, 410}  # 403: S3's answer for a missing object of an unlisted bucket, too
_NEEDS_KEYS = {401, 403, 409}  # 409: Azure's answer without public access
_SIGNED_FOR = timedelta(minutes=30)
_REDIRECTS = 5
_LONGEST_REFUSED_PAUSE_S = 1.0  # a last try must end in time
_TOKEN_BYTES = 65536  # longest answer of a token service
_SIGNING = {
    "max_retries": 1,
    "retry_timeout": timedelta(seconds=5),
}  # for AWS's keys of the machine


interrupted = threading.Event()
"""Set when the process is about to end: requests in trouble are then given up instead of
retried."""


@dataclass
class Tally:
    """Network use of one read."""

    requests: int = 0
    retried: int = 0
    bytes: int = 0
    error: Exception | None = None
    """Reason for missing or false bytes given to GDAL. The caller of GDAL must check it."""


@dataclass(frozen=True)
class Head:
    """The beginning of a file, including a COG's header."""

    data: bytes
    size: int
    version: str
    """ETag of the file: bytes of two versions would make a false image."""


class _Checked(urllib3.connection.HTTPConnection):
    """A connection with its address checked before any byte is sent, TLS included."""

    def __init__(self, *args: Any, check: Callable[[str, str], None], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._check = check

    def _new_conn(self) -> socket.socket:
        """Connect, and raise ForbiddenError if the host has a forbidden address."""
        connected = super()._new_conn()
        try:
            self._check(self.host, connected.getpeername()[0])
        except BaseException:
            connected.close()
            raise
        return connected


class _CheckedTls(_Checked, urllib3.connection.HTTPSConnection):
    """A checked connection over TLS."""


class _Pools(urllib3.PoolManager):
    """Pools of checked connections."""

    def __init__(self, check: Callable[[str, str], None], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._check = check

    def connection_from_host(
        self,
        host: str | None,
        port: int | None = None,
        scheme: str | None = "http",
        pool_kwargs: dict[str, Any] | None = None,
    ) -> urllib3.HTTPConnectionPool:
        """Return the pool of a host."""
        pool = super().connection_from_host(host, port, scheme, pool_kwargs)
        kind = _CheckedTls if scheme == "https" else _Checked
        pool.ConnectionCls = functools.partial(kind, check=self._check)  # type: ignore[assignment]
        return pool


class Remote:
    """Requests for one access and hrefs from one origin.

    A process has one per access and origin (`remote_for`), for any thread.
    """

    def __init__(self, access: Access, origin: str = "") -> None:
        self.access = access
        self._origin = origin
        self._named = set(access.hosts())
        self._pool = _Pools(self._check, maxsize=access.connections, block=True, num_pools=16)
        self._heads: dict[str, Head] = {}
        self._tokens: dict[str, tuple[str, float]] = {}
        self._lock, self._signing = threading.Lock(), threading.Lock()

    def _check(self, host: str, address: str) -> None:
        network.check_address(host, address, self._origin, self._named)

    def head(self, href: str, tally: Tally) -> Head:
        """Fetch the file's first bytes, its size and version; raise RequestError on failure."""
        known = self._heads.get(href)
        if known is None:
            known = self._fetch(href, 0, HEAD, tally, None)
            with self._lock:
                if len(self._heads) >= _HEADS:
                    del self._heads[next(iter(self._heads))]
                self._heads[href] = known
        return known

    def fetch(self, href: str, head: Head, start: int, length: int, tally: Tally) -> bytes:
        """Fetch exactly these bytes, or all up to the file's end; raise RequestError on failure."""
        stop = min(start + length, head.size)
        if stop <= len(head.data):
            return head.data[start:stop]
        return self._fetch(href, start, stop - start, tally, head).data

    def version(self, href: str) -> tuple[int, str | None]:
        """Fetch the current size and ETag of a file; raise RequestError on failure.

        Without an ETag from the server, the second value stays None.
        """
        found = self._fetch(href, 0, 1, Tally(), None)
        return found.size, found.version or None

    def whole(self, href: str, most: int) -> bytes:
        """Fetch all bytes of a file of limited size; raise RequestError on failure."""
        found = self._fetch(href, 0, most, Tally(), None)
        if found.size > most:
            raise RequestError(f"expected at most {most:,} bytes, found {found.size:,}")
        return found.data

    def _fetch(self, href: str, start: int, length: int, tally: Tally, head: Head | None) -> Head:
        began = 0.0  # start of the trouble; the request may have queued long before
        pause, stall = _FIRST_PAUSE_S, _STALL_S
        signatures, tried = 0, 0
        while True:
            tally.requests += 1
            try:
                return self._try(href, start, length, tally, head, stall, signatures < _SIGNATURES)
            except _TroubleError as error:
                trouble = error
            began = began or time.monotonic()
            signatures += trouble.resigned
            tried += 1
            _give_up_in_the_end(trouble, time.monotonic() - began, tried)
            tally.retried += 1
            log.debug("%s: %s; try %d", without_query(href), trouble, tried + 1)
            # Draw the pause at random, so failed requests do not return all at once.
            longest = _LONGEST_REFUSED_PAUSE_S if trouble.unreachable else pause
            wait = max(trouble.wait_s, random.uniform(0, min(pause, longest)))  # noqa: S311  no secret depends on it
            if interrupted.wait(wait):
                raise RequestError(f"{trouble}; interrupted")
            pause, stall = min(2 * pause, _LONGEST_PAUSE_S), min(2 * stall, _LONGEST_STALL_S)

    def _try(
        self,
        href: str,
        start: int,
        length: int,
        tally: Tally,
        head: Head | None,
        stall: float,
        may_resign: bool,
    ) -> Head:
        """Send a request once.

        Raises _TroubleError for temporary errors, RequestError for final ones.
        """
        headers = {"Range": f"bytes={start}-{start + length - 1}", "Accept-Encoding": "identity"}
        try:
            url, key = self._signed(href)
            answer = self._ask(url, headers, stall)
            if answer.status in (200, 206):
                return self._checked(answer, href, start, length, tally, head)
        except ForbiddenError as error:
            raise RequestError(str(error)) from error
        except urllib3.exceptions.HTTPError as error:
            problem = without_query(_reason(error))
            if (
                isinstance(error, urllib3.exceptions.LocationValueError)
                or "CERTIFICATE_VERIFY_FAILED" in problem
            ):
                raise RequestError(problem) from error
            raise _TroubleError(problem) from error
        _drain(answer)
        problem = f"HTTP {answer.status}"
        resigned = answer.status in _UNSIGNED and key is not None and may_resign
        if resigned:
            self._forget(key, url)
        elif answer.status == 416 and start == 0:
            raise MissingError("it is empty")
        elif answer.status not in _AGAIN:
            unsigned = answer.status in _NEEDS_KEYS and key is None
            hint = (
                "; list the host or bucket in credentials_for of its source"
                if unsigned and self._may_sign()
                else ""
            )
            kind = MissingError if answer.status in _MISSING else RequestError
            raise kind(f"{problem} {answer.reason or ''}".strip() + hint)
        raise _TroubleError(
            problem, wait_s=retry_after(answer.headers.get("Retry-After")), resigned=resigned
        )

    def _ask(self, url: str, headers: Mapping[str, str], stall: float) -> urllib3.BaseHTTPResponse:
        """Send a GET, follow redirects and return the answer with its body unread."""
        for _ in range(_REDIRECTS + 1):
            network.need_reachable(url)
            try:
                answer = self._pool.request(
                    "GET",
                    url,
                    headers=headers,
                    retries=False,
                    redirect=False,
                    timeout=urllib3.Timeout(connect=_CONNECT_S, read=stall),
                    preload_content=False,
                )
                location = answer.get_redirect_location()
                if not location:
                    return answer
                _drain(answer)
                log.debug("Redirecting %s -> %s", without_query(url), without_query(location))
                url = network.redirected(url, location, self._origin, self._named)
            except ForbiddenError as error:
                raise RequestError(str(error)) from error
            except urllib3.exceptions.HTTPError as error:
                why = network.why_unreachable(url, error)
                if why is None:
                    raise
                raise _TroubleError(why, unreachable=url) from error
        raise RequestError(f"more than {_REDIRECTS} redirects")

    def _checked(
        self,
        answer: urllib3.BaseHTTPResponse,
        href: str,
        start: int,
        length: int,
        tally: Tally,
        head: Head | None,
    ) -> Head:
        """Return the answer's bytes after checking them against the requested range."""
        place = re.fullmatch(
            r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})",
            answer.headers.get("Content-Range", ""),
        )
        length_sent = length_of(answer.headers.get("Content-Length"))
        size = int(place[3]) if place else (-1 if length_sent is None else length_sent)
        if answer.status == 200 and (start or not 0 <= size <= length):
            # Accept a whole file only if it is shorter than the range.
            answer.close()
            raise RequestError(
                "the server does not answer byte ranges, which reading windows of images needs"
            )
        if answer.status == 206 and (not place or int(place[1]) != start):
            answer.close()
            raise _TroubleError(
                f"Content-Range {answer.headers.get('Content-Range')!r} for bytes from {start} on"
            )
        expected = min(length, size - start)
        data = _body(answer, expected)
        tally.bytes += len(data)
        if len(data) != expected:
            raise _TroubleError(f"{len(data)} bytes of {expected}")
        version = answer.headers.get("ETag", "")
        if head and (size != head.size or (version and head.version and version != head.version)):
            with self._lock:
                self._heads.pop(href, None)
            raise RequestError("the file changed while it was read")
        return Head(data, size, version)

    def _signed(self, href: str) -> tuple[str, str | None]:
        """Return the URL to request and the key of its signature, None if unsigned."""
        if href.startswith("s3://"):
            return self._at_s3(href)
        host = network.host_of(href)
        parts = urlsplit(href)
        # Never send a token over plain HTTP, unless the token service itself uses it.
        same_scheme = parts.scheme == urlsplit(self.access.href or "").scheme
        if self.access.kind == "planetary-computer" and host in self.access.hosts() and same_scheme:
            container = f"{host.split('.')[0]}/{parts.path[1:].partition('/')[0]}"
            token = self._token(container)
            return f"{href}{'&' if parts.query else '?'}{token}", container
        return href, None

    def _may_sign(self) -> bool:
        return self.access.kind != "plain" and not self.access.anonymous

    def _token(self, container: str) -> str:
        """Return the container's token, requesting a new one near the end of its life."""
        with self._signing:
            token, until = self._tokens.get(container, ("", 0.0))
            if time.time() >= until:
                answer = self._ask(f"{self.access.href}/{container}", {}, 30.0)
                body = _body(answer, _TOKEN_BYTES)
                if answer.status in _AGAIN:
                    raise _TroubleError(f"HTTP {answer.status} of {self.access.href}")
                try:
                    content = json.loads(body)
                    token = content["token"]
                    left = (
                        datetime.fromisoformat(content["msft:expiry"]) - datetime.now(tz=UTC)
                    ).total_seconds()
                except (ValueError, KeyError, TypeError) as error:
                    said = (
                        f"HTTP {answer.status}"
                        if answer.status != 200
                        else f"an answer without token ({error})"
                    )
                    raise RequestError(
                        f"{self.access.href} gives no token for {container}: {said}"
                    ) from error
                until = time.time() + left - min(60.0, left / 10)
                self._tokens[container] = token, until
            return token

    def _at_s3(self, href: str) -> tuple[str, str | None]:
        """Return the URL of an object, signed if the source names its bucket."""
        bucket, _, path = href.removeprefix("s3://").partition("/")
        if self.access.anonymous or bucket not in self.access.credentials_for:
            url, key = f"{self._endpoint()}/{bucket}/{quote(path)}", None
        else:
            url, key = self._presigned(href, bucket, path), bucket
        if self.access.kind == "s3":  # endpoint chosen by the user, in source or environment
            self._named.add(network.host_of(url))
        return url, key

    def _endpoint(self) -> str:
        """Return the endpoint of unsigned requests.

        This is the user's own for sources of kind s3, AWS's for all others.
        """
        own = (
            (self.access.href or os.environ.get("AWS_ENDPOINT_URL"))
            if self.access.kind == "s3"
            else None
        )
        return own or f"https://s3.{self.access.region or 'us-east-1'}.amazonaws.com"

    def _presigned(self, href: str, bucket: str, path: str) -> str:
        network.need_reachable(href)
        try:
            return str(obstore.sign(_bucket(self.access, bucket), "GET", path, _SIGNED_FOR))
        except (obstore.exceptions.BaseError, ValueError) as error:
            why = (
                f"requests to s3://{bucket} cannot be signed: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY "
                "to keys of its provider"
            )
            network.note_unreachable(href, why)
            raise RequestError(why) from error

    def _forget(self, key: str | None, url: str) -> None:
        """Discard a refused signature, unless another thread has already renewed it."""
        with self._signing:
            if key in self._tokens and url.endswith(self._tokens[key][0]):
                del self._tokens[key]


class Session(requests.Session):
    """A session of requests with redirects under the rules of `network`."""

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        """Return the target of a redirect; raise ForbiddenError if it must not be followed."""
        target = super().get_redirect_target(resp)
        if target is None:
            return None
        resp.close()  # the body is unwanted and may be endless
        return network.redirected(resp.url, target, network.origin_of(resp.url), resolve=True)


_REMOTES: dict[tuple[Access, str], Remote] = {}
_MAKING = threading.Lock()  # two at once would double the connections


def remote_for(access: Access, origin: str = "") -> Remote:
    """Return the process's `Remote` for one access and one origin of hrefs
    (`network.origin_of`)."""
    with _MAKING:
        if (access, origin) not in _REMOTES:
            _REMOTES[access, origin] = Remote(access, origin)
        return _REMOTES[access, origin]


def access_to(url: str) -> Access:
    """Return the access for a URL given by the user; raise ForbiddenError if it must not be read.

    An s3:// URL is signed with the environment's keys.
    """
    network.check_href(url, network.origin_of(url))
    return (
        Access(kind="s3", credentials_for=(urlsplit(url).netloc,))
        if url.startswith("s3://")
        else Access()
    )


@functools.cache
def _bucket(access: Access, name: str) -> Any:
    """Return obstore's store of a bucket, used only for signatures.

    It takes keys from the environment.
    """
    options: dict[str, Any] = {"retry_config": _SIGNING}
    if access.region:
        options["region"] = access.region
    if access.href:
        options |= {"endpoint": access.href, "virtual_hosted_style_request": False}
        if access.href.startswith("http://"):
            options["client_options"] = {"allow_http": True}
    return obstore.store.S3Store(name, **options)


def check_credentials(access: Access, source_id: str) -> None:
    """Raise CatalogError if signed requests lack keys in the environment, or name no bucket."""
    if access.kind != "s3" or access.anonymous:
        return
    lacking = [
        name for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY") if not os.environ.get(name)
    ]
    if lacking and access.href:  # AWS also has machine roles and profiles
        raise CatalogError(
            f"source {source_id!r} reads from {access.href}, which needs keys: {' and '.join(lacking)} not set in the "
            "environment; get them from the provider's site and export them"
        )
    if not access.credentials_for:
        raise CatalogError(
            f"source {source_id!r} signs requests, but names no bucket: list its buckets in credentials_for (sources.yaml), "
            "or set anonymous: true"
        )


class _TroubleError(Exception):
    """A failed try with a temporary error."""

    def __init__(
        self, problem: str, *, wait_s: float = 0.0, resigned: bool = False, unreachable: str = ""
    ) -> None:
        super().__init__(problem)
        self.wait_s = wait_s
        """Seconds to wait at the server's request."""
        self.resigned = resigned
        """True if the next try has a new signature."""
        self.unreachable = unreachable
        """URL of an unreachable host."""


def _give_up_in_the_end(trouble: _TroubleError, lasted_s: float, tries: int) -> None:
    """Raise RequestError if a trouble has lasted too long."""
    if trouble.unreachable:
        if lasted_s + _LONGEST_REFUSED_PAUSE_S > network.REFUSED_S:
            network.note_unreachable(trouble.unreachable, str(trouble))
            raise RequestError(str(trouble)) from trouble
    elif lasted_s + trouble.wait_s > PATIENCE_S:
        raise RequestError(f"{trouble}, after {tries} tries in {lasted_s:.0f} s") from trouble


def _body(answer: urllib3.BaseHTTPResponse, most: int) -> bytes:
    """Read the raw body of an answer, limited to `most` bytes and `PATIENCE_S` seconds."""
    parts: list[bytes] = []
    left = most
    until = time.monotonic() + PATIENCE_S
    try:
        while left > 0 and (part := answer.read1(left, decode_content=False)):
            parts.append(part)
            left -= len(part)
            if time.monotonic() > until:
                raise _TroubleError(f"{most - left} bytes of {most} in {PATIENCE_S:.0f} s")
    finally:
        answer.close()  # after a full read, the connection is already back in its pool
    return b"".join(parts)


def _drain(answer: urllib3.BaseHTTPResponse) -> None:
    """Free the connection of an unwanted answer.

    It is closed if the body is long or has no known length.
    """
    length = length_of(answer.headers.get("Content-Length"))
    if length is not None and length <= _BLOCK:
        answer.drain_conn()
    else:
        answer.close()


def length_of(value: str | None) -> int | None:
    """Return the byte count of a Content-Length header, or None if it has no valid number."""
    return int(value) if value and re.fullmatch(r"[0-9]{1,18}", value) else None


def retry_after(value: str | None) -> float:
    """Return the server's requested wait in seconds, or 0 (RFC 9110, 10.2.3: a number or a
    date)."""
    if not value:
        return 0.0
    if (seconds := length_of(value.strip())) is not None:
        return float(seconds)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def _reason(error: BaseException) -> str:
    inner = getattr(error, "reason", None)
    return (
        _reason(inner) if isinstance(inner, BaseException) else f"{type(error).__name__}: {error}"
    )


class Ranges(Protocol):
    """Source of a file's bytes."""

    def fetch(self, href: str, head: Head, start: int, length: int, tally: Tally) -> bytes:
        """Fetch these bytes, or all up to the file's end; raise OSError on failure."""


class RemoteFile:
    """A seekable remote file for GDAL, read by one thread; ranges of tiles are fetched exactly.

    GDAL calls it from C++, and a Python exception there would end the process. So errors are stored
    in the tally instead, and GDAL gets zeros. The caller of GDAL must not use them as pixels.
    """

    def __init__(
        self, source: Ranges, href: str, head: Head, tally: Tally, least: int = _BLOCK
    ) -> None:
        self._source, self._href, self._head, self._tally, self._least = (
            source,
            href,
            head,
            tally,
            least,
        )
        self._at, self._start, self._buffer = 0, 0, b""

    def __enter__(self) -> RemoteFile:
        return self

    def __exit__(self, *_: object) -> None:
        """Do nothing: no resource is open."""

    def close(self) -> None:
        """Do nothing: no resource is open."""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a position, as files do."""
        self._at = (
            offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._head.size}[whence]
        )
        return self._at

    def tell(self) -> int:
        """Return the position."""
        return self._at

    def read(self, length: int = -1) -> bytes:
        """Read bytes from the position; fewer only at the file's end."""
        stop = self._head.size if length < 0 else min(self._at + length, self._head.size)
        if stop <= self._at:
            return b""
        if stop <= len(self._head.data):
            data = self._head.data[self._at : stop]
        else:
            if not self._start <= self._at <= stop <= self._start + len(self._buffer):
                self._start, self._buffer = (
                    self._at,
                    self._fetched(self._at, max(stop - self._at, self._least)),
                )
            data = self._buffer[self._at - self._start : stop - self._start]
        self._at += len(data)
        return data

    def get_byte_ranges(self, offsets: Sequence[int], sizes: Sequence[int]) -> list[bytes]:
        """Return the bytes of each range, padded with zeros to the requested length."""
        found = [self._fetched(start, length) for start, length in zip(offsets, sizes, strict=True)]
        if (
            any(len(data) < length for data, length in zip(found, sizes, strict=True))
            and not self._tally.error
        ):
            self._tally.error = MissingError(
                f"it ends after {self._head.size} bytes, before the tiles that its header names"
            )
        return [data.ljust(length, b"\0") for data, length in zip(found, sizes, strict=True)]

    def _fetched(self, start: int, length: int) -> bytes:
        if not self._tally.error:
            try:
                return self._source.fetch(self._href, self._head, start, length, self._tally)
            except Exception as error:  # stored, and raised by the reader: see the class
                self._tally.error = error
        return bytes(min(length, max(self._head.size - start, 0)))


@MultiByteRangeResourceContainer.register
class Opened:
    """One remote file for `rasterio.open(..., opener=)`."""

    def __init__(
        self, source: Ranges, href: str, head: Head, tally: Tally, least: int = _BLOCK
    ) -> None:
        self._made_of = source, href, head, tally, least

    def open(self, path: str, mode: str = "rb", **_: Any) -> RemoteFile:
        """Open the file under any name. Names visible to GDAL and its logs contain no URL."""
        del path, mode
        return RemoteFile(*self._made_of)

    def isfile(self, path: str) -> bool:
        """Return True."""
        del path
        return True

    def isdir(self, path: str) -> bool:
        """Return False."""
        del path
        return False

    def ls(self, path: str) -> list[str]:
        """Return an empty list, so GDAL does not request sidecar files."""
        del path
        return []

    def mtime(self, path: str) -> int:
        """Return 0: unknown."""
        del path
        return 0

    def size(self, path: str) -> int:
        """Return the file's size in bytes."""
        del path
        return self._made_of[2].size
