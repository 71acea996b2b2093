"""Turns names found in a checkpoint into paths that stay inside it."""

from pathlib import Path, PurePosixPath, PureWindowsPath

from .errors import ConversionError


def inside(folder: Path, name: str, named_by: Path) -> Path:
    """`folder / name`, refused unless it stays in `folder`.

    A snapshot of the Hub's cache is a folder of links into the `blobs` beside it, which count as inside.

    Args:
        folder: the checkpoint.
        name: a plain file name found in it.
        named_by: the file that holds the name, for the message.

    Raises:
        ConversionError: the name is a path, has characters that cannot be shown, or is a link that leaves the
            checkpoint.
    """
    plain = bool(name) and name.isprintable() and name not in {".", ".."}
    if not plain or PurePosixPath(name).name != name or PureWindowsPath(name).name != name:
        raise ConversionError(
            f"{named_by} names {name!r}, which is not a plain file name: a checkpoint's files lie in its own folder; "
            "do not use this checkpoint unless you trust where it came from"
        )
    path = folder / name
    try:
        target = path.resolve()
    except (OSError, RuntimeError):  # a ring of links, which Python below 3.13 reports as the second
        raise ConversionError(f"{path} is a link that leads nowhere: copy the file itself there") from None
    roots = [folder.resolve()]
    for above in (folder.parent, folder.parent.parent):
        if above.name == "snapshots":
            roots.append((above.parent / "blobs").resolve())
    if not any(target.is_relative_to(root) for root in roots):
        raise ConversionError(f"{path} is a link out of the checkpoint: copy the file itself there")
    return path
