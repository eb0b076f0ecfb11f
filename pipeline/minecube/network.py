"""Rules for all remote reads: allowed names and hosts, and memory of hosts without an answer.

Others write the catalogues. An href in a catalogue is checked before it is opened.

    names      A path or an http(s), s3 or file URL. GDAL's special names are refused in any
               spelling.
    local      Local paths are for local catalogues. A remote catalogue names remote files.
    hosts      A remote catalogue reaches public addresses and the hosts named by its source. It
               reaches private addresses only if all addresses of its own host are private.
               Multicast addresses and cloud metadata services (link-local addresses, for example)
               need a source naming the host.
    redirects  They lead from http to http or https, and from https to https. The rule for hosts
               also applies.

A host without connection, address or route is retried for `REFUSED_S`. It is remembered for
`_REMEMBERED_S`, so a run does not wait for it again. `forget_unreachable` clears the memory.
"""

from __future__ import annotations

import functools
import ipaddress
import logging
import re
import socket
import threading
import time
from collections.abc import Collection
from urllib.parse import unquote, urljoin, urlsplit

REFUSED_S = 3.0
"""Seconds of retries for a connection failing before any data is sent: enough for a server
restart."""
PATIENCE_S = 180.0
"""Seconds of retries for other errors of one request."""
_REMEMBERED_S = 60.0
_WEB = ("http", "https")
_SCHEMES = (*_WEB, "s3", "file")
_AUTHORITY = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/?#]*")
"""The part of a URL that determines its host (RFC 3986, 3.2)."""
_PREFIX = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
# Prefixes of the drivers for images, such as GTIFF_DIR:1:/data/a.tif.
_PART_WITH_PREFIX = re.compile(r"(^|/)(gtiff_dir|gtiff_raw|j2k_subfile):", re.I)
# GDAL's virtual file systems (VSIGetFileSystemsPrefixes of GDAL 3.10, and those of other builds).
_VIRTUAL = re.compile(
    r"(^|/)vsi(7z|adls|az|cached|crypt|curl|gs|gzip|hdfs|kerchunk\w*|mem|oss|pythonfilelike|rar|"
    r"riopener\w*|s3|sparse|stdin|stdout|subfile|swift|tar|webhdfs|zip)"
    r"(_streaming|_redirect)?([/?]|$)",
    re.I,
)
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
# IPv6 ranges with an IPv4 address in the last 32 bits: mapped, compatible and NAT64 (RFC 6052).
_LAST_32_BITS = [ipaddress.IPv6Network(net) for net in ("::ffff:0:0/96", "::/96", "64:ff9b::/96")]
_LOCAL_NAT64 = ipaddress.IPv6Network("64:ff9b:1::/48")  # RFC 8215
# Cloud metadata services outside link-local addresses: Azure, Alibaba, Oracle, AWS and Google.
_METADATA = {
    ipaddress.ip_address(address)
    for address in (
        "168.63.129.16",
        "100.100.100.200",
        "192.0.0.192",
        "fd00:ec2::254",
        "fd20:ce::254",
    )
}
_DECODED = 5  # maximum levels of percent-encoding of a name


class RequestError(OSError):
    """A request that failed for good. The message shows no signature."""


class MissingError(RequestError):
    """A file unavailable to any later request.

    Causes are HTTP 403, 404 or 410, a missing local file, or a file ending before its pixels.
    """


class ForbiddenError(Exception):
    """A forbidden name or host. It is no OSError: urllib3 would take it for a broken connection."""


def origin_of(href: str) -> str:
    """Return a catalogue's host, empty if local; raise ForbiddenError for an invalid URL."""
    if is_local(href):
        return ""
    return host_of(href) or "unknown"


def host_of(url: str) -> str:
    """Return the host of a URL, or an empty text; raise ForbiddenError for an invalid URL."""
    if "\\" in url:  # libraries disagree on the end of this host
        raise ForbiddenError("expected a URL without a backslash, found one")
    if authority := _AUTHORITY.match(url):
        url = authority[0]
    return _parse_host(url)


@functools.lru_cache(1024)  # all bands of a scene, and most scenes, share one host
def _parse_host(url: str) -> str:
    # Only for remote files: the command line loads this module first.
    from urllib3.util import parse_url

    try:
        spelling = urlsplit(url).netloc.rpartition("@")[2]
        host = parse_url(url).host or ""
    except ValueError as error:
        raise ForbiddenError("expected a valid URL, found an invalid host or port") from error
    # Some libraries decode percent signs. In brackets, a percent sign marks a zone.
    if "%" in spelling and not spelling.startswith("["):
        raise ForbiddenError(f"expected a host without percent signs, found {spelling}")
    return host.strip("[]")


def is_local(href: str) -> bool:
    """Whether the href names a file on this machine."""
    return "://" not in href or href.lower().startswith("file://")


def local_path(href: str) -> str:
    """Return the path of a local href."""
    if href.lower().startswith("file://"):
        return unquote(urlsplit(href).path)
    return href


def check_href(href: str, origin: str, allowed_hosts: Collection[str] = ()) -> None:
    """Check an href of a catalogue.

    Args:
        href: absolute, or a local path.
        origin: the catalogue's host; empty for a local one.
        allowed_hosts: hosts named by the source.

    Raises:
        ForbiddenError: the href must not be read. The message gives the reason.
    """
    name = _decode(href)
    path = name
    if not is_local(href):
        path = _decode(href.partition("?")[0])
    if _VIRTUAL.search(path.replace("\\", "/")) or "<" in name or any(ord(c) < 32 for c in name):
        raise ForbiddenError("it is a special name of GDAL, not a file")
    scheme = _PREFIX.match(name)
    if scheme and scheme[1].lower() not in _SCHEMES:
        raise ForbiddenError(f"expected a path or an http(s), s3 or file URL, found {scheme[1]}:")
    if is_local(href):
        if origin:
            raise ForbiddenError(f"it is a local file, but its catalogue is at {origin}")
        if scheme:
            path = name[len("file://") :]
        if _PART_WITH_PREFIX.search(path.replace("\\", "/")):
            raise ForbiddenError("it is a special name of GDAL, not a file")
    elif href.lower().startswith("s3://"):
        _check_object(name)
    else:
        check_url(href, origin, allowed_hosts)


def check_url(url: str, origin: str, allowed_hosts: Collection[str] = ()) -> None:
    """Raise ForbiddenError for a URL other than http(s), or with a forbidden address as host."""
    host = host_of(url)
    scheme = urlsplit(url).scheme
    if scheme not in _WEB or not host:
        raise ForbiddenError(f"expected an http(s) URL with a host, found {scheme or 'no scheme'}")
    if host == "localhost":
        check_address("localhost", "127.0.0.1", origin, allowed_hosts)
    elif _address(host):
        check_address(host, host, origin, allowed_hosts)


def check_address(
    host: str, address: str, origin: str, allowed_hosts: Collection[str] = ()
) -> None:
    """Raise ForbiddenError if a catalogue from `origin` must not reach a host at this address."""
    ip = _address(address)
    if ip is None or host in allowed_hosts:
        return
    special = ip.is_link_local or ip.is_multicast or ip in _METADATA
    if special or not (_is_public(ip) or _may_reach_private(origin)):
        raise ForbiddenError(
            f"{host} has the address {address}, which is not public; "
            "name the host in the source to allow it"
        )


def check_redirect(
    url: str,
    location: str,
    origin: str,
    allowed_hosts: Collection[str] = (),
    *,
    resolve: bool = False,
) -> str:
    """Return the target of a redirect; raise ForbiddenError if it must not be followed.

    With `resolve`, the addresses of its host are looked up and checked. Use it if no later
    connection checks them.
    """
    try:
        target = urljoin(url, location)
    except ValueError as error:
        raise ForbiddenError("it is redirected to an invalid URL") from error
    check_url(target, origin, allowed_hosts)
    if resolve:
        host = host_of(target)
        for address in _addresses(host):
            check_address(host, address, origin, allowed_hosts)
    if url.lower().startswith("https:") and not target.lower().startswith("https:"):
        raise ForbiddenError("it is redirected from https to http")
    return target


def _decode(href: str) -> str:
    for _ in range(_DECODED):
        decoded = unquote(href)
        if decoded == href:
            return href
        href = decoded
    raise ForbiddenError(f"it is percent-encoded more than {_DECODED} times")


def _check_object(name: str) -> None:
    bucket, _, key = name[len("s3://") :].partition("/")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", bucket) or {".", ".."} & set(key.split("/")):
        raise ForbiddenError("expected s3://BUCKET/KEY without a folder named . or .. in the key")


def _address(host: str) -> _Address | None:
    """Return the address written as a host; None for a name."""
    try:
        ip = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return _short_address(host)
    if isinstance(ip, ipaddress.IPv6Address):
        return _embedded_address(ip) or ip
    return ip


def _embedded_address(ip: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """Return the IPv4 address inside an IPv6 address, or else None."""
    if any(ip in network for network in _LAST_32_BITS):
        return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.sixtofour


def _short_address(host: str) -> ipaddress.IPv4Address | None:
    """Parse an address in a resolver's short forms: 127.1, 2130706433, 0x7f.1."""
    if not re.fullmatch(r"(0x[0-9a-f]+|\d+)(\.(0x[0-9a-f]+|\d+)){0,3}", host, re.I):
        return None
    try:
        return ipaddress.IPv4Address(socket.inet_aton(host))
    except OSError:
        return None


def _is_public(ip: _Address) -> bool:
    return ip.is_global and ip not in _LOCAL_NAT64


@functools.lru_cache(256)
def _may_reach_private(origin: str) -> bool:
    """Whether a catalogue is local or only at private addresses; False without an address."""
    if not origin:
        return True
    addresses = [origin]
    if not _address(origin):
        addresses = _addresses(origin)
    ips = [_address(address) for address in addresses]
    return bool(ips) and all(ip is not None and not _is_public(ip) for ip in ips)


def _addresses(host: str) -> list[str]:
    """Return the addresses of a host; an empty list for an unknown host."""
    try:
        return [str(info[4][0]) for info in socket.getaddrinfo(host, None)]
    except OSError:
        return []


_unreachable: dict[str, tuple[float, str]] = {}
_lock = threading.Lock()


def forget_unreachable() -> None:
    """Try every host again. Called at the beginning of a run."""
    with _lock:
        _unreachable.clear()
    _may_reach_private.cache_clear()


def note_unreachable(url: str, reason: str) -> None:
    """Remember the host of a URL as unreachable."""
    with _lock:
        _unreachable[urlsplit(url).netloc] = (time.monotonic() + _REMEMBERED_S, reason)


def need_reachable(url: str) -> None:
    """Raise RequestError if the host of a URL did not answer a moment ago."""
    until, reason = _unreachable.get(urlsplit(url).netloc, (0.0, ""))
    if time.monotonic() < until:
        raise RequestError(reason)


def explain_unreachable(url: str, error: BaseException) -> str | None:
    """Describe an unreachable host in one sentence; None for any other error."""
    import urllib3  # only after an error: the command line loads this module first

    cause: BaseException | None = error
    while cause is not None and not isinstance(
        cause, urllib3.exceptions.NewConnectionError | urllib3.exceptions.ConnectTimeoutError
    ):
        cause = _inner(cause)
    if cause is None:
        return None
    host = urlsplit(url).netloc.rpartition("@")[2]
    if isinstance(cause, urllib3.exceptions.NameResolutionError):
        return (
            f"the host name {host} is not found: "
            "check its spelling, and this machine's network and DNS"
        )
    if isinstance(cause, urllib3.exceptions.NewConnectionError):
        return (
            f"{host} cannot be reached ({_system_error(cause)}): "
            "check the address, and that the server is running"
        )
    return f"{host} does not answer: check the address, and this machine's network and firewall"


def _inner(error: BaseException) -> BaseException | None:
    """Return the wrapped error: requests and urllib3 keep it in three places."""
    for inner in (getattr(error, "reason", None), *error.args, error.__cause__, error.__context__):
        if isinstance(inner, BaseException):
            return inner
    return None


def _system_error(error: BaseException) -> str:
    cause = error.__cause__ or error.__context__
    return (isinstance(cause, OSError) and cause.strerror) or "no connection"


def remove_query(text: str) -> str:
    """Remove the queries of URLs from a text: they may hold signatures, never meant for a log."""
    return re.sub(r"\?[^\s'\")]*", "", text)


def remove_secrets(text: str) -> str:
    """Remove the queries of URLs from a text, and user names and passwords in URLs."""
    return re.sub(r"(\w://)[^\s/@]*@", r"\1", remove_query(text))


def _hide_query(argument: object) -> object:
    if isinstance(argument, str):
        return remove_query(argument)
    return argument


def _quiet(record: logging.LogRecord) -> bool:
    """Hide the queries of URLs in urllib3's log, and drop its warnings.

    Each warning either passes or ends in an error with its own report.
    """
    if isinstance(record.args, tuple):
        record.args = tuple(map(_hide_query, record.args))
    return record.levelno < logging.WARNING


for _name in ("connectionpool", "poolmanager", "util.retry", "connection"):
    logging.getLogger(f"urllib3.{_name}").addFilter(_quiet)
