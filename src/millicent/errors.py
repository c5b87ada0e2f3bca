"""The exceptions that a user, a file or a machine can cause. Each says what was found, what was wanted, and what to do.

    MillicentError                     1
    |-- InputError                     10   what was asked for
    |   |-- NotAnImageError            11   the file is no picture that we read
    |   |-- TruncatedImageError        12   the picture ends too early
    |   |-- ImageTooLargeError         13   more pixels than the cap, refused from the header
    |   |-- EmptyPromptError           14
    |   |-- PromptTooLongError         15   beyond the encoder's limit
    |   |-- SizeError                  16   an output size that no model can draw
    |   |-- ScheduleError              17   steps or sigmas that are no schedule
    |   |-- InputNotFoundError         18   the input file is not there
    |   `-- UnknownGpuError,           19   a card's name that our table does not have, or has several times
    |       AmbiguousGpuError               (facts/gpus.py)
    |-- OutputError                    20   the result cannot be written
    |-- CheckpointError                30   weights that cannot be trusted
    |   |-- ModelNotFoundError         31   no such folder or name
    |   |-- IncompleteModelError       32   parts of the folder are missing
    |   `-- WeightsMismatchError       33   tensors are missing, left over or of another shape
    `-- MachineError                   40   what this machine lacks
        `-- MissingExtraError          41   an optional dependency is not installed

The numbers are the exit codes of the command line; 2 is left to usage errors and 130 to Ctrl-C.
"""


class MillicentError(Exception):
    """Shown to the user as one line: `message` says what was found and what was wanted, `fix` what to do."""

    exit_code = 1

    def __init__(self, message: str, fix: str) -> None:
        super().__init__(f"{message} {fix}")
        self.message = message
        self.fix = fix


class InputError(MillicentError):
    exit_code = 10


class NotAnImageError(InputError):
    exit_code = 11


class TruncatedImageError(InputError):
    exit_code = 12


class ImageTooLargeError(InputError):
    exit_code = 13


class EmptyPromptError(InputError):
    exit_code = 14


class PromptTooLongError(InputError):
    exit_code = 15


class SizeError(InputError):
    exit_code = 16


class ScheduleError(InputError):
    exit_code = 17


class InputNotFoundError(InputError):
    exit_code = 18


class OutputError(MillicentError):
    exit_code = 20


class CheckpointError(MillicentError):
    exit_code = 30


class ModelNotFoundError(CheckpointError):
    exit_code = 31


class IncompleteModelError(CheckpointError):
    exit_code = 32


class WeightsMismatchError(CheckpointError):
    exit_code = 33


class MachineError(MillicentError):
    exit_code = 40


class MissingExtraError(MachineError):
    exit_code = 41
