r"""Class names as single lines of text, and back.

A class is named after its folder, and a folder's name may hold a line break, or bytes that are not
UTF-8, which Python keeps as lone surrogates. A text file with one name a line can hold neither.
"""

import re

# Line breaks of str.splitlines and other control characters, the backslash, and lone surrogates.
_SPECIAL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\\\\\ud800-\udfff]")
_ESCAPE = re.compile(r"\\(?:\\|x([0-9a-f]{2})|u([0-9a-f]{4}))")


def escape(name: str) -> str:
    r"""Returns a name as one line of text that can be written as UTF-8.

    A backslash becomes `\\`, a byte that is not UTF-8 `\xNN`, and a control character, a line break
    or another lone surrogate `\uNNNN`. All other characters stay. `unescape` gives the name back.
    """

    def escaped(match: "re.Match[str]") -> str:
        code = ord(match[0])
        if match[0] == "\\":
            return r"\\"
        # Python's file system encoding keeps the byte NN as the surrogate DCNN.
        return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"

    return _SPECIAL.sub(escaped, name)


def unescape(line: str) -> str:
    r"""Returns the name that `escape` turned into a line; other backslashes stay."""

    def plain(match: "re.Match[str]") -> str:
        if match[1]:
            return chr(0xDC00 + int(match[1], 16))
        return chr(int(match[2], 16)) if match[2] else "\\"

    return _ESCAPE.sub(plain, line)
