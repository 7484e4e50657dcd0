"""Let people talk to a model: a page in the browser, Kyutai's protocol for other clients, many callers at once.

Open http://127.0.0.1:8998 when it says so. `--demo` starts the small model that remembers what it was told, with sounds to play to it.
Conversations are kept for some time when their callers leave, and can be gone on with. Who is called should know that a machine speaks.
"""

import argparse
import errno
import logging
import socket
import ssl
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import uvicorn

from ..errors_moshi_ttt import MoshiTTTError, MoshiTTTOSError
from .capacity import measured_rows
from .clips import demo_clips
from .conversations import ConversationStore
from .engine import Engine
from .loading import ADAPTER, MODEL, load_model
from .logs import log_to_stderr
from .protocol import LONGEST_MESSAGE
from .server import ServerSettings, create_app

logger = logging.getLogger(__name__)

DEMO, DEMO_SAMPLING = "remembering", {"do_sample": False}  # it was trained to say the likeliest
STOP = 15  # seconds that calls have to end in


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help=MODEL,
    )
    parser.add_argument("--adapter", help=ADAPTER)
    parser.add_argument("--demo", action="store_true", help=f"serve the packaged model {DEMO!r}, with sounds to play to it")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1, this machine alone; 0.0.0.0 for all)")
    parser.add_argument("--port", type=int, default=8998, help="default 8998, as Kyutai's; 0 for any")
    parser.add_argument("--rows", type=int, help="callers at once; measured at the start when left out")
    parser.add_argument(
        "--budget", type=float, default=60.0, metavar="MS", help="what a tick of 80 ms may take when measuring (default 60)"
    )
    parser.add_argument("--patience", type=int, default=3, metavar="FRAMES", help="how long a late frame is waited for (default 3)")
    parser.add_argument(
        "--sessions",
        metavar="FOLDER_OR_URL",
        help="keep conversations here, also for other machines: a folder, or a URL of an object store as fsspec reads it; else until the end",
    )
    parser.add_argument("--keep", type=float, default=60.0, metavar="MINUTES", help="how long conversations are kept (default 60)")
    parser.add_argument("--minutes", type=float, default=0.0, help="longest call; no limit when 0 (default)")
    parser.add_argument("--voices", type=Path, metavar="FOLDER", help="sound files that callers may name as `voice_prompt`")
    parser.add_argument("--temperature", type=float, help="of the codes, where a caller does not say; 0 takes the likeliest")
    parser.add_argument("--text-temperature", type=float, help="of the text, likewise")
    parser.add_argument("--token", help="what callers have to know")
    parser.add_argument("--origin", action="append", default=[], metavar="URL", help="a page of another server that may call")
    parser.add_argument(
        "--tls-certificate", type=Path, metavar="FILE", help="browsers give their microphone to https and this machine only"
    )
    parser.add_argument("--tls-key", type=Path, metavar="FILE", help="of the certificate")
    parser.add_argument("--log-words", action="store_true", help="write what Moshi says to the log")


def run(args: argparse.Namespace) -> int:
    """Serve until a signal; every conversation is kept then."""
    check(args)
    log_to_stderr()
    with ExitStack() as stack:
        place = stack.enter_context(listening(args.host, args.port))
        model, processor = load_model(DEMO if args.demo else args.model, args.adapter, "MODEL")
        rows = args.rows or measured_rows(model, processor, args.budget / 1e3)
        folder = args.sessions or stack.enter_context(tempfile.TemporaryDirectory(prefix="moshi-ttt-"))
        store = ConversationStore(folder, args.keep * 60, model, processor)
        engine = Engine(model, processor, rows, store, args.patience, Path(args.model or DEMO).name)
        app = create_app(engine, server_settings(args), demo_clips() if args.demo else ())
        port, scheme = place.getsockname()[1], "https" if args.tls_certificate else "http"
        suffix = f"/?token={args.token}" if args.token else ""
        print(f"talk to {engine.name} at {scheme}://{args.host}:{port}{suffix} ({rows} callers at once; Ctrl-C stops)", flush=True)
        uvicorn.Server(server_config(app, args.tls_certificate, args.tls_key)).run(sockets=[place])
    return 0


def check(args: argparse.Namespace) -> None:
    """ValueError or OSError for arguments that do not fit each other, or files that are not there."""
    if args.demo == bool(args.model):
        raise MoshiTTTError("give a MODEL to serve, or --demo for the packaged one, and not both.")
    if args.demo and args.adapter:
        raise MoshiTTTError(f"--adapter is {args.adapter}, which --demo does not take; name its base as MODEL.")
    for name, least in (("rows", 1), ("patience", 0), ("keep", 0), ("minutes", 0), ("temperature", 0), ("text_temperature", 0)):
        value = getattr(args, name)
        if value is not None and not value >= least:
            raise MoshiTTTError(f"--{name.replace('_', '-')} is {value}; it must be {least} or more.")
    if not 0 < args.budget < 80:
        raise MoshiTTTError(f"--budget is {args.budget:g}; a tick may take more than 0 and less than 80 ms.")
    if not 0 <= args.port < 1 << 16:
        raise MoshiTTTError(f"--port is {args.port}; it must be 0 to 65535.")
    if args.voices and not args.voices.is_dir():
        raise MoshiTTTOSError(f"--voices is {args.voices}, where there is no folder.")
    if bool(args.tls_certificate) != bool(args.tls_key):
        raise MoshiTTTError("--tls-certificate and --tls-key come together; give both, or neither.")
    for file in filter(None, (args.tls_certificate, args.tls_key)):
        if not file.is_file():
            raise MoshiTTTOSError(f"{file}: there is no such file; name the certificate and its key in PEM form.")
    if args.tls_certificate:
        try:
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(args.tls_certificate, args.tls_key)
        except ssl.SSLError as error:
            raise MoshiTTTError(
                f"`--tls-certificate={args.tls_certificate}` and `--tls-key={args.tls_key}` must be a certificate and its key in PEM form "
                f"({error.reason}); check both files."
            ) from None


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens, before anything is loaded.

    Raises:
        OSError: the port is taken, or the address is none of this machine's.
    """
    try:
        return socket.create_server((host, port), backlog=128)
    except (OSError, OverflowError) as error:
        reason = "another program listens there" if getattr(error, "errno", 0) == errno.EADDRINUSE else str(error)
        raise MoshiTTTOSError(f"--host {host} --port {port} cannot be listened on ({reason}); choose another port, 0 for any.") from None


def server_settings(args: argparse.Namespace) -> ServerSettings:
    """What the options ask for; a temperature of 0 is read as a caller's would be."""
    sampling: dict[str, Any] = dict(DEMO_SAMPLING) if args.demo else {}
    for name in ("temperature", "text_temperature"):
        if getattr(args, name) is not None:
            sampling |= {name: getattr(args, name), "do_sample": True}
    return ServerSettings(sampling, args.token, tuple(args.origin), args.voices, minutes=args.minutes, log_words=args.log_words)


def server_config(app: Any, certificate: Path | None = None, key: Path | None = None) -> uvicorn.Config:
    """How uvicorn serves the application: over TLS with a certificate and its key."""
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,  # addresses hold tokens
        server_header=False,
        ws="websockets-sansio",
        ws_max_size=LONGEST_MESSAGE,
        ws_per_message_deflate=False,
        timeout_graceful_shutdown=STOP,
        ssl_certfile=certificate,
        ssl_keyfile=key,
    )
