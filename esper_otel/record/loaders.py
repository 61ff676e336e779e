"""Stand-ins: proxies that replace a user's data loader, behave exactly like it, and observe the batches taken from it.

The user's object is not modified. Attributes are read and set on it, and methods run on it with the real object as
``self``. Only the iterators that it creates are wrapped in a stand-in. The class of a stand-in is created at run time.
It is a subclass of the loader's class if that is written in Python, it has exactly the loader's special methods, and
its ``__class__`` returns the loader's.
"""

from __future__ import annotations

import functools
from abc import ABCMeta
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import suppress
from typing import Any, Generic, Protocol, TypeVar, cast

from esper_otel.tracebacks import leave_out_caller

Batch = TypeVar("Batch")
Face = TypeVar("Face", bound="StandIn")

_OF = "_esper_otel_of"
_LISTENER = "_esper_otel_listener"
# Special methods not forwarded: a stand-in has its own, or those of ``object`` and ``type``.
_NOT_FORWARDED = frozenset(
    {
        *("__class__", "__class_getitem__", "__del__", "__delattr__", "__dict__", "__getattr__", "__getattribute__"),
        *("__init__", "__init_subclass__", "__iter__", "__new__", "__next__", "__setattr__", "__slots__"),
        *("__subclasshook__", "__weakref__", "__set_name__", "__get__", "__set__", "__delete__"),
        *("__instancecheck__", "__subclasscheck__", "__prepare__", "__mro_entries__"),
    }
)


class Listener(Protocol):
    """Is called for each batch that a loop takes, on the thread that takes it. Its methods must not raise.

    ``taker`` identifies one iteration over a loader, from its beginning to its end.
    """

    def asks(self, taker: object) -> None:
        """The loop requests a batch."""

    def gets(self, taker: object, batch: object) -> None:
        """The loader has returned the batch."""

    def gets_nothing(self, taker: object) -> None:
        """The loader has no further batch, or it has raised an exception."""

    def left(self, taker: object) -> None:
        """The iteration was abandoned before the loader's end. May be called late and from any thread."""


class StandIn:
    """Behaves like the object that it stands in for; see the module. Created by ``stand_in``.

    Attributes:
        own: names of attributes that belong to the stand-in, even if the object has attributes of the same names.
    """

    own: frozenset[str] = frozenset()

    def __init_subclass__(cls, **named: Any) -> None:
        """Skips ``__init_subclass__`` of the loader's class, since no user wrote this subclass."""
        if "__class__" not in vars(cls):
            super().__init_subclass__(**named)

    def __getattribute__(self, name: str) -> Any:
        if name in type(self).own:
            return object.__getattribute__(self, name)
        try:
            return getattr(of(self), name)
        except BaseException as error:
            leave_out_caller(error)
            raise

    def __setattr__(self, name: str, value: object) -> None:
        try:
            setattr(of(self), name, value)
        except BaseException as error:
            leave_out_caller(error)
            raise

    def __delattr__(self, name: str) -> None:
        try:
            delattr(of(self), name)
        except BaseException as error:
            leave_out_caller(error)
            raise

    def __del__(self) -> None:
        """Does nothing: the object itself still lives, so its ``__del__`` must not run."""

    def __dir__(self) -> Iterable[str]:
        return sorted({*dir(of(self)), *type(self).own})


def of(stand_in: object) -> Any:
    """Returns the object that ``stand_in`` stands in for."""
    return object.__getattribute__(stand_in, _OF)


def is_stand_in(value: object) -> bool:
    """Whether the value is a stand-in. ``isinstance`` would look at the real object's class instead."""
    return StandIn in type(value).__mro__


def stand_in(face: type[Face], real: object, **state: object) -> Face:
    """Creates an instance of ``face`` that behaves like ``real``.

    Args:
        face: a class that defines what differs from ``real``: the names in ``own``, and special methods.
        real: any object.
        state: attributes of the stand-in itself; those not in ``own`` are read by ``object.__getattribute__``.
    """
    made: Any = object.__new__(_class_for(cast("Hashable", face), cast("Hashable", type(real))))
    object.__setattr__(made, _OF, real)
    for name, value in state.items():
        object.__setattr__(made, name, value)
    return cast("Face", made)


@functools.lru_cache(maxsize=64)
def _class_for(face: type, kind: type) -> type:
    """Creates the class for stand-ins of objects of class ``kind``."""
    content: dict[str, Any] = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "__class__": property(lambda self: of(self).__class__),
        # Code that calls the class to create another loader gets a real loader, not a stand-in.
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
        except TypeError:  # the class is not written in Python or cannot be subclassed
            pass
        else:
            return made
    return type(kind.__name__, (face,), content)


def _forwarder(name: str) -> Callable[..., Any]:
    def forward(self: object, *arguments: Any, **named: Any) -> Any:
        try:
            return getattr(of(self), name)(*arguments, **named)
        except BaseException as error:
            leave_out_caller(error)
            raise

    forward.__name__ = name
    return forward


def _take(taker: StandIn) -> Any:
    """Returns the next batch. It is the method itself, so that an exception has only one frame to leave out."""
    own = object.__getattribute__(taker, "__dict__")
    listener: Listener = own[_LISTENER]
    listener.asks(taker)
    try:
        batch = next(own[_OF])
    except BaseException as error:
        listener.gets_nothing(taker)
        leave_out_caller(error)
        raise
    listener.gets(taker, batch)
    return batch


class Loader(StandIn, Generic[Batch]):
    """Stands in for a loader; a listener is told of the batches of its iterators."""

    def __iter__(self) -> Iterator[Batch]:
        real = of(self)
        try:
            iterator = iter(real)
        except BaseException as error:
            leave_out_caller(error)
            raise
        if iterator is real:  # a generator or a file: it can be iterated only once
            return self
        return taking(iterator, object.__getattribute__(self, _LISTENER))

    takes = _take  # for a loader that is its own iterator


class IteratorStandIn(StandIn):
    """Stands in for an iterator; a listener is told of each batch."""

    def __iter__(self) -> Iterator[Any]:
        iterator = iter(of(self))
        return self if iterator is of(self) else iterator

    __next__ = _take

    def __del__(self) -> None:
        with suppress(Exception):  # while the interpreter shuts down, anything may be gone
            object.__getattribute__(self, _LISTENER).left(self)


def following(face: type[Face], loader: object, listener: Listener, **state: object) -> Face:
    """Creates a stand-in for a loader. ``face`` is a subclass of ``Loader``."""
    return stand_in(face, loader, **{_LISTENER: listener}, **state)


def taking(iterator: Iterator[Batch], listener: Listener) -> Iterator[Batch]:
    """Creates a stand-in for an iterator."""
    return stand_in(IteratorStandIn, iterator, **{_LISTENER: listener})
