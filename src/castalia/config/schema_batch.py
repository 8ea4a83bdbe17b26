"""The section `batch_controller`: a batch that grows along the critical batch size while the run goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from castalia.config.section import Section, setting

if TYPE_CHECKING:
    from castalia.config.schema import DataConfig, LoggingConfig, TrainingConfig


class BatchControllerConfig(Section):
    """The batch grows to training.batch_size by what the gradient noise scale says, and never shrinks."""

    start: int | None = setting(
        None, "sequences per step at first; null: no controller, training.batch_size throughout", unit="sequences", ge=1
    )
    factor: int = setting(2, "by how much the batch is multiplied at a time", ge=2)
    fraction: float = setting(
        1.0, "of the noise scale's lower end: the batch grows once the larger one is no more than this", gt=0
    )
    min_tokens: int = setting(0, "tokens between two changes, at least", unit="tokens", ge=0)

    def check(self, training: TrainingConfig, logging: LoggingConfig, data: DataConfig) -> None:
        """Refuse what does not go together with it.

        Raises:
            ValueError: in the words of a validator.
        """
        if self.start is None:
            if self != type(self)():
                raise ValueError("batch_controller needs batch_controller.start, the batch at first: give it too")
            return
        for key, there in (
            ("training.batch_ramp_start", training.batch_ramp_start is not None),
            ("data.curriculum", data.curriculum != "none"),
            ("training.tokens", training.tokens is not None and training.steps is None),
        ):
            if there:
                raise ValueError(f"batch_controller.start and {key} do not go together: leave one of them out")
        if not logging.noise_scale:
            raise ValueError("batch_controller.start follows the gradient noise scale: set logging.noise_scale=true")
        if self.start >= training.batch_size:
            raise ValueError(
                f"batch_controller.start {self.start} must be below training.batch_size {training.batch_size}, to "
                "which the batch grows"
            )
        micro = training.micro_batch_size
        if micro is None or self.start % micro:
            raise ValueError(
                f"batch_controller.start {self.start} must be a multiple of training.micro_batch_size, which must be "
                "given"
            )
