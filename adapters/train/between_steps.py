"""What happens between two steps: a look at the held-out loss, a checkpoint, a stop, early or asked for.

It knows nothing of how a step is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from adapters.errors import RunStopped
from adapters.train.adalora import has_settled
from adapters.train.config import TrainConfig
from adapters.train.evaluate import Losses
from adapters.train.journal import Evaluation, Journal
from adapters.train.schedule import due
from adapters.train.state import TrainingState
from adapters.train.stop import StopRequest


@dataclass(frozen=True)
class BetweenSteps:
    config: TrainConfig
    state: TrainingState
    journal: Journal
    evaluate: Callable[[], Losses]
    """Of the weights as they are."""
    save: Callable[[], None]
    """Make a checkpoint."""
    stop: StopRequest

    @property
    def ended(self) -> bool:
        patience = self.config.eval.early_stopping_patience
        return self.state.step == self.state.total or (patience is not None and self.state.fruitless >= patience)

    def after_step(self) -> None:
        """Raises RunStopped when somebody asked to stop; a checkpoint has been made then."""
        step, total = self.state.step, self.state.total
        if due(step, self.config.eval.eval_steps, total):
            found = self.evaluate()
            if has_settled(self.state.model, step):  # of ranks still to be taken away, a lower loss says nothing
                self.state.weigh(found.held_out)
            self.journal.evaluated(Evaluation(step, found.held_out, found.general))
        if self.stop.by or due(step, self.config.output.save_steps, total):
            self.save()
        if self.stop.by and not self.ended:
            raise RunStopped(
                f"stopped by {self.stop.by} after step {step} of {total}; a checkpoint is kept. Go on with "
                f"`loraplex train resume {self.config.output.output_dir}`, or with the command that began the run"
            )
