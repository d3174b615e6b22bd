"""Class labels: from dataset.json, or from the names of folders."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowvram.errors import LowVRAMError

MAX_CLASSES = 100_000
_REMEDY_OFF = "or set data.labels=false"


def read_labels(files: list[str], dataset_json: bytes | None, set_name: str) -> tuple[NDArray[np.int64], list[str]]:
    """Labels int64 [len(files)] and the class names, in the order of `files` (paths with "/").

    dataset_json: the file's content, `{"labels": [["00000/img00000000.png", 6], ...]}` with an optional
    "class_names" list; None, or `"labels": null`, takes the first-level folder of each file as its class.
    Raises LowVRAMError where a label has no image, an image no label, or a label is no class number.
    """
    content = {} if dataset_json is None else _parse(dataset_json, set_name)
    if content.get("labels") is not None:
        return _from_json(files, content, set_name)
    return _from_folders(files, set_name)


def _parse(dataset_json: bytes, set_name: str) -> dict[str, Any]:
    try:
        content = json.loads(dataset_json)
    except (ValueError, RecursionError) as error:
        raise LowVRAMError(
            f"dataset.json of {set_name} is not valid JSON: {error}", f"Mend it, {_REMEDY_OFF}."
        ) from error
    if not isinstance(content, dict):
        raise LowVRAMError(
            f"dataset.json of {set_name} holds a {type(content).__name__}, not an object",
            'It should read {"labels": [["00000/img00000000.png", 6], ...]}.',
        )
    return content


def _from_json(files: list[str], content: dict[str, Any], set_name: str) -> tuple[NDArray[np.int64], list[str]]:
    by_file = _label_pairs(content["labels"], set_name)
    known = set(files)
    no_image = [file for file in by_file if file not in known]
    no_label = [file for file in files if file not in by_file]
    if no_image or no_label:
        example, what = (no_image[0], "an image that is not there") if no_image else (no_label[0], "")
        problem = f"dataset.json labels {example}, {what}" if no_image else f"dataset.json has no label for {example}"
        raise LowVRAMError(
            f"{problem}: in {set_name}, {len(no_image)} of {len(by_file)} labels have no image "
            f"and {len(no_label)} of {len(files)} images have no label",
            f"Make dataset.json match the images, {_REMEDY_OFF}.",
        )
    labels = np.array([by_file[file] for file in files], dtype=np.int64)
    count = int(labels.max()) + 1
    names = content.get("class_names")
    if names is None:
        names = [str(number) for number in range(count)]
    elif not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(names) < count:
        raise LowVRAMError(
            f'"class_names" in dataset.json of {set_name} must be a list of at least {count} strings',
            'Mend or remove "class_names".',
        )
    return labels, names


def _label_pairs(labels: Any, set_name: str) -> dict[str, int]:
    pairs = list(labels.items()) if isinstance(labels, dict) else labels
    if not isinstance(pairs, list):
        raise LowVRAMError(
            f'"labels" in dataset.json of {set_name} is a {type(labels).__name__}, not a list',
            'It should read {"labels": [["00000/img00000000.png", 6], ...]}.',
        )
    by_file: dict[str, int] = {}
    for pair in pairs:
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], str)):
            raise LowVRAMError(
                f"dataset.json of {set_name} holds {str(pair)[:80]!r} where a pair [file, label] should be",
                'It should read {"labels": [["00000/img00000000.png", 6], ...]}.',
            )
        file, label = pair
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < MAX_CLASSES:
            raise LowVRAMError(
                f"dataset.json of {set_name} gives {file} the label {str(label)[:80]}, which is not a class number",
                f"Labels are whole numbers from 0 to {MAX_CLASSES - 1}; mend it, {_REMEDY_OFF}.",
            )
        by_file[file.replace("\\", "/")] = label
    return by_file


def _from_folders(files: list[str], set_name: str) -> tuple[NDArray[np.int64], list[str]]:
    loose = [file for file in files if "/" not in file]
    if loose:
        raise LowVRAMError(
            f"{set_name} has no dataset.json, and {len(loose)} of its {len(files)} images lie in no class folder, "
            f"{loose[0]} first",
            f"Put each image into a folder named after its class, add a dataset.json, {_REMEDY_OFF}.",
        )
    folders = [file.split("/", 1)[0] for file in files]
    names = sorted(set(folders))
    if all(re.fullmatch(r"\d{5}/img\d{8}\.\w+", file) for file in files):
        raise LowVRAMError(
            f"{set_name} was prepared without labels: it has no labels in dataset.json, and its folders are no classes",
            f"Prepare it again with labels=true, {_REMEDY_OFF}.",
        )
    number = {name: at for at, name in enumerate(names)}
    return np.array([number[folder] for folder in folders], dtype=np.int64), names
