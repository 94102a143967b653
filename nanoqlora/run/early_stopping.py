"""When a run ends before its last step, and which evaluation was the best."""

import math
from dataclasses import dataclass

from ..config.schema import Config


@dataclass
class Progress:
    """What early stopping and the best evaluation depend on: a part of every checkpoint."""

    best_step: int = 0  # the first step of the lowest held-out loss; 0: none was evaluated
    best_loss: float = math.nan
    since_best: int = 0  # evaluations after that one
    high: int = 0  # logged losses in a row above the watchdog's threshold

    def evaluated(self, step: int, loss: float) -> None:
        """Held-out loss after `step`; the one before the first step does not count."""
        if step and not loss >= self.best_loss and not (self.best_step and math.isnan(loss)):
            self.best_step, self.best_loss, self.since_best = step, loss, 0
        else:
            self.since_best += step > 0

    def logged(self, loss: float, threshold: float | None) -> None:
        self.high = self.high + 1 if threshold and loss > threshold else 0

    def reason_to_stop(self, config: Config) -> str:
        """Why to end before the last step, in words; empty: continue."""
        patience = config.early_stopping_patience
        if patience and self.since_best >= patience:
            return f"{self.since_best} evaluations without a better one than after step {self.best_step}"
        threshold = config.loss_watchdog_threshold
        if threshold and self.high >= config.loss_watchdog_patience:
            return f"the loss was above loss_watchdog_threshold {threshold} {self.high} times in a row"
        return ""
