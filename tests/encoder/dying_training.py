"""Run the encoder's stage with one rank killed before a step of its first attempt: DYING=RANK:STEP."""

import os
import signal

from sidestack.encoder import train, trainer

RANK, STEP = (int(word) for word in os.environ["DYING"].split(":"))
original_take_step = trainer.Trainer._take_step


def take_step(self: trainer.Trainer, rows: trainer.TrainingRows) -> None:
    is_first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if is_first and self.world.rank == RANK and self.step == STEP:
        os.kill(os.getpid(), signal.SIGKILL)
    original_take_step(self, rows)


if __name__ == "__main__":
    trainer.Trainer._take_step = take_step  # type: ignore[method-assign]
    train.main()
