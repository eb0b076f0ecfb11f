"""Signatures of requests: tokens of the Planetary Computer, and S3 with keys of the environment.

S3 requests are signed by obstore. Tokens are requested here, and not by obstore's
`PlanetaryComputerCredentialProvider`, for four reasons. That class serves one container of
blob.core.windows.net, whereas a source may list other hosts. It cannot drop a refused token before
its expiry, as is necessary with a wrong clock. Its requests do not follow the rules of `network`.
And it signs reads of obstore's own store only, which would not count requests and retries.
"""

from __future__ import annotations

import functools
import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote, urlsplit

import obstore
import obstore.exceptions
import obstore.store
import urllib3

from minecube import network
from minecube.catalog import Access
from minecube.errors import CatalogError
from minecube.network import RequestError
from minecube.reader.connections import TroubleError, read_body

PASSING = {408, 425, 429, 500, 502, 503, 504}
"""Status codes of temporary errors."""
_SIGNED_FOR = timedelta(minutes=30)
_TOKEN_BYTES = 65536  # longest answer of a token service
_TOKEN_STALL_S = 30.0
# For AWS's keys of the machine.
_RETRY_CONFIG = {"max_retries": 1, "retry_timeout": timedelta(seconds=5)}

Ask = Callable[[str, Mapping[str, str], float], urllib3.BaseHTTPResponse]
"""Sends a GET to a URL with headers and a limit of silence in seconds."""


class Signer:
    """Signatures for one access, for any thread. `ask` sends the requests for tokens."""

    def __init__(self, access: Access, ask: Ask) -> None:
        self.access = access
        self._ask = ask
        self._lock = threading.Lock()
        self._tokens: dict[str, tuple[str, float]] = {}

    def may_sign(self) -> bool:
        """Return whether the access signs any requests."""
        return self.access.kind != "plain" and not self.access.anonymous

    def sign(self, href: str) -> tuple[str, str | None]:
        """Return the URL to request and the key of its signature, None if unsigned.

        Raises:
            RequestError: No signature is available.
            TroubleError: The token service has a temporary error.
        """
        if href.startswith("s3://"):
            return self._sign_s3(href)
        host = network.host_of(href)
        parts = urlsplit(href)
        # Never send a token over plain HTTP, unless the token service itself uses it.
        same_scheme = parts.scheme == urlsplit(self.access.href or "").scheme
        if self.access.kind == "planetary-computer" and host in self.access.hosts() and same_scheme:
            container = f"{host.split('.')[0]}/{parts.path[1:].partition('/')[0]}"
            separator = "&" if parts.query else "?"
            return f"{href}{separator}{self._get_token(container)}", container
        return href, None

    def forget(self, key: str | None, url: str) -> None:
        """Discard a refused signature, unless another thread has already renewed it."""
        with self._lock:
            if key in self._tokens and url.endswith(self._tokens[key][0]):
                del self._tokens[key]

    def _get_token(self, container: str) -> str:
        """Return the container's token, requesting a new one near the end of its life."""
        with self._lock:
            token, expires = self._tokens.get(container, ("", 0.0))
            if time.time() >= expires:
                token, life_s = self._request_token(container)
                expires = time.time() + life_s - min(60.0, life_s / 10)
                self._tokens[container] = token, expires
            return token

    def _request_token(self, container: str) -> tuple[str, float]:
        """Request a token: the token and its life in seconds."""
        answer = self._ask(f"{self.access.href}/{container}", {}, _TOKEN_STALL_S)
        body = read_body(answer, _TOKEN_BYTES, network.PATIENCE_S)
        if answer.status in PASSING:
            raise TroubleError(f"HTTP {answer.status} of {self.access.href}")
        try:
            content = json.loads(body)
            life = datetime.fromisoformat(content["msft:expiry"]) - datetime.now(tz=UTC)
            return content["token"], life.total_seconds()
        except (ValueError, KeyError, TypeError) as error:
            problem = f"HTTP {answer.status}"
            if answer.status == 200:
                problem = f"an answer without token ({error})"
            raise RequestError(
                f"{self.access.href} gives no token for {container}: {problem}"
            ) from error

    def _sign_s3(self, href: str) -> tuple[str, str | None]:
        """Return the URL of an object, signed if the source names its bucket."""
        bucket, _, path = href.removeprefix("s3://").partition("/")
        if self.access.anonymous or bucket not in self.access.credentials_for:
            return f"{self._endpoint()}/{bucket}/{quote(path)}", None
        network.need_reachable(href)
        try:
            url = obstore.sign(bucket_of(self.access, bucket), "GET", path, _SIGNED_FOR)
        except (obstore.exceptions.BaseError, ValueError) as error:
            problem = (
                f"requests to s3://{bucket} cannot be signed: set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY to keys of its provider"
            )
            network.note_unreachable(href, problem)
            raise RequestError(problem) from error
        return str(url), bucket

    def _endpoint(self) -> str:
        """Return the endpoint of unsigned requests.

        This is the user's own for sources of kind s3, AWS's for all others.
        """
        endpoint = None
        if self.access.kind == "s3":
            endpoint = self.access.href or os.environ.get("AWS_ENDPOINT_URL")
        return endpoint or f"https://s3.{self.access.region or 'us-east-1'}.amazonaws.com"


@functools.cache  # it has the keys of AWS's machine roles, which are requested once
def bucket_of(access: Access, name: str) -> Any:
    """Return obstore's store of a bucket, used only for signatures.

    It takes keys from the environment.
    """
    options: dict[str, Any] = {"retry_config": _RETRY_CONFIG}
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
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    missing = [name for name in names if not os.environ.get(name)]
    if missing and access.href:  # AWS also has machine roles and profiles
        raise CatalogError(
            f"source {source_id!r} reads from {access.href}, which needs keys: "
            f"{' and '.join(missing)} not set in the environment; "
            "get them from the provider's site and export them"
        )
    if not access.credentials_for:
        raise CatalogError(
            f"source {source_id!r} signs requests, but names no bucket: list its buckets in "
            "credentials_for (sources.yaml), or set anonymous: true"
        )
