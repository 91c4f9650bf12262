"""Which column of a recorded log holds what, and in which unit: what a person has to say about a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, get_args

TimeUnit = Literal["s", "ms", "us", "ns", "text"]
IdKind = Literal["integer", "text"]
TIME_UNITS: Final[tuple[TimeUnit, ...]] = get_args(TimeUnit)


@dataclass(frozen=True, kw_only=True, slots=True)
class ColumnMapping:
    """The columns of a recorded log, by name."""

    user: str = "user_id"
    """User id: integer ≥ 0, or text of at most 256 characters."""
    item: str = "item_id"
    """Item id, likewise."""
    time: str = "event_time"
    """Event time, in `time_unit`."""
    time_unit: TimeUnit | None = None
    """`s`, `ms`, `us` or `ns` since 1970, or `text`: RFC 3339, or as `time_format` says. None is enough for
    date-time columns and RFC 3339; numbers are refused with the unit that they look like: nothing is guessed."""
    time_format: str | None = None
    """How times are written (strptime), taken as UTC where it names no offset; None: RFC 3339 with an offset."""
    relative_time: bool = False
    """Times count from an origin of their own, not from 1970: whether they are plausible dates is not asked."""
    arrival: str | None = None
    """When the event arrived at the log, in `time_unit`. It is the order of the recording, so late events come late."""
    value: str | None = None
    """Number that comes with the event: a rating, watch seconds."""
    value_scale: float = 1.0
    """What a value is multiplied by: 0.001 makes seconds of milliseconds."""
    surface: str | None = None
    """Where it happened: what producers send under `events.surface_key`. Texts or whole numbers."""
    event_id: str | None = None
    """Identity of an event; without it the row number is the identity."""
    action: str | None = None
    """Column of the action; None: every event is `default_action`."""
    default_action: str = "rating"
    """Action of every event, and of those without one."""
    actions: Mapping[str, str] = field(default_factory=dict)
    """What the file calls an action → what headrace calls it; others keep their names."""
    user_ids: IdKind | None = None
    """`integer` or `text`; None: as the file types them, a text file by its first rows."""
    item_ids: IdKind | None = None

    def __post_init__(self) -> None:
        if self.time_unit is not None and self.time_unit not in TIME_UNITS:
            raise ValueError(f"time_unit = {self.time_unit}: one of {', '.join(TIME_UNITS)}")
        if self.time_format is not None and self.time_unit not in {None, "text"}:
            raise ValueError(f"time_format is for times written as text, and time_unit is {self.time_unit}")
        for name in ("user_ids", "item_ids"):
            if getattr(self, name) not in {None, "integer", "text"}:
                raise ValueError(f"{name} = {getattr(self, name)}: integer or text")
        if not 0 < abs(self.value_scale) < float("inf"):
            raise ValueError(f"value_scale = {self.value_scale}: a finite number other than 0")

    @property
    def wanted(self) -> tuple[str, ...]:
        """The columns that are read, each once."""
        named = (self.user, self.item, self.time, self.arrival, self.value, self.surface, self.event_id, self.action)
        return tuple(dict.fromkeys(name for name in named if name is not None))
