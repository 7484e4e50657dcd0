"""What others may read: settings, results and configurations without the paths of the machine they were written on."""

import re
from typing import Any

# Between these, one value of a list written as text, such as "a.jsonl:1,/data/b.jsonl:2", begins and ends.
_ENDS = re.compile(r"([,;|\n\t\"'=])")
_NAME = r"[\w.%~ +-]+"
# The start of a path: file:///x/y, ~/x, ~user/x, $HOME/x, %APPDATA%\x, C:\x, C:/x, \\server\share, //server/share, ../x, /x/y and /x; what
# stands in a URL is none, nor is the slash of </s>.
_PATH = re.compile(
    rf"(?<![\w/\\.:])(?:file:/|~[\w.-]*[/\\]|\$\{{?\w+\}}?[/\\]|%\w+%[/\\]|[A-Za-z]:[/\\]|\\\\|//?{_NAME}/|(?<!<)/\w)"
    rf"|(?<![\w.])\.\.[/\\]|(?<=:)(?:[A-Za-z]:\\|/\w)"
)


def without_paths(value: Any) -> Any:
    """Settings or results for others to read: of a path of this machine, in any spelling and anywhere, its last part is kept."""
    if isinstance(value, dict):
        return {without_paths(key): without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    return "".join(map(_last_part, _ENDS.split(value))) if isinstance(value, str) else value


def _last_part(text: str) -> str:
    found = _PATH.search(text)
    if found is None:
        return text
    return text[: found.start()] + re.split(r"[/\\]", text[found.start() :].rstrip("/\\"))[-1]
