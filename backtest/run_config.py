"""What a backtest runs: the `[backtest]` and `[arrivals]` tables of its configuration file. All other tables are those
of `headrace.toml`, since what runs is what runs live.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, Literal

from backtest.batch_trained import BatchTrainedArm
from backtest.durations import as_text, duration_ms, publish_interval_ms
from backtest.online_arms import OnlineArm
from backtest.run_files import ArmInfo, check_arm_name
from backtest.vector_gains import NEVER

ArmKind = Literal["online", "frozen", "retrained", "fine_tuned"]
Baseline = Literal["popularity", "cooccurrence", "item_knn", "river_mf"]

OVERRIDABLE: Final = ("model", "loss", "optimizer", "drift")
"""Tables that an arm may change for itself: how it learns, not what is asked of it."""
_SHARED: Final = (("model", "max_len"), ("loss", "action_weights"))
"""... but for these, which decide what is asked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ArmConfig:
    """One arm of a run: `[[backtest.arms]]`."""

    name: str
    """Names its folder: lower-case letters, digits, `.`, `_`, `-`."""
    kind: ArmKind = "online"
    """online: learns from every event, and answers with what it published last. frozen: as online until `at`, then
    never published again. retrained: trained from scratch on the last `window`, every `every`. fine_tuned: trained on
    by what came since, every `every`."""
    title: str = ""
    """For people; empty: made from the other settings."""
    publish_every: str = "batch"
    """Δ of an online arm: `batch`, a duration such as `10m`, or `never`: once, when evaluation begins."""
    weights_lag: str = "0s"
    """How long after a publication replicas have it."""
    histories_lag: str = "0s"
    """How long after its arrival an interaction is in the history that is read."""
    at: str = ""
    """When a frozen arm is published (RFC 3339); empty: when evaluation begins."""
    every: str = "1d"
    """How often a retrained or fine-tuned arm is trained; its weights are there at once, plus `weights_lag`."""
    window: str = "30d"
    """What a retrained arm is trained on: the interactions of so long before."""
    epochs: int = 1
    """Passes of a retrained or fine-tuned arm over its window."""
    users_per_step: int = 64
    """Users of one step of such a pass."""
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Settings of [model], [loss], [optimizer] and [drift] that differ, such as {model = {kind = "sasrec"}}. Arms with
    the same differences share one training."""

    def __post_init__(self) -> None:
        check_arm_name(self.name)
        publish_interval_ms(self.publish_every, f"arm {self.name}: publish_every")
        for name in ("weights_lag", "histories_lag", "every", "window"):
            duration_ms(getattr(self, name), f"arm {self.name}: {name}")
        if min(self.epochs, self.users_per_step, duration_ms(self.every, "every")) < 1:
            raise ValueError(
                f"arm {self.name}: epochs = {self.epochs}, users_per_step = {self.users_per_step}, "
                f"every = {self.every}: must be positive"
            )
        if self.at:
            self.at_ms()
        for table, values in self.settings.items():
            for key in values:
                if table not in OVERRIDABLE or (table, key) in _SHARED:
                    raise ValueError(
                        f"arm {self.name}: settings.{table}.{key} is the same for all arms of a run, which answer the "
                        f"same queries: set it for the run, or make another run"
                    )

    def at_ms(self) -> int | None:
        """`at` in epoch ms."""
        if not self.at:
            return None
        moment: datetime | None
        try:
            moment = datetime.fromisoformat(self.at)
        except ValueError:
            moment = None
        if moment is None or moment.tzinfo is None:
            raise ValueError(f"arm {self.name}: at = {self.at!r}: write RFC 3339 with an offset: 2017-10-05T12:00:00Z")
        return round(moment.timestamp() * 1000)

    def interval_ms(self) -> int | None:
        """Δ; None: once."""
        return None if self.kind == "frozen" else publish_interval_ms(self.publish_every, "publish_every")

    def online_arm(self) -> OnlineArm:
        """Of an online or frozen arm."""
        return OnlineArm(
            name=self.name,
            interval_ms=self.interval_ms(),
            weights_lag_ms=duration_ms(self.weights_lag, "weights_lag"),
            histories_lag_ms=duration_ms(self.histories_lag, "histories_lag"),
            starts_ms=self.at_ms(),
        )

    def batch_trained_arm(self) -> BatchTrainedArm:
        """Of a retrained or fine-tuned arm."""
        every_ms = duration_ms(self.every, "every")
        from_scratch = self.kind == "retrained"
        return BatchTrainedArm(
            name=self.name,
            from_scratch=from_scratch,
            every_ms=every_ms,
            window_ms=duration_ms(self.window, "window") if from_scratch else every_ms,
            epochs=self.epochs,
            users_per_step=self.users_per_step,
            weights_lag_ms=duration_ms(self.weights_lag, "weights_lag"),
            histories_lag_ms=duration_ms(self.histories_lag, "histories_lag"),
        )

    @property
    def learns_online(self) -> bool:
        """Whether it shows what an online training has published."""
        return self.kind in {"online", "frozen"}

    def info(self, ablation: str | None = None) -> ArmInfo:
        """For the run's manifest."""
        return ArmInfo(
            name=self.name,
            kind=self.kind,
            title=self.title or self._made_title(),
            settings={
                "every": self.every,
                "window": self.window,
                "epochs": self.epochs,
                "at": self.at,
                **self.settings,
            },
            publish_every_ms=self.interval_ms() if self.learns_online else duration_ms(self.every, "every"),
            weights_lag_ms=duration_ms(self.weights_lag, "weights_lag"),
            histories_lag_ms=duration_ms(self.histories_lag, "histories_lag"),
            ablation=ablation,
        )

    def _made_title(self) -> str:
        what = {
            "online": "Online, never published again"
            if self.publish_every == "never"
            else f"Online, published every {self.publish_every}",
            "frozen": f"Frozen at {self.at or 'the start of evaluation'}",
            "retrained": f"Retrained every {self.every} on {self.window}",
            "fine_tuned": f"Fine-tuned every {self.every}",
        }[self.kind]
        lags = [
            f"{name} {value} late"
            for name, value in (("weights", self.weights_lag), ("histories", self.histories_lag))
            if duration_ms(value, name)
        ]
        # First what tells it from others, because charts cut long names short.
        changed = [f"{table}.{key} = {value}" for table, own in self.settings.items() for key, value in own.items()]
        return ", ".join([*changed, f"{what[0].lower()}{what[1:]}" if changed else what, *lags])


@dataclass(frozen=True, kw_only=True, slots=True)
class BacktestConfig:
    """How a recorded log is replayed, and who is compared."""

    name: str = "backtest"
    """Of the run; names its folder unless --out does."""
    seeds: tuple[int, ...] = (42,)
    """One run for each, of weights and all that is drawn in training; of several, mean and spread are told."""
    limit: int = 0
    """Events replayed at most; 0: all."""
    warm_up_share: float = 0.1
    """Share of the events that is learned from before evaluation begins. Arms that publish once publish then."""
    poll_events: int = 262_144
    """Events of one commit to the store. Larger ones cost less an event, since the users of one commit are written
    once, and memory (some 700 bytes an event). Of what a run leaves, only the timeline's counts of late and refused
    events depend on it: they are as of the end of the commit."""
    batch_wait: str = "never"
    """Event time after which a batch is closed that is not full, since its first event; `never`: only full batches,
    as of a trainer that has something to do all the time."""
    checkpoint_events: int = 50_000
    """Accepted events between two checkpoints: what is repeated when a run was interrupted, and what is in one part of
    its tables."""
    keep_weights_every: str = "1d"
    """How often the first training's weights are kept on disk, for `headrace backtest at`; `never`: not at all."""
    timeline_every: str = "1h"
    """Event time between two looks at the catalogue."""
    sample_every: int = 16
    """Of every n-th stretch of 64 events the lists that each arm would have shown are kept."""
    late: str = "0s"
    """With late events: how long answers wait for events that happened before. Longer costs memory; what comes later
    still is answered by newer weights than it should be. 0s: the log is in event-time order, and nothing is late."""
    publish_every: tuple[str, ...] = ()
    """An online arm for each Δ: the freshness curve."""
    weights_lag: tuple[str, ...] = ()
    """An online arm published every batch for each delay of its weights."""
    histories_lag: tuple[str, ...] = ()
    """An online arm published every batch for each delay of the histories it reads."""
    vectors_lag: tuple[str, ...] = ("0s", "never")
    """Where users' vectors are computed (upstream_daemon.is_on): a ranker for each, trained beside the others, which
    gets vectors so long after they were computed; `never`, which must be the last: one that gets none. The first is
    that of the arms."""
    baselines: tuple[Baseline, ...] = ("popularity", "cooccurrence")
    """Arms that need no training."""
    arms: tuple[ArmConfig, ...] = ()
    """Further arms."""

    def __post_init__(self) -> None:
        for name in ("poll_events", "checkpoint_events", "sample_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"backtest.{name} = {getattr(self, name)}: must be at least 1")
        if self.limit < 0 or not 0 <= self.warm_up_share < 1:
            raise ValueError(
                f"backtest.limit = {self.limit}, backtest.warm_up_share = {self.warm_up_share}: the first must not be "
                "negative, the second a share from 0 to below 1"
            )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"backtest.seeds = {self.seeds}: name at least one, each once")
        for name in ("batch_wait", "keep_weights_every"):
            if getattr(self, name) != "never":
                duration_ms(getattr(self, name), f"backtest.{name}")
        for name in ("timeline_every", "late"):
            duration_ms(getattr(self, name), f"backtest.{name}")
        self._check_vectors_lag()
        names = [arm.name for arm, _ in self.all_arms()] + list(self.baselines)
        doubles = {name for name in names if names.count(name) > 1}
        if doubles:
            raise ValueError(f"backtest: arms named twice: {', '.join(sorted(doubles))}")
        if not self.all_arms():
            raise ValueError('backtest: no arm learns; name backtest.publish_every = ["batch"] or [[backtest.arms]]')

    def _check_vectors_lag(self) -> None:
        if not self.vectors_lag or len(set(self.vectors_lag)) < len(self.vectors_lag):
            raise ValueError(f"backtest.vectors_lag = {list(self.vectors_lag)}: name at least one, each once")
        if NEVER in self.vectors_lag[:-1]:
            raise ValueError(f"backtest.vectors_lag = {list(self.vectors_lag)}: {NEVER} must be the last")
        self.vector_lags_ms()

    def vector_lags_ms(self) -> tuple[int | None, ...]:
        """`vectors_lag` in ms; None: never."""
        return tuple(None if text == NEVER else duration_ms(text, "backtest.vectors_lag") for text in self.vectors_lag)

    def all_arms(self) -> list[tuple[ArmConfig, str | None]]:
        """Every arm that learns, with the curve that it is a point of."""
        found: list[tuple[ArmConfig, str | None]] = [
            (ArmConfig(name=f"online-{text}", publish_every=text), "publish_every") for text in self.publish_every
        ]
        for option, word in (("weights_lag", "weights"), ("histories_lag", "histories")):
            for text in getattr(self, option):
                lag = as_text(duration_ms(text, f"backtest.{option}"))
                found.append((ArmConfig(name=f"{word}-late-{lag}", **{option: text}), option))
        return [*found, *((arm, None) for arm in self.arms)]
