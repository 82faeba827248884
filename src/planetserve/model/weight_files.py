"""Which files of a checkpoint hold its weights: those that transformers would read, no others.

A folder may hold several saves: shards of an older one beside one whole file, pickles beside
safetensors, the author's own layout in a sub-folder. transformers has an order among them, and with
another order a server would serve other weights than its users expect.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from planetserve.errors import ModelError
from planetserve.model.json_files import read_json_object

logger = logging.getLogger(__name__)

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
ADAPTER_FILE = "adapter_config.json"

_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
_CONVERT = (
    "convert it where you trust it: AutoModelForCausalLM.from_pretrained(MODEL)"
    ".save_pretrained(FOLDER), then give FOLDER"
)
_MERGE = (
    "adapters are not served: merge it into its base model (peft: merge_and_unload(), then "
    "save_pretrained(FOLDER)) and give FOLDER"
)
_DOWNLOAD = f" and no {INDEX_FILE}; download the whole folder again"
_INSTEAD: tuple[tuple[str, str], ...] = (
    (r"pytorch_model.*\.(bin|json)|.*\.(bin|pt|pth|ckpt)", "{} is not read, as it can run code; "
     + _CONVERT),
    (r".*\.gguf", "{} is in the format of llama.cpp, which is not read; give the safetensors "
     "checkpoint that it was made from"),
    (r"consolidated.*\.safetensors", "{} is in its maker's own layout; give the checkpoint in "
     "transformers' layout (often its name ends in -hf)"),
    (r"model\..+\.safetensors(\.index\.json)?", "{} is a variant, which is not read unless asked "
     "for by name; rename it to drop the word in the middle"),
    (r".*\.(npz|h5|msgpack|onnx)|model\.mlpackage", "{} is another framework's, which is not read; "
     "give the safetensors checkpoint"),
    (r".*\.safetensors", f"{{}} is neither {SINGLE_FILE} nor named by {INDEX_FILE}; download the "
     "whole folder again"),
)  # fmt: skip
"""Pattern of a file's name -> what to say if there is such a file, but none to read."""


class Files(Protocol):
    """The part of `file_sources.FileSource` that is used here."""

    name: str
    is_folder: bool

    def has(self, filename: str) -> bool: ...
    def fetch(self, filename: str) -> Path: ...
    def listing(self) -> list[str]: ...


def weight_files(source: Files, named: Any = None) -> tuple[list[str], Mapping[str, str]]:
    """The files that hold the weights, and where an index says each tensor is.

    The order is that of transformers' `from_pretrained`: the file that the configuration names,
    one whole file, an index. A tensor may be in any of the files, whatever the index says of it,
    and if it is in several, the last one counts.

    Args:
        source: the checkpoint's files.
        named: `transformers_weights` of its configuration.

    Returns:
        The files in transformers' order; tensor -> file, empty if there is no index.

    Raises:
        ModelError: there are none, or the index cannot be used; says what to do.
    """
    # Both have precedence over any file of weights, and transformers looks for them only in a
    # folder.
    beside = source.listing() if source.is_folder else []
    if ADAPTER_FILE in beside:
        raise ModelError(f"{source.name} holds an adapter ({ADAPTER_FILE}); {_MERGE}")
    if any(map(_DISTRIBUTED.fullmatch, beside)):
        raise ModelError(
            f"{source.name} is a distributed checkpoint of transformers, whose parts of tensors "
            f"are not joined here; {_CONVERT}"
        )
    if named is not None:
        entry = check_relative(named, f"{source.name}: transformers_weights in config.json")
        if entry.endswith(".safetensors"):
            return [entry], {}
        if entry.endswith(".safetensors.index.json"):
            return _from_index(source, entry)
        raise ModelError(f"{source.name}: config.json names {entry} as weights, not safetensors")
    if source.has(SINGLE_FILE):
        if INDEX_FILE in beside:
            _look_at_unused_index(source)
        return [SINGLE_FILE], {}
    if source.has(INDEX_FILE):
        return _from_index(source, INDEX_FILE)
    names = source.listing()
    instead = _unreadable(source, names, SINGLE_FILE, INDEX_FILE) or _what_instead(names)
    raise ModelError(f"{source.name} has no {SINGLE_FILE}{instead or _DOWNLOAD}")


def why_no_config(source: Files) -> str:
    """What a folder without a `config.json` seems to be, as the end of a sentence."""
    names = source.listing()
    if ADAPTER_FILE in names or "model_index.json" in names:
        return what_it_holds(names)
    below = [name for name in sorted(names) if source.has(f"{name}/config.json")]
    if below:
        return f"; its folder {below[0]} has one: give that"
    if any(name.endswith(".safetensors") for name in names):
        instead = "; download the whole folder again, not the weights alone"
    else:
        instead = _what_instead(names) or "; give a model folder saved by save_pretrained"
    return _unreadable(source, names, "config.json") or instead


def what_it_holds(names: Iterable[str]) -> str:
    """What files without a `config.json` seem to be, as the end of a sentence; may be empty."""
    names = list(names)
    if ADAPTER_FILE in names:
        return f"; it holds an adapter ({ADAPTER_FILE}): {_MERGE}"
    if "model_index.json" in names:
        return "; it is a pipeline of diffusers, which is not served"
    return _what_instead(names)


def locate(files: Iterable[str], header: Callable[[str], Iterable[str]]) -> dict[str, str]:
    """Tensor -> the file that holds it, going by the headers of all files."""
    return {name: filename for filename in files for name in header(filename)}


def check_relative(value: object, where: str) -> str:
    """A path below the checkpoint's folder, from a file of the checkpoint.

    Raises:
        ModelError: it is something else, or leads out of the folder.
    """
    parts = PurePosixPath(value).parts if isinstance(value, str) else ()
    is_below = (
        isinstance(value, str)
        and value.isprintable()
        and value == "/".join(parts)
        and not any(part in ("..", "/") or "\\" in part or ":" in part for part in parts)
    )
    if not is_below or not isinstance(value, str):
        raise ModelError(
            f"{where} is no plain file name, nor a path below the model's folder: {value!r}"
        )
    return value


def _from_index(source: Files, filename: str) -> tuple[list[str], Mapping[str, str]]:
    weight_map = read_json_object(source.fetch(filename)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{source.name}: {filename} has no weight_map; download it again")
    for tensor, shard in weight_map.items():
        check_relative(shard, f"{source.name}: the file of {tensor} in {filename}")
        if not shard.endswith(".safetensors"):
            raise ModelError(f"{source.name}: {filename} points to {shard}, not to safetensors")
    return sorted(set(weight_map.values())), weight_map


def _look_at_unused_index(source: Files) -> None:
    """Log that an index beside a whole file is not used, and still refuse a hostile one.

    It may be of an older save, and broken: transformers does not read it.
    """
    try:
        shards = read_json_object(source.fetch(INDEX_FILE)).get("weight_map")
    except ModelError:
        shards = None
    for tensor, shard in shards.items() if isinstance(shards, dict) else ():
        check_relative(shard, f"{source.name}: the file of {tensor} in {INDEX_FILE}")
    logger.warning(
        "%s: %s is read; %s beside it is not, as in transformers",
        source.name, SINGLE_FILE, INDEX_FILE,
    )  # fmt: skip


def _unreadable(source: Files, names: Iterable[str], *wanted: str) -> str:
    """That one of the wanted names exists but is not a readable file, as the end of a sentence."""
    for name in names:
        if name in wanted and source.is_folder and not source.has(name):
            return f" that can be read: {name} is a folder, a pipe or a link to nowhere"
    return ""


def _what_instead(listing: Iterable[str]) -> str:
    names = sorted(listing)
    for pattern, text in _INSTEAD:
        for name in names:
            if re.fullmatch(pattern, name):
                return f"; {text.format(name)}"
    return ""
