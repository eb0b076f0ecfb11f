"""Settings for training a network."""

from __future__ import annotations

from dataclasses import dataclass

from minecube.catalog.fields import check_field, need, need_name


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """All settings of a training, except network, sites and seed."""

    id: str
    title: str
    source: str = ""
    """Source of the values, and a note on inferred ones."""

    window_px: int | None = None
    """Side of the windows, a multiple of the card's `multiple_px`; None: the card's side."""
    step_px: int | None = None
    """None: random windows. Else a grid of windows at this spacing, each used once per epoch.

    The last window of a row ends at the border.
    """
    windows: int | None = None
    """Windows per epoch; None: enough to tile the training sites once per year, pair or series."""
    gaps: tuple[int, ...] = ()
    """Change only: years between the images of a pair; empty: all pairs."""
    rare: float = 0.0
    """Share of random windows placed over a pixel of the mapped classes.

    The others cover any known pixel.
    """
    turns: bool = True
    """Flip windows and turn them by quarters, at random."""
    jitter: float = 0.05
    """Standard deviation of random factors on reflectance, one per image and one per band."""
    year_dropout: float = 0.0
    """Series only: probability of removing a year's image while keeping its label."""

    epochs: int = 30
    batch: int = 16
    """Windows per step, over all processes."""
    optimiser: str = "adam"
    """adam or adamw."""
    learning_rate: float = 1e-3
    """The peak, if the schedule is one-cycle."""
    weight_decay: float = 0.0
    schedule: str = "one-cycle"
    """one-cycle (Smith and Topin 2019, arXiv:1708.07120) or constant."""
    positive_weight: float = 1.0
    """Weight of a positive pixel in the cross entropy. A negative pixel has weight 1."""
    focal: float = 0.0
    """Exponent of the focal loss (Lin et al. 2017, arXiv:1708.02002); 0: off.

    It reduces the weight of easy pixels.
    """
    dice: float = 0.0
    """Weight of the added Dice loss (Milletari et al. 2016, arXiv:1606.04797)."""
    bf16: tuple[str, ...] = ("cuda",)
    """Devices with automatic mixed precision in bfloat16 (torch.autocast)."""

    patience: int | None = None
    """Stop after so many epochs without a better F1 on the validation sites; None: never."""
    valid_windows: int | None = None
    """Validation windows scored after each epoch, a random choice made once; None: all."""

    def __post_init__(self) -> None:
        need_name(self.id)
        for name in ("window_px", "step_px", "windows", "epochs", "patience", "valid_windows"):
            value = getattr(self, name)
            check_field(value is None or value > 0, self, name, "1 or more")
        check_field(self.batch > 1, self, "batch", "2 or more (statistics over a batch need two)")
        need(min(self.gaps, default=1) > 0, "gaps", f"years above 0, found {list(self.gaps)}")
        check_field(0 <= self.rare <= 1, self, "rare", "a share of 0..1")
        check_field(0 <= self.year_dropout < 1, self, "year_dropout", "a share of 0..1, below 1")
        check_field(not (self.step_px and self.rare), self, "rare", "0 with step_px")
        check_field(0 <= self.jitter <= 0.2, self, "jitter", "0..0.2")
        is_known = self.optimiser in ("adam", "adamw")
        check_field(is_known, self, "optimiser", "adam or adamw")
        is_known = self.schedule in ("one-cycle", "constant")
        check_field(is_known, self, "schedule", "one-cycle or constant")
        for name in ("learning_rate", "positive_weight"):
            check_field(getattr(self, name) > 0, self, name, "above 0")
        for name in ("weight_decay", "focal", "dice"):
            check_field(getattr(self, name) >= 0, self, name, "0 or more")
        is_known = set(self.bf16) <= {"cpu", "cuda"}
        need(is_known, "bf16", f"some of cpu, cuda, found {', '.join(self.bf16)}")
