"""What counts as drift, and what the trainer does about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, get_args

Reaction = Literal["alert", "boost", "rehearse", "replay", "hold", "rollback"]
REACTIONS: Final[tuple[Reaction, ...]] = get_args(Reaction)
DETECTORS: Final = ("adwin", "page_hinkley")
SIGNALS: Final = ("loss", "calibration")


@dataclass(frozen=True, kw_only=True, slots=True)
class DriftConfig:
    """Drift detection on the prequential signals, and the reactions of each detector.

    A detector is on if it has a reaction: `alert` (only the record of the decision, which every reaction makes too),
    `boost` (higher learning rates), `rehearse` (more steps per batch, on what its users did since), `replay` (another
    replay share), `hold` (nothing is published for a while) and `rollback` (weights go back to those of some time ago).
    """

    adwin_loss: tuple[Reaction, ...] = ("alert",)
    """Reactions when ADWIN finds that the loss has risen; none: the detector is off."""
    adwin_calibration: tuple[Reaction, ...] = ("alert",)
    """... that the model has become too sure of itself."""
    page_hinkley_loss: tuple[Reaction, ...] = ("rehearse",)
    """Reactions when Page-Hinkley finds that the loss has risen."""
    page_hinkley_calibration: tuple[Reaction, ...] = ()
    """... that the model has become too sure of itself."""
    adwin_delta: float = 0.002
    """Chance of a false alarm that ADWIN allows in one look at its window."""
    page_hinkley_delta: float = 0.05
    """Rise of a signal's mean that Page-Hinkley tolerates. A loss is in units of the loss of guessing."""
    page_hinkley_threshold: float = 15.0
    """What rises above that must add up to: more means fewer false alarms and a later alarm."""
    warm_up_interactions: int = 2_000
    """Interactions tested before the first decision."""
    boost_row_factor: float = 5.0
    """The learning rate of item rows is multiplied by this when a boost begins."""
    boost_dense_factor: float = 1.0
    """... that of the dense parameters."""
    boost_interactions: int = 3_000
    """Interactions after which learning rates are what they were. A boost under way is not begun again."""
    boost_cool_down: Literal["exponential", "linear"] = "exponential"
    """How the factor falls back to 1 meanwhile."""
    rehearse_steps: int = 3
    """Steps that `rehearse` adds to each: on the same histories, at every position that is newer than the decision.
    Each costs as much as an ordinary one without its test."""
    rehearse_interactions: int = 4_000
    """Interactions for which `rehearse` is in force."""
    replay_share: float = 0.0
    """Replay share while `replay` is in force: what was learned before the drift may be wrong now."""
    replay_interactions: int = 10_000
    """Interactions for which `replay` is in force."""
    hold_return: float = 0.5
    """Share of the rise that the signal has to lose before `hold` ends."""
    hold_max_s: float = 600.0
    """`hold` ends at the latest after so much event time (s)."""
    rollback_interval: int = 5_000
    """Interactions between two copies of the weights, kept in memory if there is a `rollback`: it goes back to the last
    but one, since the last may be from between a change and its detection."""
    decisions_kept: int = 100
    """Newest decisions kept in checkpoints."""

    def __post_init__(self) -> None:
        for key in detector_keys():
            reactions = getattr(self, key)
            if unknown := set(reactions) - set(REACTIONS):
                raise ValueError(f"drift.{key} holds {min(unknown)!r}: known are {', '.join(REACTIONS)}")
        if self.boost_cool_down not in {"exponential", "linear"}:
            raise ValueError(f"drift.boost_cool_down = {self.boost_cool_down!r}: must be exponential or linear")
        for name, low, high in (
            ("adwin_delta", 1e-12, 0.5),
            ("page_hinkley_delta", 0.0, 10.0),
            ("page_hinkley_threshold", 1e-9, 1e9),
            ("warm_up_interactions", 0, 1 << 40),
            ("boost_row_factor", 1.0, 100.0),
            ("boost_dense_factor", 1.0, 100.0),
            ("boost_interactions", 1, 1 << 40),
            ("rehearse_steps", 1, 100),
            ("rehearse_interactions", 1, 1 << 40),
            ("replay_share", 0.0, 0.95),
            ("replay_interactions", 1, 1 << 40),
            ("hold_return", 0.0, 1.0),
            ("hold_max_s", 0.0, 1e9),
            ("rollback_interval", 1, 1 << 40),
            ("decisions_kept", 1, 10_000),
        ):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"drift.{name} = {getattr(self, name)}: must lie between {low:g} and {high:g}")

    def reactions(self, key: str) -> tuple[Reaction, ...]:
        """Reactions of `<detector>_<signal>`."""
        found: tuple[Reaction, ...] = getattr(self, key)
        return found

    def rolls_back(self) -> bool:
        """Whether any detector may ask for weights of some time ago."""
        return any("rollback" in self.reactions(key) for key in detector_keys())


def detector_keys() -> list[str]:
    """`<detector>_<signal>` of every detector there is."""
    return [f"{detector}_{signal}" for detector in DETECTORS for signal in SIGNALS]
