"""Loaders: what stands in the place of a user's loader, behaves as it in every respect, and follows its batches.

The user's object stays itself: whatever is read, set, called or copied is read, set, called and copied on it, with
itself as ``self``. Only the iterators that it makes are handed out with a stand-in around them. The stand-in's class is
made on the spot: it derives from the loader's own where that is written in Python, has the special methods that the
loader has and no others, and says by ``__class__`` what the loader says.
"""

from __future__ import annotations

import functools
from abc import ABCMeta
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import suppress
from typing import Any, Generic, Protocol, TypeVar, cast

Batch = TypeVar("Batch")
Face = TypeVar("Face", bound="StandIn")

_OF = "_esper_otel_of"
_LISTENER = "_esper_otel_listener"
# Of these a stand-in has its own, or what ``object`` and ``type`` have.
_NOT_FORWARDED = frozenset(
    {
        *("__class__", "__class_getitem__", "__del__", "__delattr__", "__dict__", "__getattr__", "__getattribute__"),
        *("__init__", "__init_subclass__", "__iter__", "__new__", "__next__", "__setattr__", "__slots__"),
        *("__subclasshook__", "__weakref__", "__set_name__", "__get__", "__set__", "__delete__"),
        *("__instancecheck__", "__subclasscheck__", "__prepare__", "__mro_entries__"),
    }
)


class Listener(Protocol):
    """Hears of the batches that a loop takes, on the thread that takes them. Nothing in it may raise.

    ``taker`` stands for one iteration over a loader, from its begin to its end.
    """

    def asks(self, taker: object) -> None:
        """A batch is asked for."""

    def gets(self, taker: object, batch: object) -> None:
        """It is there."""

    def gets_nothing(self, taker: object) -> None:
        """It does not come: there is no other one, or the loader has raised."""

    def left(self, taker: object) -> None:
        """The iteration is over without having come to the loader's end. May come late, and from any thread."""


class StandIn:
    """Behaves as the object that it stands in for; see the module. Made by ``stand_in``.

    Attributes:
        own: names that are the stand-in's, whatever the object has under them.
    """

    own: frozenset[str] = frozenset()

    def __init_subclass__(cls, **named: Any) -> None:
        """Keeps the loader's class from hearing of a class that nobody has written."""
        if "__class__" not in vars(cls):
            super().__init_subclass__(**named)

    def __getattribute__(self, name: str) -> Any:
        if name in type(self).own:
            return object.__getattribute__(self, name)
        return getattr(of(self), name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(of(self), name, value)

    def __delattr__(self, name: str) -> None:
        delattr(of(self), name)

    def __del__(self) -> None:
        """Not the one of the object, which has not come to its end."""

    def __dir__(self) -> Iterable[str]:
        return sorted({*dir(of(self)), *type(self).own})


def of(stand_in: object) -> Any:
    """The object that this one stands in for."""
    return object.__getattribute__(stand_in, _OF)


def is_stand_in(value: object) -> bool:
    """Whether this is one of ours: ``isinstance`` would ask the object."""
    return StandIn in type(value).__mro__


def stand_in(face: type[Face], real: object, **state: object) -> Face:
    """Something of the class ``face`` that behaves as ``real``.

    Args:
        face: says what is different: names in ``own``, and special methods.
        real: any object.
        state: attributes of the stand-in itself; those that are not in ``own`` are read by ``object.__getattribute__``.
    """
    made: Any = object.__new__(_class_for(cast("Hashable", face), cast("Hashable", type(real))))
    object.__setattr__(made, _OF, real)
    for name, value in state.items():
        object.__setattr__(made, name, value)
    return cast("Face", made)


@functools.lru_cache(maxsize=64)
def _class_for(face: type, kind: type) -> type:
    """A class for stand-ins of objects of this kind."""
    content: dict[str, Any] = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "__class__": property(lambda self: of(self).__class__),
        # Whoever makes another loader of the same class means the class, not what stands in for one.
        "__new__": lambda _cls, *arguments, **named: kind(*arguments, **named),
    }
    defined = {name for base in face.__mro__ if base is not object for name in vars(base)}
    for name in dir(kind):
        if name[:2] == name[-2:] == "__" and name not in _NOT_FORWARDED | defined:
            special = getattr(kind, name)
            if callable(special) or special is None:
                content[name] = special and _forwarder(name)
    if hasattr(kind, "__next__") and hasattr(face, "takes"):
        content["__next__"] = face.takes
    if type(kind) in {type, ABCMeta}:
        try:
            made = type(kind)(kind.__name__, (face, kind), content)
            object.__new__(made)
        except TypeError:  # of a class that is not written in Python, or must not be derived from
            pass
        else:
            return made
    return type(kind.__name__, (face,), content)


def _forwarder(name: str) -> Callable[..., Any]:
    def forward(self: object, *arguments: Any, **named: Any) -> Any:
        return getattr(of(self), name)(*arguments, **named)

    forward.__name__ = name
    return forward


class Loader(StandIn, Generic[Batch]):
    """Stands in for a loader: its iterators' batches are heard of."""

    def __iter__(self) -> Iterator[Batch]:
        real = of(self)
        iterator = iter(real)
        if iterator is real:  # a generator, a file: there is one iteration only
            return self
        return taking(iterator, object.__getattribute__(self, _LISTENER))

    def takes(self) -> Batch:
        """The next batch, of a loader that is its own iterator."""
        return cast("Batch", _take(self))


class IteratorStandIn(StandIn):
    """Stands in for an iterator: a listener hears of each batch."""

    def __iter__(self) -> Iterator[Any]:
        iterator = iter(of(self))
        return self if iterator is of(self) else iterator

    def __next__(self) -> Any:
        return _take(self)

    def __del__(self) -> None:
        with suppress(Exception):  # at the interpreter's end anything may be gone
            object.__getattribute__(self, _LISTENER).left(self)


def following(face: type[Face], loader: object, listener: Listener, **state: object) -> Face:
    """A stand-in for a loader, of a class that derives from ``Loader``."""
    return stand_in(face, loader, **{_LISTENER: listener}, **state)


def taking(iterator: Iterator[Batch], listener: Listener) -> Iterator[Batch]:
    """A stand-in for an iterator."""
    return stand_in(IteratorStandIn, iterator, **{_LISTENER: listener})


def _take(taker: StandIn) -> Any:
    own = object.__getattribute__(taker, "__dict__")
    listener: Listener = own[_LISTENER]
    listener.asks(taker)
    try:
        batch = next(own[_OF])
    except BaseException:
        listener.gets_nothing(taker)
        raise
    listener.gets(taker, batch)
    return batch
