"""How a network is trained."""

from __future__ import annotations

from dataclasses import dataclass

from minecube.catalog.fields import need, need_name


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that decides on training but the network, the sites and the seed."""

    id: str
    title: str
    source: str = ""
    """Where the values come from, and which of them are inferred."""

    window_px: int | None = None
    """Side of the windows, a multiple of the card's `multiple_px`; None: the card's."""
    step_px: int | None = None
    """None: windows anywhere. Else all windows so far apart, the last of a row flush with the border, each once an epoch."""
    windows: int | None = None
    """An epoch has so many; None: as many as tile the training sites once in each year, pair of years, or series."""
    gaps: tuple[int, ...] = ()
    """Of a change task, years between the two of a pair; all pairs by default."""
    rare: float = 0.0
    """Share of the windows anywhere that are laid over a pixel of the mapped classes; the others over any known pixel."""
    turns: bool = True
    """Whether windows are flipped and turned by quarters, at random."""
    jitter: float = 0.05
    """Deviation of the factors by which reflectance is multiplied: one an image, and one a band of it."""
    year_dropout: float = 0.0
    """Of a series, how likely a year's image is taken away while its label stays."""

    epochs: int = 30
    batch: int = 16
    """Windows a step, of all processes together."""
    optimiser: str = "adam"
    """adam or adamw."""
    learning_rate: float = 1e-3
    """Its peak, where the schedule is one-cycle."""
    weight_decay: float = 0.0
    schedule: str = "one-cycle"
    """one-cycle (Smith and Topin 2019, arXiv:1708.07120) or constant."""
    positive_weight: float = 1.0
    """What a pixel of a class counts in the cross entropy, against 1 for one that is not of it."""
    focal: float = 0.0
    """Exponent by which the cross entropy of easy pixels is lessened (Lin et al. 2017, arXiv:1708.02002); 0: not at all."""
    dice: float = 0.0
    """Weight of the Dice loss (Milletari et al. 2016, arXiv:1606.04797), added to the cross entropy."""
    bf16: tuple[str, ...] = ("cuda",)
    """Devices on which the network computes in bfloat16 where torch holds that safe."""

    patience: int | None = None
    """Training stops after so many epochs without a better F1 on the validation sites; None: never."""
    valid_windows: int | None = None
    """Windows of the validation sites that are judged after each epoch, chosen once by chance; None: all."""

    def __post_init__(self) -> None:
        need_name(self.id)
        for name in ("window_px", "step_px", "windows", "epochs", "patience", "valid_windows"):
            value = getattr(self, name)
            need(value is None or value > 0, name, f"1 or more, found {value}")
        need(self.batch > 1, "batch", f"2 or more (statistics over a batch need two), found {self.batch}")
        need(min(self.gaps, default=1) > 0, "gaps", f"years above 0, found {list(self.gaps)}")
        need(0 <= self.rare <= 1, "rare", f"a share of 0..1, found {self.rare}")
        need(0 <= self.year_dropout < 1, "year_dropout", f"a share of 0..1, below 1, found {self.year_dropout}")
        need(not (self.step_px and self.rare), "rare", f"0 beside step_px, which takes each window once, found {self.rare}")
        need(0 <= self.jitter <= 0.2, "jitter", f"0..0.2, found {self.jitter}")
        need(self.optimiser in ("adam", "adamw"), "optimiser", f"adam or adamw, found {self.optimiser!r}")
        need(self.schedule in ("one-cycle", "constant"), "schedule", f"one-cycle or constant, found {self.schedule!r}")
        need(self.learning_rate > 0, "learning_rate", f"above 0, found {self.learning_rate}")
        need(self.positive_weight > 0, "positive_weight", f"above 0, found {self.positive_weight}")
        for name in ("weight_decay", "focal", "dice"):
            need(getattr(self, name) >= 0, name, f"0 or more, found {getattr(self, name)}")
        need(set(self.bf16) <= {"cpu", "cuda"}, "bf16", f"some of cpu, cuda, found {', '.join(self.bf16)}")
