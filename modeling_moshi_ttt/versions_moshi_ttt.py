"""Which releases of transformers this code is tested with. Checkpoints carry it beside the rest of the code, so both follow one range."""

import re
import warnings
from functools import cache

import transformers

# From the first to below the second. setup.cfg says the same to pip, and `moshi-ttt verify` reads this line in the code of a checkpoint.
TRANSFORMERS = ("5.23", "5.25")


def release(version: str) -> tuple[int, ...]:
    """The first two numbers of a version: (5, 24) of "5.24.1" and of "5.24.0.dev0"."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


@cache  # every file that loads first asks, and one warning is enough
def check_transformers(version: str = transformers.__version__) -> None:
    """Refuse a transformers older than the tested range; warn, once, of one that is newer.

    Raises:
        ImportError: `version` is below the range; the message names both and the cure.
    """
    lowest, limit = TRANSFORMERS
    tested = f"Moshi-TTT is tested with transformers >= {lowest}, < {limit}; {version} is installed"
    cure = f"pip install 'transformers>={lowest},<{limit}'"
    if release(version) < release(lowest):
        raise ImportError(f"{tested}, which is too old: {cure}")
    if release(version) >= release(limit):
        warnings.warn(f"{tested}, which may have renamed what this code uses. If something fails: {cure}", stacklevel=2)
