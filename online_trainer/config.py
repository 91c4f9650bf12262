"""How the trainer batches, tests, checkpoints and publishes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, get_args

from model.config import ROW_PRECISIONS, DeviceChoice, Precision, RowPrecision
from online_trainer.text_content import TextEncoding

LagPolicy = Literal["fall_behind", "larger_batches", "thin"]
LAG_POLICIES: Final[tuple[LagPolicy, ...]] = get_args(LagPolicy)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerConfig:
    """Settings of the online trainer."""

    batch_interactions: int = 128
    """New interactions of one step at most. Small batches follow the stream more closely."""
    batch_tokens: int = 16_384
    """History tokens of one step at most: bounds a step's time and memory when histories are long."""
    batch_wait_ms: int = 250
    """A step starts at the latest this long (ms) after its first interaction arrived."""
    max_pending_interactions: int = 20_000
    """Interactions read but not yet learned from; beyond it the trainer stops reading until it has caught up."""
    lag_policy: LagPolicy = "fall_behind"
    """What the trainer does while the stream outruns it. fall_behind: nothing, each interaction is learned from in its
    turn, however late; the only one under which a restart repeats what it did bit by bit. larger_batches: steps of
    lag_batch_interactions, which cost less an interaction and teach less. thin: all that waits but the newest
    batch_interactions is passed over and counted as thinned: in histories and trends, not tested, not learned from."""
    lag_interactions: int = 4_000
    """Interactions read but not yet learned from, from which on the trainer counts as behind."""
    lag_batch_interactions: int = 512
    """New interactions of one step at most while behind, under larger_batches; history tokens in proportion."""
    replay_share: float = 0.1
    """Share of what a step learns from that are older interactions in its users' histories, those of items that have
    not been learned for long above all; none while a change is rehearsed. 0: each interaction is learned from once."""
    poll_records: int = 16
    """Update messages taken per poll."""
    seed: int = 42
    """Seeds initial weights, dropout and sampled negatives."""
    device: DeviceChoice = "auto"
    """Where the encoder, its loss and the scores over the catalogue are computed. auto: on a CUDA device where there is
    one, else on the CPU. Items' rows and all that is kept of them stay in host memory."""
    precision: Precision = "auto"
    """Of the encoder; parameters, their gradients and the loss are float32 always. auto: bfloat16 on a CUDA device,
    float32 on the CPU. fp8: bfloat16, and the two matrix products of each HSTU layer in 8-bit floats, which takes a
    CUDA device of compute capability 8.9 or above. For wide models; not measured yet."""
    device_rows: RowPrecision = "float32"
    """Of item embeddings sent from host memory to a CUDA device: float32, or int8 or int4 as in row_precision, a
    quarter and an eighth of the bytes. What is learned stays float32; the device computes with the rounded rows."""
    num_threads: int = 1
    """CPU threads of the numerical library; 0 leaves its default."""
    metrics_window: int = 5_000
    """Evaluated interactions in the windowed prequential metrics."""
    baseline_half_life_h: float = 168.0
    """Half-life (hours) of the decayed popularity and co-occurrence that the model is compared with."""
    metrics_new_below: int = 5
    """An item or a user with fewer earlier interactions counts as new where metrics are split."""
    metrics_every_steps: int = 50
    """Every so many steps the metrics become rows of the metrics file."""
    keep_metrics_parts: int = 1_000
    """Part files of a run's metrics kept, of 100,000 values (about 0.7 MB) each, or of one stay of the trainer."""
    cooccurrence_items: int = 65_536
    """Items whose followers are counted for the co-occurrence baseline; 0.4 kB each. The longest unused make room."""
    cooccurrence_followers: int = 32
    """Followers counted of each item; the lightest makes room for a new one. 128 instead of 32: HR@10 +0.1 to 0.3 %."""
    spike_deviations: float = 8.0
    """A batch whose loss is so many standard deviations above what is typical of batches of its size is set aside, not
    learned from: see `headrace trainer inspect`. 0: only losses and gradients that are no finite numbers are."""
    max_spikes_in_a_row: int = 2
    """After so many such batches one after the other the stream has changed, and is learned from."""
    keep_set_aside: int = 100
    """Batches set aside that are kept on disk."""
    publish_interval_ms: int = 1_000
    """A snapshot is published at the latest this long (ms) after something was learned."""
    publish_interactions: int = 2_000
    """... or after this many interactions, whichever is first."""
    anchor_every: int = 60
    """Every n-th snapshot is an anchor (everything); those between are deltas on their parent."""
    row_precision: RowPrecision = "float32"
    """Of item embeddings in snapshots: float32, or int8 or int4 with a scale per row, a quarter and an eighth of the
    bytes. Training goes on in float32; workers answer by the rounded rows. A change begins with an anchor."""
    keep_anchors: int = 2
    """Anchors kept, with the deltas that follow them; older ones are deleted unless a replica or a pin needs them."""
    keep_publications_d: float = 7.0
    """How many days the database remembers what was published and who first answered with it, for `headrace trace` and
    `headrace freshness`; about 3 kB a snapshot. What is known of snapshots that are still stored stays."""
    replica_timeout_s: float = 60.0
    """A replica that has not said for this long (s) which version it runs is gone: nothing is kept for it any more."""
    gate_metric: str = "ndcg_at_20"
    """Windowed metric by which a snapshot is judged before it is published; larger is better."""
    gate_min_evaluated: int = 1_000
    """Interactions that the window must hold, unless it is full, to be judged by; until then only finiteness counts."""
    gate_baseline_min: float = 0.5
    """A snapshot is held back when its metric is below this share of popularity's on the same interactions; 0: never.
    Answers by popularity would then be better than its own."""
    gate_drop_max: float = 0.0
    """... or when it is this share below the best published lately (0.3: 30 %); 0: never. A stream that becomes harder
    to predict for everybody looks the same, so choose it for streams whose level you know."""
    gate_memory_s: float = 3_600.0
    """How long (s) a published level counts for `gate_drop_max`, and so how long it can hold back."""
    checkpoint_interval_s: float = 30.0
    """Time between checkpoints (s): what a crash makes the trainer repeat, bit by bit."""
    keep_checkpoints: int = 2
    """Checkpoints kept; a corrupt newest one falls back to the one before."""

    def __post_init__(self) -> None:
        for name in (
            "batch_interactions",
            "batch_tokens",
            "max_pending_interactions",
            "lag_interactions",
            "poll_records",
            "metrics_window",
            "metrics_new_below",
            "metrics_every_steps",
            "keep_metrics_parts",
            "cooccurrence_items",
            "cooccurrence_followers",
            "publish_interactions",
            "anchor_every",
            "keep_anchors",
            "keep_checkpoints",
            "keep_set_aside",
            "gate_min_evaluated",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"trainer.{name} = {getattr(self, name)}: must be at least 1")
        for name in ("batch_wait_ms", "publish_interval_ms", "num_threads", "spike_deviations", "max_spikes_in_a_row"):
            if getattr(self, name) < 0:
                raise ValueError(f"trainer.{name} = {getattr(self, name)}: must not be negative")
        self._check_lag()
        for name, choices in (
            ("device", get_args(DeviceChoice)),
            ("precision", get_args(Precision)),
            ("row_precision", ROW_PRECISIONS),
            ("device_rows", ROW_PRECISIONS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"trainer.{name} = {getattr(self, name)!r}: must be {' or '.join(choices)}")
        if not 0 <= self.replay_share <= 0.95:
            raise ValueError(f"trainer.replay_share = {self.replay_share}: must lie between 0 (off) and 0.95")
        if self.baseline_half_life_h <= 0 or self.checkpoint_interval_s <= 0:
            raise ValueError("trainer.baseline_half_life_h and trainer.checkpoint_interval_s must be positive")
        if not 0.05 <= self.keep_publications_d <= 36_500:
            raise ValueError(
                f"trainer.keep_publications_d = {self.keep_publications_d}: must lie in 0.05..36500 (days);"
                " freshness needs the last minutes"
            )
        if self.replica_timeout_s <= 0 or self.gate_memory_s <= 0:
            raise ValueError("trainer.replica_timeout_s and trainer.gate_memory_s must be positive")
        if self.gate_baseline_min < 0 or not 0 <= self.gate_drop_max < 1:
            raise ValueError(
                f"trainer.gate_baseline_min = {self.gate_baseline_min}, trainer.gate_drop_max = {self.gate_drop_max}: "
                "the first must not be negative, the second a share from 0 to below 1"
            )

    def _check_lag(self) -> None:
        if self.lag_policy not in LAG_POLICIES:
            raise ValueError(f"trainer.lag_policy = {self.lag_policy!r}: must be {' or '.join(LAG_POLICIES)}")
        if self.lag_policy == "fall_behind":
            return
        if not self.batch_interactions <= self.lag_interactions <= self.max_pending_interactions:
            raise ValueError(
                f"trainer.lag_interactions = {self.lag_interactions}: must lie between trainer.batch_interactions "
                f"({self.batch_interactions}) and trainer.max_pending_interactions ({self.max_pending_interactions}), "
                "beyond which nothing more is read"
            )
        if self.lag_policy == "larger_batches" and self.lag_batch_interactions < self.batch_interactions:
            raise ValueError(
                f"trainer.lag_batch_interactions = {self.lag_batch_interactions}: must be at least "
                f"trainer.batch_interactions ({self.batch_interactions})"
            )

    @property
    def batch_interactions_max(self) -> int:
        """Interactions that one step may learn from, also while the trainer is behind."""
        return self.lag_batch_interactions if self.lag_policy == "larger_batches" else self.batch_interactions


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemsConfig:
    """Which items get a row in the model, and when they lose it. model.max_items bounds how many there are."""

    min_interactions: int = 1
    """An item gets its row with this many interactions (up to 255); until then it is neither predicted nor learned.
    1: with the first. Counts of items without a row are approximate, and halved every 500,000 interactions."""
    admission_probability: float = 1.0
    """Chance that an interaction of an item without a row gets it one: items that are seen often pass soon, most that
    are seen once never. 1: always."""
    max_age_d: float = 0.0
    """Items without an interaction for this many days of event time lose their rows. 0: none do."""
    retired_share: float = 0.05
    """Share of model.max_items (upstream: of upstream.max_items) that loses its rows at once when a new item finds no
    room: those of the lowest decayed popularity."""

    content_items: int = 200_000
    """Items whose content (embedding or text, and categories, on the topic `items`; 0.26 kB each) is kept, the newest:
    where a new item's embedding starts is then learned from items with similar content. 0: content is not read."""
    text_encoder: TextEncoding = "ngrams"
    """What makes an embedding of title and text of an item that comes without one. ngrams: hashed words and parts of
    them. wordllama: the pip package of that name (`headrace[text]`, 33 MB), which knows what words mean; English above
    all. none: titles and texts are not read. After a change all items are read anew."""
    cold_items: int = 1_000
    """Items with content and without an interaction that have a row at the same time, so that they can be recommended;
    further ones get theirs with their first interaction. They are candidates everywhere, and take time like others."""

    def __post_init__(self) -> None:
        for name in ("content_items", "cold_items"):
            if not 0 <= getattr(self, name) <= 1 << 31:
                raise ValueError(f"items.{name} = {getattr(self, name)}: must be between 0 and {1 << 31}")
        if self.text_encoder not in get_args(TextEncoding):
            raise ValueError(
                f"items.text_encoder = {self.text_encoder!r}: must be {' or '.join(get_args(TextEncoding))}"
            )
        if not 1 <= self.min_interactions <= 255:
            raise ValueError(f"items.min_interactions = {self.min_interactions}: must be between 1 and 255")
        if not 0 < self.admission_probability <= 1:
            raise ValueError(f"items.admission_probability = {self.admission_probability}: must be above 0, at most 1")
        if not 0 <= self.max_age_d <= 36_500:
            raise ValueError(f"items.max_age_d = {self.max_age_d}: must be between 0 (off) and 36,500 days")
        if not 0 < self.retired_share <= 1:
            raise ValueError(f"items.retired_share = {self.retired_share}: must be above 0, at most 1")
