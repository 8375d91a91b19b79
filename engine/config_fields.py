"""Reading fields of a file that somebody else wrote: typed, bounded, refused in one line that names file and field."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NoReturn

from pdmesh.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Fields:
    """The fields of one JSON object or of GGUF metadata.

    A field that is absent or null takes the default; without a default (None) it must be there.

    Attributes:
        where: The file, as error messages name it.
        values: What it says.
        prefix: Put before field names in messages, e.g. "rope_parameters.".
        names: Fields that may be called otherwise: the name by which they are asked for to others, which go before it.
    """

    where: str
    values: Mapping[str, object]
    prefix: str = ""
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def has(self, name: str) -> bool:
        return self.value(name) is not None

    def value(self, name: str) -> object:
        """What the file says; None: nothing."""
        return self.values.get(self._own(name))

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.refuse(name, f"must be an integer in [{low}, {high}]")
        return value

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float:
        """A finite number in [low, high]."""
        value = self._get(name, default)
        # NaN is in no range; an integer may be too large for a float.
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            self.refuse(name, f"must be a number in [{low:g}, {high:g}]")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            self.refuse(name, "must be true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self._get(name, default)
        if not isinstance(value, str):
            self.refuse(name, "must be a string")
        return value

    def group(self, name: str) -> "Fields | None":
        """The fields of a nested object; None where there is none."""
        value = self.value(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.refuse(name, "must be an object")
        return Fields(self.where, value, f"{self.prefix}{self._own(name)}.")

    def under(self, prefix: str) -> "Fields":
        """Those whose names begin with `prefix`, by the rest of their names."""
        values = {name.removeprefix(prefix): value for name, value in self.values.items() if name.startswith(prefix)}
        return Fields(self.where, values, f"{self.prefix}{prefix}")

    def refuse(self, name: str, rule: str) -> NoReturn:
        """Raises ConfigError: the field's value breaks `rule`."""
        shown = repr(self.value(name))
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        raise ConfigError(f"{self.where}: {self.prefix}{self._own(name)} is {shown}: {rule}")

    def _get(self, name: str, default: object) -> object:
        value = self.value(name)
        value = default if value is None else value
        if value is None:
            raise ConfigError(
                f"{self.where}: {self.prefix}{self._own(name)} is missing: the file is incomplete, get it anew"
            )
        return value

    def _own(self, name: str) -> str:
        """What the file calls it; what it would, where it is not there."""
        names = (*self.names.get(name, ()), name)
        return next((own for own in names if self.values.get(own) is not None), names[0])
