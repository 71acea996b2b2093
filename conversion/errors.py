"""The one exception of the converter."""


class ConversionError(Exception):
    """The conversion cannot continue. The message is one line that names the file or argument and the remedy."""

    def __init__(self, message: str):
        # Names in a hostile file may hold line breaks and control characters of terminals.
        super().__init__("".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in message))
