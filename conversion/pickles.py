"""An unpickler that runs nothing and ends soon: names become inert values, keys are plain, and steps are counted."""

import io
import pickle
from collections.abc import Callable
from typing import Any


# A step is a byte or more of the pickle, up to a microsecond and a hundred bytes. An index has about 100 for each
# piece of a tensor.
MOST_STEPS = 6_000_000


class _Counted(dict):
    """The functions of the opcodes, of which each look-up is a step."""

    left = MOST_STEPS

    def __getitem__(self, opcode: int) -> Callable[[Any], None]:
        self.left -= 1
        if self.left < 0:
            raise pickle.UnpicklingError(f"it takes more than {MOST_STEPS:,} steps")
        return super().__getitem__(opcode)


class BoundedUnpickler(pickle._Unpickler):
    """Unpickles; a subclass says in `find_class` what the names are that it knows, and others are refused.

    This is the unpickler written in Python. The one written in C reserves memory for whatever number a pickle gives a
    remembered object. A key of a table is text or an inert object: to compute the hash of a tuple that holds others
    many times over takes time without an end, which nothing can interrupt, and numbers can be chosen so that all have
    one hash.
    """

    def __init__(self, content: bytes | memoryview):
        super().__init__(io.BytesIO(content))
        self.dispatch = _Counted(type(self).dispatch)

    def find_class(self, module: str, name: str) -> Any:
        """What a name stands for; `dict` and other types that hash their arguments are given away by no subclass."""
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which the format does not need")


def _with_plain_keys(load: Callable[[Any], None], keys: slice) -> Callable[[Any], None]:
    def checked(unpickler: BoundedUnpickler) -> None:
        for key in unpickler.stack[keys]:
            if type(key) is not str and type(key).__hash__ is not object.__hash__:
                raise pickle.UnpicklingError(f"a key is a {type(key).__name__}")
        load(unpickler)

    return checked


_usual = pickle._Unpickler.dispatch
_sets = (pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET)
BoundedUnpickler.dispatch = {
    **{opcode: load for opcode, load in _usual.items() if bytes([opcode]) not in _sets},
    # The keys are among what lies above the last mark, or below the top of the stack.
    pickle.SETITEMS[0]: _with_plain_keys(_usual[pickle.SETITEMS[0]], slice(0, None, 2)),
    pickle.DICT[0]: _with_plain_keys(_usual[pickle.DICT[0]], slice(0, None, 2)),
    pickle.SETITEM[0]: _with_plain_keys(_usual[pickle.SETITEM[0]], slice(-2, -1)),
}
