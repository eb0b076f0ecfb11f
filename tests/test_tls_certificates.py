"""Files are read over TLS from servers with a trusted certificate only."""

from __future__ import annotations

import datetime as dt
import functools
import ssl
import threading
from contextlib import contextmanager
from http.server import ThreadingHTTPServer

import numpy as np
import pytest
import requests
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from known_servers import Ranged
from minecube.catalog import Access
from minecube.errors import ReadError
from minecube.reader import read
from minecube.reader.remote import Session

pytestmark = pytest.mark.usefixtures("all_hosts_are_tried")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate of localhost that only it has signed, and its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = dt.datetime.now(dt.UTC)
    made = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    made = made.not_valid_before(now - dt.timedelta(1)).not_valid_after(now + dt.timedelta(1))
    made = made.add_extension(
        x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False
    )
    signed = made.add_extension(
        x509.BasicConstraints(ca=True, path_length=None), critical=True
    ).sign(key, hashes.SHA256())
    path = tmp_path_factory.mktemp("tls") / "localhost.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(signed.public_bytes(serialization.Encoding.PEM) + private)
    return path


@contextmanager
def running_tls(handler, certificate):
    """The handler on a server of TLS; yields its URL."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"https://localhost:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_a_file_is_read_over_tls_from_a_server_with_a_trusted_certificate(
    band, certificate, monkeypatch
):
    folder, grid, pixels = band
    handler = functools.partial(Ranged, directory=str(folder))
    with running_tls(handler, certificate) as url:
        # Connections keep the certificates that they began with: two accesses share none.
        before, after = Access(connections=5), Access(connections=6)
        with pytest.raises(ReadError, match="certificate"):
            read(f"{url}/B04.tif", grid, access=before)
        with pytest.raises(requests.exceptions.SSLError), Session() as session:
            session.get(url, timeout=10)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
        np.testing.assert_array_equal(read(f"{url}/B04.tif", grid, access=after), pixels)
        with Session() as session:
            answer = session.get(f"{url}/B04.tif", timeout=10, headers={"Range": "bytes=0-9"})
            assert answer.content == (folder / "B04.tif").read_bytes()[:10]
