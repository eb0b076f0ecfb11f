"""Convert plain values, as in YAML and JSON, to the frozen values of the catalogue, and back."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import shapely
from shapely.geometry.base import BaseGeometry

from minecube.catalog.fields import FieldError, need
from minecube.catalog.model import ModelCard
from minecube.catalog.recipe import Recipe
from minecube.errors import CatalogError

T = TypeVar("T")

SET_BY_LOADER = "set by the loader"
"""Metadata of a field that no file may set."""
_LATER_FIELDS = ("date_excess",)
"""Fields missing in the first stores.

If unset, `as_dict` leaves them out, so the hashes of those stores stay valid.
"""


def as_dict(value: Any) -> dict[str, Any]:
    """Convert a catalogue value to plain JSON types, for provenance and hashing."""
    plain = _to_plain(dataclasses.asdict(value, dict_factory=_drop_unset))
    return typing.cast("dict[str, Any]", plain)


def _drop_unset(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in fields if name not in _LATER_FIELDS or value is not None}


def _to_plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _to_plain(element) for name, element in value.items()}
    if isinstance(value, list | tuple):
        return [_to_plain(element) for element in value]
    if isinstance(value, BaseGeometry):
        return shapely.to_wkt(value)
    return value


def rebuild_recipe(entry: Mapping[str, Any]) -> Recipe:
    """Rebuild a recipe from `as_dict`. Raises CatalogError if this version cannot read it."""
    try:
        return build(Recipe, entry)
    except ValueError as error:
        raise CatalogError(f"recipe {entry.get('id')!r}: {error}") from error


def rebuild_model_card(entry: Mapping[str, Any]) -> ModelCard:
    """Rebuild a model card from `as_dict`. Raises CatalogError if this version cannot read it."""
    try:
        return build(ModelCard, entry)
    except ValueError as error:
        raise CatalogError(f"model {entry.get('id')!r}: {error}") from error


def build(cls: type[T], entry: Mapping[str, Any]) -> T:
    """Build a value of a dataclass from its fields. Raises FieldError for a wrong field."""
    hints = typing.get_type_hints(cls)
    fields = {
        field.name: field
        for field in dataclasses.fields(cls)  # type: ignore[arg-type]
        if not field.metadata.get(SET_BY_LOADER)
    }
    for name in entry:
        need(name in fields, name, f"one of {', '.join(f for f in fields if f != 'id')}")
    for name in sorted(fields.keys() - entry.keys()):
        if _is_required(fields[name]):
            raise FieldError(f"field {name!r}: expected a value, found none")
    return cls(**{name: _convert(hints[name], value, name) for name, value in entry.items()})


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _convert(hint: Any, value: Any, field: str) -> Any:
    """Convert a plain value to the type of a field. Raises FieldError for another type."""
    if hint is Any:
        return value
    origin = typing.get_origin(hint)
    parts = typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _convert_optional(parts, value, field)
    if dataclasses.is_dataclass(hint):
        if type(value) is hint:  # built before, to give errors the place in its file
            return value
        name = getattr(hint, "__name__", "")
        need(isinstance(value, Mapping), field, f"fields of {name}, found {value!r}")
        return build(typing.cast("type[Any]", hint), value)
    if origin is tuple:
        is_list = isinstance(value, Sequence) and not isinstance(value, str)
        need(is_list, field, f"a list, found {value!r}")
        return tuple(_convert(parts[0], element, field) for element in value)
    if origin is not None and issubclass(origin, Mapping):
        need(isinstance(value, Mapping), field, f"names and values, found {value!r}")
        return {str(key): _convert(parts[1], element, field) for key, element in value.items()}
    accepted = int | float if hint is float else hint
    fits = isinstance(value, accepted) and (hint is bool or not isinstance(value, bool))
    need(fits, field, f"{hint.__name__}, found {value!r}")
    return hint(value)


def _convert_optional(parts: Sequence[Any], value: Any, field: str) -> Any:
    """Convert a value to the type that it has, or else to the first one. None stays None."""
    if value is None:
        return None
    kinds = [part for part in parts if part is not type(None)]
    fitting = [kind for kind in kinds if isinstance(kind, type) and isinstance(value, kind)]
    return _convert((fitting or kinds)[0], value, field)
