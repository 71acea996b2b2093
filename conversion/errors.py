"""The one exception of the converter."""

# More than any sentence of the converter with the longest path of a file system that people use.
_MOST_CHARACTERS = 2000


class ConversionError(Exception):
    """The conversion cannot continue. The message is one line that names the file or argument and the remedy."""

    def __init__(self, message: str):
        # A hostile file can hold names of any length, with line breaks and control characters of terminals.
        if len(message) > _MOST_CHARACTERS:
            message = f"{message[: _MOST_CHARACTERS // 2]} ... {message[-_MOST_CHARACTERS // 4 :]}"
        super().__init__("".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in message))
