"""Remote files by byte-range requests: signed on use, retried by kind of error, never partial.

GDAL's own network layer caches and replays failures and short answers. It does not report its
retries, and supports the tokens of few providers. Here GDAL requests byte ranges through a Python
file object instead (`gdal_file`). This object holds neither credentials nor a signed URL. Every
request is one call of `Remote.fetch`: answered in full, tried again, or lost.

Broken connections, short or stalled answers, and HTTP 408, 425, 429 and 5xx are tried again (RFC
9110, sections 15.5 and 15.6). The pause before a retry is random with a doubling limit, or as long
as the server asks (Retry-After). 401 and 403 are tried again with a new signature if requests are
signed. So is 400, S3's answer to an expired session. An unreachable host is tried for seconds only
and then remembered (`network`). A late answer is requested again (`connections.Pace`). All other
errors are final, since a retry would give the same result.

Tokens and signatures go only to the hosts and buckets named by the source
(`Access.credentials_for`). All others get unsigned requests. Redirects are also followed without
tokens. Every connection follows the rules of `network`.

The first bytes of each file stay in memory. A window of a file thus takes one request instead of
two, from the second read on: checks of offsets and positions come before the composite, and a
large site has several blocks.
"""

from __future__ import annotations

import logging
import random
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

import urllib3

from minecube import network
from minecube.catalog import Access
from minecube.network import ForbiddenError, MissingError, RequestError, remove_query
from minecube.reader.connections import (
    CheckedPools,
    Session,
    TroubleError,
    describe,
    drain,
    length_of,
    read_body,
)
from minecube.reader.signing import PASSING, Signer
from minecube.reader.transfer import Head, Tally

__all__ = [
    "HEAD_BYTES",
    "PATIENCE_S",
    "Head",
    "Remote",
    "Session",
    "Tally",
    "access_to",
    "interruption",
    "length_of",
    "limit_connections",
    "parse_retry_after",
    "remote_for",
]

log = logging.getLogger(__name__)

HEAD_BYTES = 16384
"""Bytes of a file fetched by its first request. The header of a COG of a whole Sentinel-2 tile
fits."""
PATIENCE_S = network.PATIENCE_S
_HEADS = 2048  # heads in the cache, 32 MB: all blocks of a site open the same files
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 15.0
_LONGEST_REFUSED_PAUSE_S = 1.0  # a last try must end in time
# Silence on a connection ends a try. The limit is short at first, since most answers begin within a
# second, and doubles with each try.
_CONNECT_S = 10.0
_STALL_S = 2.5
_LONGEST_STALL_S = 40.0
_SIGNATURES = 4  # new signatures per request
_REDIRECTS = 5
_UNSIGNED = {400, 401, 403}
_MISSING = {403, 404, 410}  # 403: S3's answer for a missing object of an unlisted bucket, too
_NEEDS_KEYS = {401, 403, 409}  # 409: Azure's answer without public access

interruption = threading.Event()
"""Set when the process is about to end: requests in trouble are then given up instead of
retried."""


@dataclass(frozen=True)
class _Range:
    """Bytes to fetch."""

    href: str
    start: int
    length: int
    tally: Tally
    """Counts the requests."""
    head: Head | None = None
    """The file's head, for ranges after it."""


class Remote:
    """Requests for one access and hrefs from one origin.

    A process has one per access and origin (`remote_for`), for any thread.
    """

    def __init__(self, access: Access, origin: str = "") -> None:
        self.access = access
        self.signer = Signer(access, self._ask)
        self._origin = origin
        self._allowed_hosts = set(access.hosts())
        self._pools = CheckedPools(
            self.check_address, maxsize=access.connections, block=True, num_pools=16
        )
        self._heads: dict[str, Head] = {}
        self._lock = threading.Lock()

    def check_address(self, host: str, address: str) -> None:
        """Raise ForbiddenError if a host has a forbidden address."""
        network.check_address(host, address, self._origin, self._allowed_hosts)

    def head(self, href: str, tally: Tally) -> Head:
        """Fetch the file's first bytes, its size and version; raise RequestError on failure."""
        head = self._heads.get(href)
        if head is None:
            head = self._fetch(_Range(href, 0, HEAD_BYTES, tally))
            with self._lock:
                if len(self._heads) >= _HEADS:
                    del self._heads[next(iter(self._heads))]
                self._heads[href] = head
        return head

    def fetch(self, href: str, head: Head, start: int, length: int, tally: Tally) -> bytes:
        """Fetch exactly these bytes, or all up to the file's end; raise RequestError on failure."""
        stop = min(start + length, head.size)
        if stop <= len(head.data):
            return head.data[start:stop]
        return self._fetch(_Range(href, start, stop - start, tally, head)).data

    def version(self, href: str) -> tuple[int, str | None]:
        """Fetch the current size and ETag of a file; raise RequestError on failure.

        Without an ETag from the server, the second value stays None.
        """
        head = self._fetch(_Range(href, 0, 1, Tally()))
        return head.size, head.version or None

    def whole(self, href: str, limit: int) -> bytes:
        """Fetch all bytes of a file of limited size; raise RequestError on failure."""
        head = self._fetch(_Range(href, 0, limit, Tally()))
        if head.size > limit:
            raise RequestError(f"expected at most {limit:,} bytes, found {head.size:,}")
        return head.data

    def sign(self, href: str) -> tuple[str, str | None]:
        """Return the URL to request and the key of its signature, None if unsigned."""
        url, key = self.signer.sign(href)
        # The user has chosen the endpoint of a source of kind s3, here or in the environment.
        if self.access.kind == "s3" and href.startswith("s3://"):
            self._allowed_hosts.add(network.host_of(url))
        return url, key

    def _fetch(self, part: _Range) -> Head:
        """Fetch bytes, with as many tries as necessary."""
        began: float | None = None  # the trouble; the request may have queued long before
        pause = _FIRST_PAUSE_S
        stall = _STALL_S
        signatures = 0
        tries = 0
        while True:
            part.tally.requests += 1
            try:
                return self._try(part, stall, may_resign=signatures < _SIGNATURES)
            except TroubleError as error:
                trouble = error
            began = began or time.monotonic()
            signatures += trouble.resigned
            tries += 1
            _give_up_in_the_end(trouble, time.monotonic() - began, tries)
            part.tally.retried += 1
            log.debug("%s: %s; try %d", remove_query(part.href), trouble, tries + 1)
            # Draw the pause at random, so failed requests do not return all at once.
            longest = _LONGEST_REFUSED_PAUSE_S if trouble.unreachable else pause
            random_wait = random.uniform(0, min(pause, longest))  # noqa: S311  no secret
            if interruption.wait(max(trouble.wait_s, random_wait)):
                raise RequestError(f"{trouble}; interrupted")
            pause = min(2 * pause, _LONGEST_PAUSE_S)
            stall = min(2 * stall, _LONGEST_STALL_S)

    def _try(self, part: _Range, stall: float, *, may_resign: bool) -> Head:
        """Send a request once.

        Raises TroubleError for temporary errors, RequestError for final ones.
        """
        last = part.start + part.length - 1
        headers = {"Range": f"bytes={part.start}-{last}", "Accept-Encoding": "identity"}
        try:
            url, key = self.sign(part.href)
            answer = self._ask(url, headers, stall)
            if answer.status in (200, 206):
                return self._check_answer(answer, part)
        except ForbiddenError as error:
            raise RequestError(str(error)) from error
        except urllib3.exceptions.HTTPError as error:
            problem = remove_query(describe(error))
            is_final = isinstance(error, urllib3.exceptions.LocationValueError)
            if is_final or "CERTIFICATE_VERIFY_FAILED" in problem:
                raise RequestError(problem) from error
            raise TroubleError(problem) from error
        drain(answer)
        if answer.status in _UNSIGNED and key is not None and may_resign:
            self.signer.forget(key, url)
            resigned = True
        else:
            self._raise_if_final(answer, part, is_signed=key is not None)
            resigned = False
        wait_s = parse_retry_after(answer.headers.get("Retry-After"))
        raise TroubleError(f"HTTP {answer.status}", wait_s=wait_s, resigned=resigned)

    def _raise_if_final(
        self, answer: urllib3.BaseHTTPResponse, part: _Range, *, is_signed: bool
    ) -> None:
        """Raise RequestError if an error of the server is not temporary."""
        if answer.status == 416 and part.start == 0:
            raise MissingError("it is empty")
        if answer.status in PASSING:
            return
        problem = f"HTTP {answer.status} {answer.reason or ''}".strip()
        if answer.status in _NEEDS_KEYS and not is_signed and self.signer.may_sign():
            problem += "; list the host or bucket in credentials_for of its source"
        if answer.status in _MISSING:
            raise MissingError(problem)
        raise RequestError(problem)

    def _ask(self, url: str, headers: Mapping[str, str], stall: float) -> urllib3.BaseHTTPResponse:
        """Send a GET, follow redirects and return the answer with its body unread."""
        for _ in range(_REDIRECTS + 1):
            network.need_reachable(url)
            try:
                answer = self._pools.request(
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
                drain(answer)
                log.debug("Redirecting %s -> %s", remove_query(url), remove_query(location))
                url = network.check_redirect(url, location, self._origin, self._allowed_hosts)
            except ForbiddenError as error:
                raise RequestError(str(error)) from error
            except urllib3.exceptions.HTTPError as error:
                problem = network.explain_unreachable(url, error)
                if problem is None:
                    raise
                raise TroubleError(problem, unreachable=url) from error
        raise RequestError(f"more than {_REDIRECTS} redirects")

    def _check_answer(self, answer: urllib3.BaseHTTPResponse, part: _Range) -> Head:
        """Return the answer's bytes after checking them against the requested range."""
        size = _check_size(answer, part)
        expected = min(part.length, size - part.start)
        data = read_body(answer, expected, PATIENCE_S)
        part.tally.bytes += len(data)
        if len(data) != expected:
            raise TroubleError(f"{len(data)} bytes of {expected}")
        head = Head(data, size, answer.headers.get("ETag", ""))
        if part.head and _has_changed(part.head, head):
            with self._lock:
                self._heads.pop(part.href, None)
            raise RequestError("the file changed while it was read")
        return head


def _check_size(answer: urllib3.BaseHTTPResponse, part: _Range) -> int:
    """Return the file's size, and check that the answer begins at the requested range."""
    content_range = answer.headers.get("Content-Range", "")
    number = "([0-9]{1,18})"
    match = re.fullmatch(rf"bytes {number}-{number}/{number}", content_range)
    if match:
        size = int(match[3])
    else:
        length_sent = length_of(answer.headers.get("Content-Length"))
        size = -1 if length_sent is None else length_sent
    if answer.status == 200 and (part.start or not 0 <= size <= part.length):
        # Accept a whole file only if it is shorter than the range.
        answer.close()
        raise RequestError(
            "the server does not answer byte ranges, which reading windows of images needs"
        )
    if answer.status == 206 and (not match or int(match[1]) != part.start):
        answer.close()
        raise TroubleError(
            f"Content-Range {answer.headers.get('Content-Range')!r} for bytes from {part.start} on"
        )
    return size


def _has_changed(old: Head, new: Head) -> bool:
    if new.size != old.size:
        return True
    return bool(new.version and old.version and new.version != old.version)


def _give_up_in_the_end(trouble: TroubleError, lasted_s: float, tries: int) -> None:
    """Raise RequestError if a trouble has lasted too long."""
    if trouble.unreachable:
        if lasted_s + _LONGEST_REFUSED_PAUSE_S > network.REFUSED_S:
            network.note_unreachable(trouble.unreachable, str(trouble))
            raise RequestError(str(trouble)) from trouble
    elif lasted_s + trouble.wait_s > PATIENCE_S:
        raise RequestError(f"{trouble}, after {tries} tries in {lasted_s:.0f} s") from trouble


_REMOTES: dict[tuple[Access, str], Remote] = {}
_REMOTES_LOCK = threading.Lock()  # two of one access would double its connections
_most_connections: int | None = None


def limit_connections(most: int | None) -> None:
    """Limit the requests for pixels of this process at a time; None: `Access.connections` alone.

    Workers of one run divide a common limit. It applies to files opened from now on.
    """
    global _most_connections
    _most_connections = most


def remote_for(access: Access, origin: str = "") -> Remote:
    """Return the process's `Remote` for one access and one origin of hrefs
    (`network.origin_of`)."""
    if _most_connections is not None and _most_connections < access.connections:
        access = replace(access, connections=_most_connections)
    with _REMOTES_LOCK:
        if (access, origin) not in _REMOTES:
            _REMOTES[access, origin] = Remote(access, origin)
        return _REMOTES[access, origin]


def access_to(url: str) -> Access:
    """Return the access for a URL given by the user; raise ForbiddenError if it must not be read.

    An s3:// URL is signed with the environment's keys.
    """
    network.check_href(url, network.origin_of(url))
    if url.startswith("s3://"):
        return Access(kind="s3", credentials_for=(urlsplit(url).netloc,))
    return Access()


def parse_retry_after(value: str | None) -> float:
    """Return the server's requested wait in seconds, or 0 (RFC 9110, 10.2.3: a number or a
    date)."""
    if not value:
        return 0.0
    seconds = length_of(value.strip())
    if seconds is not None:
        return float(seconds)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0
