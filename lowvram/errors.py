"""The error that a user can mend."""


class LowVRAMError(Exception):
    """A wrong value, file or setting: one sentence for what is wrong, with the value in it, and one for what to do.

    Commands print it without a traceback (unless `debug=true`) and exit with 2.
    """

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(problem, remedy)
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.problem}\n         {self.remedy}" if self.remedy else self.problem
