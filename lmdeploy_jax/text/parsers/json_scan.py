"""Tells of a text, character by character, whether it is still the beginning of a JSON value (RFC 8259)."""

from __future__ import annotations

from collections.abc import Callable

SPACE = " \t\n\r"
_HEX = frozenset("0123456789abcdefABCDEF")
_LITERALS = {"t": "rue", "f": "alse", "n": "ull"}


def _arcs(digits: str = "", **arcs: str) -> dict[str, str]:
    """Edges of the number automaton: `digits` is where any digit leads."""
    return {**(dict.fromkeys("0123456789", digits) if digits else {}), **arcs}


_EXPONENT = {"e": "exponent", "E": "exponent"}
_NUMBER = {
    "start": {**_arcs("integer"), "0": "zero", "-": "minus"},
    "minus": {**_arcs("integer"), "0": "zero"},
    "zero": {".": "point", **_EXPONENT},
    "integer": {**_arcs("integer"), ".": "point", **_EXPONENT},
    "point": _arcs("fraction"),
    "fraction": _arcs("fraction", **_EXPONENT),
    "exponent": {**_arcs("power"), "+": "sign", "-": "sign"},
    "sign": _arcs("power"),
    "power": _arcs("power"),
}
_WHOLE_NUMBER = frozenset({"zero", "integer", "fraction", "power"})


class JsonScanner:
    """A push-down automaton over characters. Its stack is a list, so that no nesting is too deep for it.

    `push` takes the next character and says whether the text is still a prefix of JSON; a character that is
    refused leaves the scanner as it was. `complete` says whether the text so far is one whole JSON value.
    """

    def __init__(self) -> None:
        self._open: list[str] = []  # closing brackets still owed
        self._state: _State = self._value
        self._detail = ""  # the number's state, the rest of a literal, or the hex digits owed
        self._in_key = False

    def push(self, char: str) -> bool:
        after = self._state(char) if char else None
        if after is None:
            return False
        self._state = after
        return True

    @property
    def complete(self) -> bool:
        whole_number = self._state == self._number and self._detail in _WHOLE_NUMBER
        return not self._open and (whole_number or self._state == self._after)

    def _value(self, char: str) -> _State | None:
        if char in SPACE:
            return self._value
        if char == '"':
            return self._string
        if char in "{[":
            self._open.append("}" if char == "{" else "]")
            return self._first_key if char == "{" else self._first_item
        if char in _LITERALS:
            self._detail = _LITERALS[char]
            return self._literal
        return self._number_from("start", char)

    def _first_key(self, char: str) -> _State | None:
        if char in SPACE:
            return self._first_key
        return self._after(char) if char == "}" else self._key(char)

    def _first_item(self, char: str) -> _State | None:
        if char in SPACE:
            return self._first_item
        return self._after(char) if char == "]" else self._value(char)

    def _key(self, char: str) -> _State | None:
        if char in SPACE:
            return self._key
        self._in_key = char == '"'
        return self._string if self._in_key else None

    def _colon(self, char: str) -> _State | None:
        if char in SPACE:
            return self._colon
        return self._value if char == ":" else None

    def _after(self, char: str) -> _State | None:
        if char in SPACE:
            return self._after
        if char == "," and self._open:
            return self._key if self._open[-1] == "}" else self._value
        if self._open and char == self._open[-1]:
            self._open.pop()
            return self._after
        return None

    def _string(self, char: str) -> _State | None:
        if char == "\\":
            return self._escape
        if char != '"':
            return self._string if char >= " " else None
        was_key, self._in_key = self._in_key, False
        return self._colon if was_key else self._after

    def _escape(self, char: str) -> _State | None:
        if char == "u":
            self._detail = "hhhh"
            return self._hex
        return self._string if char in '"\\/bfnrt' else None

    def _hex(self, char: str) -> _State | None:
        if char not in _HEX:
            return None
        self._detail = self._detail[1:]
        return self._hex if self._detail else self._string

    def _literal(self, char: str) -> _State | None:
        if char != self._detail[0]:
            return None
        self._detail = self._detail[1:]
        return self._literal if self._detail else self._after

    def _number(self, char: str) -> _State | None:
        return self._number_from(self._detail, char)

    def _number_from(self, state: str, char: str) -> _State | None:
        if char in _NUMBER[state]:
            self._detail = _NUMBER[state][char]
            return self._number
        return self._after(char) if state in _WHOLE_NUMBER else None


_State = Callable[[str], "_State | None"]
