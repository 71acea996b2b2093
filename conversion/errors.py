"""The one exception of the converter."""


class ConversionError(Exception):
    """A conversion that cannot go on. The message is one line that names the file or argument and the remedy."""
