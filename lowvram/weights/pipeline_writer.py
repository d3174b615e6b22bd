"""Pipelines written: a folder that diffusers loads, or one .safetensors file with the keys first published.

Tensors are taken from the source and from what training changed one at a time. What is written appears whole or not
at all.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowvram.errors import LowVRAMError
from lowvram.weights import pipeline_folder, pipeline_parts
from lowvram.weights.pipeline import Pipeline
from lowvram.weights.pipeline_keys import Piece, stored_shape, stored_tensor
from lowvram.weights.tensor_file import NewTensor, finite, write_tensors

Changed = Mapping[str, Mapping[str, Tensor]]

_FORMAT = {"format": "pt"}  # readers of older versions insist on it
_FILES = dict.fromkeys(("unet", "vae"), "diffusion_pytorch_model.safetensors") | dict.fromkeys(
    ("text_encoder", "text_encoder_2"), "model.safetensors"
)
_ROOM = "Free some space, or choose another place."
_KNOW_ZERO_SNR = ("DDIMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
_HASHES = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")


def write_folder(
    out: Path,
    pipeline: Pipeline,
    changed: Changed,
    *,
    dtype: torch.dtype | None = None,
    scheduler: Mapping[str, Any] | None = None,
) -> None:
    """Write a pipeline as a folder.

    The networks' weights are written anew, as .safetensors; tokenizers, licence and, from a folder, all other
    components (such as the safety checker) are copied.

    Args:
        out: the folder, which must not be there, or be empty.
        pipeline: where all that did not change comes from.
        changed: state dicts of parts that did, whole, by the folder's names (for text encoders also without
            text_model.). On any device.
        dtype: of the floating-point tensors; None: those of the source.
        scheduler: what its configuration shall say otherwise: prediction_type, rescale_betas_zero_snr,
            timestep_spacing. With a zero terminal SNR it becomes a DDIMScheduler if it was one that knows none.

    Raises:
        LowVRAMError: it can't be written; or a tensor is missing, unexpected, of another shape or not finite.
    """
    source = _Source(pipeline, _states(pipeline, changed), dtype, out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise LowVRAMError(f"out={out} is there already.", "Give the path of a new folder.")
    draft = out.with_name(f".{out.name}.partial")
    with _writing(out, draft):
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        for part in pipeline.parts:
            _write_json(draft / part / "config.json", _config(pipeline, part, dtype))
            new = {name: source.new(part, name) for name in pipeline.names(part)}
            write_tensors(draft / part / _FILES[part], new, _FORMAT)
            if part.startswith("text_encoder"):
                _copy_files(pipeline.tokenizer(part), draft / part.replace("text_encoder", "tokenizer"))
        config = _schedule(pipeline, scheduler)
        _write_json(draft / "scheduler" / "scheduler_config.json", config)
        if pipeline.layout == "folder":
            pipeline_folder.copy_rest(pipeline.path, pipeline.index(), draft)
        index = pipeline.index()
        if "_class_name" in config:
            index["scheduler"] = ["diffusers", config["_class_name"]]
        _write_json(draft / "model_index.json", index)
        if out.exists():
            out.rmdir()
        draft.replace(out)


def write_single_file(
    out: Path,
    pipeline: Pipeline,
    changed: Changed,
    *,
    dtype: torch.dtype | None = None,
    scheduler: Mapping[str, Any] | None = None,
) -> None:
    """Write a pipeline as one .safetensors file.

    From a single file all keys are kept, also those that no part has, but for the average of a UNet that changed
    (model_ema.), which is no longer its average. From a folder of Stable Diffusion 2.x the file lacks the last layer
    of the text encoder and its projection, which the folder has not, and nothing reads.

    A file has no place for a schedule. That it predicts v is told in the metadata (modelspec.prediction_type), and in
    1.x and XL by an empty tensor named v_pred; a zero terminal SNR by one named ztsnr.

    Args, Raises: as of `write_folder`; out is the file, which may be there and is replaced.
    """
    source = _Source(pipeline, _states(pipeline, changed), dtype, out)
    if out.suffix.lower() != ".safetensors":
        raise LowVRAMError(f"out={out} is no name of a .safetensors file.", "Let it end in .safetensors.")
    new = dict(source.kept()) if pipeline.layout == "single_file" else {}
    for part in pipeline.parts:
        if pipeline.layout == "folder":
            pieces = pipeline_parts.for_single_file(pipeline.family, part, dict.fromkeys(pipeline.names(part)))
        elif part in source.states:
            pieces = pipeline.pieces(part)
        else:
            continue
        new |= source.keys_of_part(part, pieces)
    metadata = _metadata(pipeline, changed=bool(source.states or dtype))
    config = _schedule(pipeline, scheduler)
    is_v = config.get("prediction_type") == "v_prediction"
    metadata["modelspec.prediction_type"] = "v" if is_v else "epsilon"
    # Empty tensors by which other programs know such files; of 2.x that v is predicted is nothing unusual.
    for mark, holds in (("v_pred", is_v), ("ztsnr", bool(config.get("rescale_betas_zero_snr")))):
        if not holds:
            new.pop(mark, None)
        elif mark != "v_pred" or pipeline.family != "sd2":
            new.setdefault(mark, NewTensor((0,), torch.float32, partial(torch.zeros, 0)))
    write_tensors(out, new, metadata)


class _Source:
    """Where the tensors to write come from: what changed, else the pipeline.

    states: by part, as `_states` has them. dtype: of floating-point tensors, or None. out: where they go, for errors.
    """

    def __init__(
        self, pipeline: Pipeline, states: dict[str, dict[str, Tensor]], dtype: torch.dtype | None, out: Path
    ) -> None:
        self.pipeline, self.states, self.dtype, self.out = pipeline, states, dtype, out

    def new(self, part: str, name: str) -> NewTensor:
        """A part's tensor by the folder's layout."""
        kind = self._kind(self.pipeline.dtype(part, name))
        return NewTensor(self.pipeline.shape(part, name), kind, partial(self._make, part, name, kind))

    def keys_of_part(self, part: str, pieces: Mapping[str, Piece]) -> Iterator[tuple[str, NewTensor]]:
        """What a single file has of a part whose tensors lie at `pieces`."""
        by_key: dict[str, list[str]] = {}
        for name, piece in pieces.items():
            by_key.setdefault(piece.key, []).append(name)
        is_file = self.pipeline.layout == "single_file"
        for key, names in by_key.items():
            shape = self.pipeline.shape(part, names[0])
            shape = self.pipeline.file(part).shape(key) if is_file else stored_shape(pieces[names[0]].form, shape)
            kind = self._kind(self.pipeline.dtype(part, names[0]))
            makers = [(pieces[name], partial(self._make, part, name, kind)) for name in names]
            yield key, NewTensor(shape, kind, partial(stored_tensor, makers, shape))

    def kept(self) -> Iterator[tuple[str, NewTensor]]:
        """All keys of a single file as they are, but those that no longer hold."""
        file = self.pipeline.file("unet")
        networks = (*pipeline_parts.PREFIXES[self.pipeline.family].values(), pipeline_parts.AVERAGES)
        for key in file.names:
            if "unet" in self.states and key.startswith(pipeline_parts.AVERAGES):
                continue
            kind = self._kind(file.dtype(key)) if key.startswith(networks) else file.dtype(key)
            yield key, NewTensor(file.shape(key), kind, partial(self._keep, key, kind))

    def _keep(self, key: str, kind: torch.dtype) -> Tensor:
        tensor = self.pipeline.file("unet").read(key)
        return tensor if tensor.dtype == kind else finite(self.out, key, tensor.to(kind))

    def _make(self, part: str, name: str, kind: torch.dtype) -> Tensor:
        if part in self.states:
            return finite(self.out, f"{part}: {name}", self.states[part][name].detach().to("cpu", kind))
        tensor = self.pipeline.tensor(part, name)
        return tensor if tensor.dtype == kind else finite(self.out, f"{part}: {name}", tensor.to(kind))

    def _kind(self, dtype: torch.dtype) -> torch.dtype:
        return self.dtype if self.dtype is not None and dtype.is_floating_point else dtype


def _states(pipeline: Pipeline, changed: Changed) -> dict[str, dict[str, Tensor]]:
    """State dicts by present names. Raises LowVRAMError unless each has what the pipeline's part has."""
    states: dict[str, dict[str, Tensor]] = {}
    for part, state in changed.items():
        own = {
            pipeline_parts.full_name(part, name): tensor
            for name, tensor in state.items()
            if not name.endswith("position_ids")
        }
        names = set(pipeline.names(part))
        wrong = [f"{name} is missing" for name in sorted(names - set(own))]
        wrong += [f"{name} has no place there" for name in sorted(set(own) - names)]
        for name in sorted(names & set(own)):
            shape, found = pipeline.shape(part, name), tuple(own[name].shape)
            wrong += [f"{name} has shape {list(found)}, not {list(shape)}"] if shape != found else []
        if wrong:
            raise LowVRAMError(
                f"The {part} of weights={pipeline.path} is not the one to write: {'; '.join(wrong[:3])}"
                f"{f'; and {len(wrong) - 3} more' if len(wrong) > 3 else ''}.",
                "Give the weights that it was trained from.",
            )
        states[part] = own
    return states


def _config(pipeline: Pipeline, part: str, dtype: torch.dtype | None) -> dict[str, Any]:
    config = pipeline.config(part)
    for key in ("dtype", "torch_dtype"):  # transformers has the type in its configuration
        if dtype is not None and key in config:
            config[key] = str(dtype).removeprefix("torch.")
    return config


def _schedule(pipeline: Pipeline, changes: Mapping[str, Any] | None) -> dict[str, Any]:
    """The scheduler's configuration, of a kind that knows a zero terminal SNR if there is to be one."""
    config = pipeline.config("scheduler") | dict(changes or {})
    if config.get("rescale_betas_zero_snr") and config.get("_class_name") not in _KNOW_ZERO_SNR:
        config["_class_name"] = _KNOW_ZERO_SNR[0]
        config.pop("skip_prk_steps", None)
    return config


def _metadata(pipeline: Pipeline, *, changed: bool) -> dict[str, str]:
    """What the source said beside its tensors, but for checksums of what they were."""
    found = pipeline.file("unet").metadata if pipeline.layout == "single_file" else {}
    return {key: value for key, value in found.items() if not (changed and key in _HASHES)} | _FORMAT


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _copy_files(folder: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for file in sorted(folder.iterdir()):
        if file.is_file():
            shutil.copyfile(file, out / file.name)


@contextmanager
def _writing(out: Path, draft: Path) -> Iterator[None]:
    """Remove the draft if it is still there at the end, and say which place it was that could not be written."""
    try:
        yield
    except OSError as error:
        raise LowVRAMError(f"out={out} can't be written: {error.strerror or error}.", _ROOM) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
