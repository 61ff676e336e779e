"""Where a process stands in the parallel dimensions of its run, such as data, tensor and pipeline parallelism."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from esper_otel.errors import ConfigurationError, InvalidValue

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_MOST_DIMENSIONS = 8
_MOST_PLACE = 2**31
_DIMENSION = re.compile(r"[a-z][a-z0-9_]{0,31}")


def place_in_mesh(
    given: Mapping[str, int] | DeviceMesh | None, environ: Mapping[str, str] = os.environ
) -> dict[str, int]:
    """Returns this process's place along each parallel dimension: from the argument, or else ``ESPER_PARALLEL``.

    Args:
        given: places by the name of the dimension, or a mesh of PyTorch with named dimensions, of which this process's
            coordinate is taken; nothing if it is not in the mesh.
        environ: the environment; the variable is like ``dp=3,tp=0``.

    Raises:
        InvalidValue: the argument is something else.
        ConfigurationError: the variable is something else.
    """
    if given is None:
        text = environ.get("ESPER_PARALLEL", "")
        try:
            pairs = [part.partition("=") for part in text.split(",") if part.strip()]
            return _checked_places({name.strip(): _whole(number) for name, _, number in pairs}, len(pairs))
        except ValueError as error:
            raise ConfigurationError(f"ESPER_PARALLEL={text!r} is not like dp=3,tp=0: {error}") from None
    names = getattr(given, "mesh_dim_names", None)
    places: Any = given
    if not isinstance(given, Mapping):
        if not names:
            raise InvalidValue(
                "parallel", f"{given!r} is neither places by name nor a mesh with names of its dimensions"
            )
        places = dict(zip(names, given.get_coordinate() or (), strict=False))
    try:
        return _checked_places(places, len(places))
    except ValueError as error:
        raise InvalidValue("parallel", f"{places!r}: {error}; give places such as {{'dp': 3, 'tp': 0}}") from None


def _whole(text: str) -> int | str:
    """Returns the number that a text states; the text itself if it is not a number."""
    return int(text) if text.strip().isdecimal() else text


def _checked_places(places: Mapping[Any, Any], count: int) -> dict[str, int]:
    """Returns the places; raises ValueError if one cannot be an attribute."""
    for name, number in places.items():
        if not isinstance(name, str) or not _DIMENSION.fullmatch(name):
            raise ValueError(f"{name!r} is not a name of at most 32 lower-case letters, digits and _")
        if type(number) is not int or not 0 <= number < _MOST_PLACE:
            raise ValueError(f"{name} = {number!r} is not a whole number from 0 on")
    if count > _MOST_DIMENSIONS or count != len(places):
        raise ValueError(f"more than {_MOST_DIMENSIONS} dimensions, or one of them twice")
    return dict(places)
