"""Models: loading, the one forward, grouped attention and the log-probability head."""

from ftlib.models.forward import Scorer, forward
from ftlib.models.scoring import Scored

__all__ = ["Scored", "Scorer", "forward"]
