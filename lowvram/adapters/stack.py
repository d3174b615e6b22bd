"""LoRA files that are in a pipeline together, as they are in their files: nothing of them is trained."""

from collections.abc import Sequence

from torch import nn

from lowvram.adapters import lora_files
from lowvram.adapters.lora import Adapters
from lowvram.adapters.lora_files import LoraFile


class Stack:
    """Files, each counted by a scale of its own, in the order in which they were named.

    A UNet has them beside its weights (`add`), for 16-bit weights would lose part of the change; into text encoders,
    which read once, they are merged (`merge_into`).
    """

    def __init__(self, files: Sequence[LoraFile] = (), scales: Sequence[float] = ()) -> None:
        """scales: one for each file."""
        self.files = list(zip(files, scales, strict=True))
        self._added: list[Adapters] = []

    @property
    def parts(self) -> list[str]:
        """The parts of a pipeline that some file changes."""
        return list(dict.fromkeys(part for file, _ in self.files for part in file.parts))

    @property
    def text_parts(self) -> list[str]:
        """Those that read text."""
        return [part for part in self.parts if part != "unet"]

    def add(self, network: nn.Module, part: str, *, values: bool = True) -> None:
        """Put what the files have for a part into its network, frozen. values: see `lora_files.add_from_file`.

        Raises:
            LowVRAMError: a file is for another network.
        """
        for file, scale in self.files:
            if part in file.parts:
                adapters = lora_files.add_from_file(network, part, file, weight=scale, values=values)
                adapters.eval().requires_grad_(False)
                self._added.append(adapters)

    def merge(self) -> None:
        """Merge what `add` put into networks into their weights, for good."""
        while self._added:
            self._added.pop(0).merge(keep=False)

    def merge_into(self, network: nn.Module, part: str) -> None:
        """Add what the files have for a part to the weights of its network.

        Raises:
            LowVRAMError: as `add`.
        """
        for file, scale in self.files:
            if part in file.parts:
                lora_files.add_from_file(network, part, file, weight=scale).merge(keep=False)
