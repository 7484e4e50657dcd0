"""`moshi-ttt serve --tls-certificate --tls-key`: browsers give their microphone to https alone."""

import datetime
import ipaddress
import ssl
import urllib.request

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from live_client import running
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from websockets.sync.client import connect

from modeling_moshi_ttt.cli import main


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A certificate of this machine, which it has signed itself, and its key."""
    folder, key, now = tmp_path_factory.mktemp("tls"), ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    (folder / "certificate.pem").write_bytes(certificate.public_bytes(pem))
    (folder / "key.pem").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    return folder / "certificate.pem", folder / "key.pem"


def test_pages_and_calls_come_over_tls_and_not_without(files):
    async def page(request):
        return PlainTextResponse("here")

    async def chat(line):
        await line.accept()
        await line.send_bytes(await line.receive_bytes())
        await line.close()

    app = Starlette(routes=[Route("/", page), WebSocketRoute("/api/chat", chat)])
    with running(app, *files) as port:
        address, trusted = f"127.0.0.1:{port}", ssl.create_default_context(cafile=files[0])
        with urllib.request.urlopen(f"https://{address}/", context=trusted) as answer:
            assert answer.read() == b"here"
        with connect(f"wss://{address}/api/chat", ssl=trusted) as line:
            line.send(b"\x06")
            assert line.recv(10) == b"\x06"
        with pytest.raises(OSError, match=r"."):
            urllib.request.urlopen(f"http://{address}/", timeout=10)


@pytest.mark.parametrize("broken", ["certificate.pem", "key.pem"])
def test_what_is_no_certificate_or_key_is_one_line(files, tmp_path, broken, capsys):
    place = tmp_path / broken
    place.write_text("no PEM")
    certificate, key = (place if place.name == file.name else file for file in files)
    words = ["serve", "--demo", "--rows", "1", "--port", "0", "--tls-certificate", str(certificate), "--tls-key", str(key)]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "`--tls-" in said
    assert len(said.strip().splitlines()) == 1
