"""KEY=VALUE words: a method's arguments, and the details of a question to the policy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from vchan.errors import ConfigError
from vchan.session import MESSAGE_BYTES_MAX

FORMS: Final = "expected KEY=VALUE, KEY:=JSON, KEY=@FILE or KEY:=@FILE, KEY being a name"


def parse_values(words: list[str]) -> dict[str, Any]:
    """A method's arguments.

        KEY=VALUE   VALUE if it is JSON, and otherwise the text
        KEY:=JSON   JSON, and nothing else: n:='"1"' is the text 1
        KEY=@FILE   the text of a file
        KEY:=@FILE  the JSON of a file

    Raises:
        ConfigError: A word is none of these, a key comes twice, or a file cannot be read.
    """
    values: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        is_json = key.endswith(":")
        key = key.removesuffix(":")
        if not equals or not key.isidentifier():
            raise ConfigError(f"argument {word!r}", FORMS)
        if key in values:
            raise ConfigError(f"argument {word!r}", f"{key} is given twice")
        is_file = text.startswith("@")
        if is_file:
            text = _content(word, text[1:])
        if is_json:
            values[key] = _json(word, text, is_file=is_file)
        else:
            values[key] = text if is_file else _guessed(text)
    return values


def pairs(words: list[str]) -> dict[str, str]:
    """KEY=VALUE words, all of them text.

    Raises:
        ConfigError: A word is none, or a key comes twice.
    """
    values: dict[str, str] = {}
    for word in words:
        key, equals, text = word.partition("=")
        # The name of a flavor's extra spec may have other letters: who asked for it judges it.
        if not equals or not (key.isidentifier() or ":" in key):
            raise ConfigError(f"argument {word!r}", "expected KEY=VALUE, KEY being a name")
        if key in values:
            raise ConfigError(f"argument {word!r}", f"{key} is given twice")
        values[key] = text
    return values


def _guessed(text: str) -> Any:
    try:
        return _strict(text)
    except (ValueError, RecursionError):
        return text


def _strict(text: str) -> Any:
    """Python's reader takes more than JSON has, and its writer says so."""
    value = json.loads(text)
    json.dumps(value, allow_nan=False)
    return value


def _json(word: str, text: str, *, is_file: bool) -> Any:
    try:
        return _strict(text)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        if is_file:
            where, what, text_is = f"argument {word!r}", "the file", "a file of text: KEY=@FILE"
        else:
            where, what = f"argument {word.partition('=')[0]}=", "what stands after :="
            text_is = "a text needs quotes, or = in place of :="
        raise ConfigError(where, f"{what} is no JSON: {why}; {text_is}") from None


def _content(word: str, name: str) -> str:
    """A file's text. No more is read than a request may hold."""
    where = f"argument {word!r}"
    meant = "the text itself, if it begins with @: KEY:='\"@...\"'"
    if not name:
        raise ConfigError(where, f"after @ there is no file; {meant}")
    try:
        with Path(name).open("rb") as file:
            content = file.read(MESSAGE_BYTES_MAX + 1)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise ConfigError(where, f"file {name!r}: {why}; {meant}") from None
    if len(content) > MESSAGE_BYTES_MAX:
        limit = f"{MESSAGE_BYTES_MAX} bytes (MESSAGE_BYTES_MAX)"
        raise ConfigError(where, f"file {name!r} is larger than a request may be: {limit}")
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise ConfigError(where, f"file {name!r} is not UTF-8") from None
