"""Published Stable Diffusion 1.x, 2.x and XL: a folder as diffusers writes it, or one .safetensors or .ckpt file.

Whichever way the files lie, parts, configurations and tensors have the folder's names. Tensors are read one at a time.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowvram.errors import LowVRAMError
from lowvram.weights import clip_vocabulary, pipeline_folder, pipeline_parts, pipeline_shapes
from lowvram.weights.pipeline_keys import Piece
from lowvram.weights.pipeline_parts import PARTS
from lowvram.weights.tensor_file import TensorFile, files_of, finite

__all__ = ["PARTS", "Pipeline", "open_pipeline"]

PREDICTIONS = ("epsilon", "v_prediction")
_OTHER_NOISE = ("EDM", "FlowMatch")  # of schedulers' class names
_OTHER_NOISE_KEYS = ("edm_mean", "edm_vpred.sigma_max")  # the like, in a single file
_REMEDY = (
    "Give a folder with model_index.json, unet/, vae/, text_encoder/ and tokenizer/ as diffusers writes it, or one "
    ".safetensors or .ckpt with all of Stable Diffusion 1.x, 2.x or XL."
)
_WHOLE = "Download the missing files, or use a whole pipeline."


def open_pipeline(path: str | Path, *, prediction_type: str | None = None) -> "Pipeline":
    """Open a pipeline, of which nothing but names and shapes is read.

    path: a folder, also one of the Hub's cache; or a .safetensors or .ckpt file.
    prediction_type: "epsilon" or "v_prediction"; None: as the scheduler of the folder says, or for a single file by
        the rule of `pipeline_shapes.prediction`, which may be wrong for Stable Diffusion 2.x.

    Raises:
        LowVRAMError: it is no such pipeline, or damaged.
    """
    path = Path(path).expanduser()
    if prediction_type not in (None, *PREDICTIONS):
        raise LowVRAMError(
            f"prediction_type={prediction_type!r} is not known.", f"Use one of {', '.join(PREDICTIONS)}."
        )
    if not path.exists() and not path.is_symlink():
        where = "" if path.is_absolute() else f" (looked in {Path.cwd()})"
        raise LowVRAMError(f"weights={path} does not exist{where}.", _REMEDY)
    if path.is_dir():
        return _Folder(path, prediction_type)
    return _SingleFile(path, prediction_type)


class Pipeline(ABC):
    """A published pipeline. Made by `open_pipeline`.

    path: as given. family: "sd1", "sd2" or "sdxl". layout: "folder" or "single_file". parts: those of PARTS it has.

    Methods raise LowVRAMError for a part that it lacks, and for a file that is damaged.
    """

    path: Path
    family: str
    layout: str
    parts: tuple[str, ...]

    def __init__(self, path: Path, prediction_type: str | None) -> None:
        self.path = path
        self._prediction_type = prediction_type
        self._pieces: dict[str, dict[str, Piece]] = {}

    def config(self, part: str) -> dict[str, Any]:
        """The content of a part's config.json, or with "scheduler" of scheduler_config.json."""
        if part != "scheduler":
            self._check_part(part)
            return self._config(part)
        config = self._scheduler()
        if any(kind in str(config.get("_class_name")) for kind in _OTHER_NOISE):
            raise LowVRAMError(
                f"weights={self.path} has a {config['_class_name']}: it was trained with another kind of noise.",
                _REMEDY,
            )
        return config | ({"prediction_type": self._prediction_type} if self._prediction_type else {})

    @abstractmethod
    def index(self) -> dict[str, Any]:
        """The content of model_index.json: class names of the pipeline and its components, and its own settings."""

    def names(self, part: str) -> tuple[str, ...]:
        """Names of a part's tensors. Those of text encoders begin with text_model., but for a projection."""
        return tuple(self.pieces(part))

    def shape(self, part: str, name: str) -> tuple[int, ...]:
        """A tensor's shape. Raises KeyError for a name that is not there."""
        piece = self.pieces(part)[name]
        return piece.shape(self.file(part).shape(piece.key))

    def dtype(self, part: str, name: str) -> torch.dtype:
        """A tensor's type in the file. Raises KeyError for a name that is not there."""
        return self.file(part).dtype(self.pieces(part)[name].key)

    def tensor(self, part: str, name: str) -> Tensor:
        """A tensor by the folder's layout, read now, in CPU memory of its own. Raises KeyError for an unknown name."""
        piece = self.pieces(part)[name]
        return piece.take(self.file(part).read(piece.key))

    @torch.no_grad()
    def load(self, part: str, network: nn.Module, *, dtype: torch.dtype | None = None) -> None:
        """Copy a part's tensors into a network, one after the other: host memory stays under network and one tensor.

        network: its state dict has the part's names; those of text encoders with or without text_model. Tensors on
            the meta device are replaced by new ones on the CPU, in the network's type.
        dtype: what the network's floating-point tensors are brought to first.

        Raises:
            LowVRAMError: tensors are missing, unexpected or of another shape (nothing was changed), or hold NaN or
                infinity (some were).
        """
        if dtype is not None:
            network.to(dtype)
        own = self._targets(part, network)
        self._check(part, own)
        for name, (key, target) in own.items():
            _place(network, key, target, self._finite(part, name))  # no name here for it: the next would find it held

    def tokenizer(self, part: str) -> Path:
        """A folder with the tokenizer's files of a text encoder; of a single file the shipped one."""
        self._check_part(part)
        if part not in ("text_encoder", "text_encoder_2"):
            raise ValueError(f"{part} has no tokenizer")
        plain = self.family != "sd2" and part == "text_encoder"
        return clip_vocabulary.folder(pad="<|endoftext|>" if plain else "!")

    def pieces(self, part: str) -> dict[str, Piece]:
        """Where each of a part's tensors lies in its file."""
        self._check_part(part)
        if part not in self._pieces:
            self._pieces[part] = self._find_pieces(part)
        return self._pieces[part]

    @abstractmethod
    def file(self, part: str) -> TensorFile:
        """The file that a part's tensors are in."""

    @abstractmethod
    def files(self) -> list[Path]:
        """Those that the tensors of its parts are read from, and no other that lies beside them: nothing is opened."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the files."""

    @abstractmethod
    def _config(self, part: str) -> dict[str, Any]: ...

    @abstractmethod
    def _scheduler(self) -> dict[str, Any]: ...

    @abstractmethod
    def _find_pieces(self, part: str) -> dict[str, Piece]: ...

    def _finite(self, part: str, name: str) -> Tensor:
        piece, file = self.pieces(part)[name], self.file(part)
        return piece.take(finite(file.path, piece.key, file.read(piece.key)))

    def _check_part(self, part: str) -> None:
        if part not in PARTS:
            raise ValueError(f"{part!r} is none of {', '.join(PARTS)}")
        if part not in self.parts:
            raise LowVRAMError(f"weights={self.path} has no {part}, only {', '.join(self.parts)}.", _WHOLE)

    def _targets(self, part: str, network: nn.Module) -> dict[str, tuple[str, Tensor]]:
        """A network's tensors by the part's names, with the name that the network has for each."""
        state = network.state_dict(keep_vars=True)
        return {
            pipeline_parts.full_name(part, key): (key, tensor)
            for key, tensor in state.items()
            if not key.endswith("position_ids")
        }

    def _check(self, part: str, own: Mapping[str, tuple[str, Tensor]]) -> None:
        """Raise LowVRAMError unless names and shapes are those of the network."""
        pieces = self.pieces(part)
        missing = [name for name in own if name not in pieces]
        unexpected = [name for name in pieces if name not in own]
        wrong = [f"{name} is missing{_nearest(name, unexpected)}" for name in missing[:5]]
        wrong += [f"{pieces[name].key} has no place here{_nearest(name, missing)}" for name in unexpected[:5]]
        count = len(missing) + len(unexpected)
        for name in (name for name in own if name in pieces):
            shape, wanted = self.shape(part, name), tuple(own[name][1].shape)
            if shape != wanted:
                wrong.append(f"{pieces[name].key} has shape {list(shape)}, not {list(wanted)}")
                count += 1
        if wrong:
            more = f"; and {count - 5} more" if count > 5 else ""
            raise LowVRAMError(
                f"{self.file(part).path} does not fit the {part}: {'; '.join(wrong[:5])}{more}.",
                "Use the weights and the configuration of one pipeline of Stable Diffusion 1.x, 2.x or XL.",
            )


class _Folder(Pipeline):
    """A pipeline as diffusers writes it."""

    layout = "folder"

    def __init__(self, path: Path, prediction_type: str | None) -> None:
        super().__init__(path, prediction_type)
        self.root = pipeline_folder.snapshot(path)
        self._index = pipeline_folder.read_index(self.root)
        self._files: dict[str, TensorFile] = {}
        present = [part for part in PARTS if (self.root / part / "config.json").is_file()]
        self.parts = tuple(part for part in present if self._index.get(part, [""]) != [None, None])
        if "unet" not in self.parts:
            kind = self._index.get("_class_name", "nothing that is known")
            raise LowVRAMError(f"weights={path} has no unet/config.json: its model_index.json is of {kind}.", _REMEDY)
        self.family = self._find_family()

    def index(self) -> dict[str, Any]:
        """The content of model_index.json, or where there is none what it would be."""
        return dict(self._index) or pipeline_folder.default_index(self.config, self.family, self.parts)

    def file(self, part: str) -> TensorFile:
        """The file that a part's tensors are in."""
        if part not in self._files:
            self._files[part] = TensorFile.open(pipeline_folder.weights_file(self.root / part))
        return self._files[part]

    def files(self) -> list[Path]:
        """Those that the parts' tensors are read from."""
        chosen = (pipeline_folder.weights_file(self.root / part) for part in self.parts)
        return [file for path in chosen for file in files_of(path)]

    def tokenizer(self, part: str) -> Path:
        """The folder of the tokenizer; if it is missing, and the vocabulary is CLIP's, of the shipped one."""
        shipped = super().tokenizer
        folder = self.root / part.replace("text_encoder", "tokenizer")
        if any((folder / name).is_file() for name in ("vocab.json", "tokenizer.json")):
            return folder
        if self.config(part).get("vocab_size", 49408) == 49408:
            return shipped(part)
        raise LowVRAMError(f"weights={self.path} has no {folder.name}/vocab.json.", _WHOLE)

    def close(self) -> None:
        """Let go of the files."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _config(self, part: str) -> dict[str, Any]:
        return pipeline_folder.read_json(self.root / part / "config.json")

    def _scheduler(self) -> dict[str, Any]:
        path = self.root / "scheduler" / "scheduler_config.json"
        return (
            pipeline_folder.read_json(path) if path.is_file() else pipeline_shapes.published(self.family)["scheduler"]
        )

    def _find_pieces(self, part: str) -> dict[str, Piece]:
        file = self.file(part)
        return pipeline_parts.in_folder(file.path, part, file.names)

    def _find_family(self) -> str:
        unet = self.config("unet")
        if unet.get("_class_name", "UNet2DConditionModel") != "UNet2DConditionModel":
            raise LowVRAMError(f"weights={self.path} has a {unet['_class_name']} in unet/.", _REMEDY)
        if self._index.get("requires_aesthetics_score"):
            raise LowVRAMError(f"weights={self.path} is SDXL's refiner.", "Use the base model.")
        if unet.get("addition_embed_type") == "text_time":
            return "sdxl"
        if "text_encoder" in self.parts:
            return "sd1" if self.config("text_encoder").get("hidden_act", "quick_gelu") == "quick_gelu" else "sd2"
        return "sd2" if unet.get("use_linear_projection") else "sd1"


class _SingleFile(Pipeline):
    """All parts in one file, by the keys of the networks as first published.

    Where the file has a second UNet, the average of the first (model_ema.), the first is taken.
    """

    layout = "single_file"

    def __init__(self, path: Path, prediction_type: str | None) -> None:
        super().__init__(path, prediction_type)
        self._file = TensorFile.open(path)
        self._shapes = {name: self._file.shape(name) for name in self._file.names}
        try:
            self.family = _family_of_keys(path, self._shapes)
        except LowVRAMError:
            self.close()
            raise
        prefixes = pipeline_parts.PREFIXES[self.family]
        self.parts = tuple(
            part for part in PARTS if part in prefixes and any(key.startswith(prefixes[part]) for key in self._shapes)
        )

    def index(self) -> dict[str, Any]:
        """What model_index.json says of such a pipeline."""
        return pipeline_folder.default_index(self.config, self.family, self.parts)

    def file(self, part: str) -> TensorFile:
        """The file."""
        return self._file

    def files(self) -> list[Path]:
        """The file."""
        return [self.path]

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    @cached_property
    def _configs(self) -> dict[str, dict[str, Any]]:
        shapes = {
            part: pipeline_shapes.Shapes(self.path, part, {name: self.shape(part, name) for name in self.pieces(part)})
            for part in self.parts
        }
        out: dict[str, dict[str, Any]] = {}
        for part in ("text_encoder", "text_encoder_2", "vae"):
            if part in shapes:
                is_text = part != "vae"
                found = pipeline_shapes.text(self.family, part, shapes[part]) if is_text else None
                out[part] = found or pipeline_shapes.autoencoder(self.family, shapes[part])
        pooled = out["text_encoder_2"]["projection_dim"] if "text_encoder_2" in out else None
        out["unet"] = pipeline_shapes.unet(self.family, shapes["unet"], pooled=pooled)
        return out

    def _config(self, part: str) -> dict[str, Any]:
        return dict(self._configs[part])

    def _scheduler(self) -> dict[str, Any]:
        config = pipeline_shapes.published(self.family)["scheduler"]
        return config | pipeline_shapes.prediction(self.family, self._shapes, self._file.metadata)

    def _find_pieces(self, part: str) -> dict[str, Piece]:
        return pipeline_parts.in_single_file(self.path, self.family, part, self._shapes)


def _place(network: nn.Module, key: str, target: Tensor, value: Tensor) -> None:
    """Copy a value into a network's tensor; one on the meta device, which has no memory, is replaced."""
    if not target.is_meta:
        target.copy_(value)
        return
    module, _, name = key.rpartition(".")
    own = value.to(target.dtype)  # in memory of its own already
    is_parameter = isinstance(target, nn.Parameter)
    setattr(network.get_submodule(module), name, nn.Parameter(own, target.requires_grad) if is_parameter else own)


def _nearest(name: str, names: Iterable[str]) -> str:
    near = get_close_matches(name, list(names), n=1, cutoff=0.8)
    return f" (there is {near[0]})" if near else ""


def _family_of_keys(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The family of a single file with these keys. Raises LowVRAMError where it is of none."""
    unet = pipeline_parts.PREFIXES["sd1"]["unet"]
    if f"{unet}input_blocks.0.0.weight" not in shapes:
        raise LowVRAMError(f"weights={path} holds no Stable Diffusion{_guess(shapes)}.", _REMEDY)
    if any(key.startswith("conditioner.embedders.0.model.") for key in shapes):
        raise LowVRAMError(f"weights={path} is SDXL's refiner.", "Use the base model.")
    if found := [key for key in _OTHER_NOISE_KEYS if key in shapes]:
        raise LowVRAMError(f"weights={path} has {found[0]}: it was trained with another kind of noise.", _REMEDY)
    if f"{unet}label_emb.0.0.weight" in shapes:
        return "sdxl"
    for family in ("sd1", "sd2"):
        if any(key.startswith(pipeline_parts.PREFIXES[family]["text_encoder"]) for key in shapes):
            return family
    # No text encoder that is known: in 2.x, linear layers lead into and out of transformers, in 1.x convolutions.
    return "sd2" if len(shapes.get(f"{unet}middle_block.1.proj_in.weight", ())) == 2 else "sd1"


def _guess(keys: Iterable[str]) -> str:
    """What a file may be that is no pipeline, as the end of a sentence."""
    keys = list(keys)
    for sign, kind in (
        ("lora_", "LoRA weights, which are added to a pipeline"),
        ("emb_params", "a textual inversion, which is added to a pipeline"),
        ("control_model.", "a ControlNet"),
        ("joint_blocks.", "Stable Diffusion 3"),
        ("double_blocks.", "a Flux transformer"),
        ("down_blocks.", "one part of a pipeline's folder"),
        ("encoder.down.", "an autoencoder alone"),
        ("text_model.", "a text encoder alone"),
    ):
        if any(sign in key for key in keys):
            return f": by its keys it is {kind}"
    return f": its first keys are {', '.join(keys[:3])}"
