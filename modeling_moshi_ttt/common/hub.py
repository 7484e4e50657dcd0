"""The Hub client's errors in words that say what to do and hold no token."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..errors_moshi_ttt import MoshiTTTError, MoshiTTTOSError
from .files import recover_folder
from .packaged import resolve
from .run_folder import final_of

# The Hub's tokens of users, of organisations, of OAuth and of jobs; signed ones of any issuer; and whatever is sent as one.
TOKEN = re.compile(
    r"hf_(?:oauth|jwt|app|org)_[\w.~+/=-]+|hf_[A-Za-z0-9]{6,}|api_(?:org_)?[A-Za-z0-9]{8,}|eyJ[\w-]{8,}(?:\.[\w-]+)*"
    r"|(?<=[Bb]earer )[^\s'\",]+|(?<=://)[^\s/@:]+:[^\s/@]+(?=@)"
)
HIDDEN = "hf_***"


def is_hub_name(name: str) -> bool:
    """Whether a name that is no path of this machine may be one of the Hub: owner/name."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def check_place(name: str, what: str) -> None:
    """ValueError, saying what it was to be, for a name that is no folder and cannot be one of the Hub."""
    if not Path(name).is_dir() and not is_hub_name(name):
        raise MoshiTTTError(f"{what} is {name}: there is no such folder, and it is no Hub name (owner/name).")


def redact(text: str, token: str | bool | None = None) -> str:
    """The text without anything that looks like a token, and without the client's own `token`, of whatever form."""
    own = [token, get_token(), *(os.environ.get(name) for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"))]
    for secret in sorted({one for one in own if isinstance(one, str) and one}, key=len, reverse=True):
        text = text.replace(secret, HIDDEN).replace(quote(secret, safe=""), HIDDEN)
    return TOKEN.sub(HIDDEN, text)


def _reason(error: BaseException, token: str | bool | None) -> str:
    """The innermost cause in one line."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    status = getattr(getattr(error, "response", None), "status_code", None)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines) or type(error).__name__
    return redact(f"HTTP {status}: {text}" if status is not None and str(status) not in text else text, token)


@contextmanager
def hub_errors(
    doing: str, then: str = "nothing has changed there; run the same command again to go on", token: str | bool | None = None
) -> Iterator[None]:
    """Turn the client's errors into one OSError or ValueError that says what was being done, why it failed, and what holds now.

    `token` is the client's own, which no message may hold.
    """
    try:
        yield
    except (RevisionNotFoundError, GatedRepoError, RepositoryNotFoundError, HFValidationError) as error:
        raise MoshiTTTError(f"{doing}: {_reason(error, token)}") from None
    except LocalTokenNotFoundError:
        raise MoshiTTTError(f"{doing}: you are not logged in; run `hf auth login` or set HF_TOKEN") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403):
            raise MoshiTTTError(f"{doing}: the Hub refuses this login ({_reason(error, token)}); run `hf auth login`; {then}") from None
        if status == 412:
            raise MoshiTTTError(
                f"{doing}: somebody else has changed the repository in between; look at it, then run the same command again"
            ) from None
        raise MoshiTTTOSError(f"{doing} failed: {_reason(error, token)}; {then}") from None
    except (OSError, RuntimeError) as error:
        raise MoshiTTTOSError(f"{doing} failed: {_reason(error, token)}; {then}") from None
    except Exception as error:
        if type(error).__module__.startswith("httpx"):
            raise MoshiTTTOSError(f"{doing} failed: {_reason(error, token)}; {then}") from None
        raise


def local_folder(name: str) -> Path:
    """The folder of a checkpoint, which may be a packaged one or a run's `final`; a Hub name is fetched first."""
    path = Path(resolve("model", name))
    recover_folder(path)
    if path.is_dir():
        return final_of(path)
    if not is_hub_name(name):
        raise MoshiTTTError(f"{name}: no such folder, and not a Hub name (owner/model)")
    from huggingface_hub import snapshot_download

    with hub_errors(f"fetching {name}", "run the same command again to go on"):
        return Path(snapshot_download(name))
