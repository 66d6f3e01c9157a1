"""GGUF files as models: checked, then written once as an ordinary model folder.

    python -m eopd.stages.models.gguf MODEL.gguf FOLDER [DTYPE]

The folder holds safetensors, ``config.json`` without quantisation, the tokenizer and its chat template. transformers
unpacks the tensors and translates the metadata; what it would leave out without a word is refused here. Reading a
header (``read_gguf``) needs neither torch nor the ``gguf`` package.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import mmap
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eopd.stages.models.weight_files import listed
from eopd.storage.errors import InputError, installing
from eopd.storage.files import canonical_json, free_of, fsync_folder, fsync_tree, sha256_text
from eopd.storage.identity import KEY_LENGTH, Digests

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CONVERTER = 1
"""Version of the conversion; it enters fingerprints. Raise it when the same file gives other weights."""
ORIGIN = "gguf.json"  # origin of a prepared folder
SUFFIX = ".gguf"
FLOATS = {0: "float32", 1: "float16", 30: "bfloat16"}  # tensor types of the format that are not quantised
MOST_DIMENSIONS = 4
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
DIGIT_SPLITTERS = ("smollm", "starcoder", "refact", "command-r")
"""Values of tokenizer.ggml.pre that split digits, then as GPT-2 does; transformers would only do the latter."""
REFUSED = 3  # exit code of a process whose last line of output says why
SCALING = re.compile(r"rope\.scaling\.(?!finetuned$|type$)|scale$|softcapping|clamp|sliding_window$")
"""Metadata that change a model's outputs and that transformers does not read for every architecture."""


@dataclass(frozen=True)
class GgufTensor:
    name: str
    shape: tuple[int, ...]  # slowest dimension first
    kind: int  # ggml type
    offset: int  # from the start of the data


@dataclass(frozen=True)
class GgufFile:
    """A header: metadata, and where tensors lie."""

    path: Path
    size: int
    metadata: Mapping[str, Any]
    tensors: tuple[GgufTensor, ...]
    data_start: int

    @property
    def elements(self) -> int:
        return sum(prod(tensor.shape) for tensor in self.tensors)

    @property
    def dtype(self) -> str:
        """Precision of the matrices; float32 if one is quantised: no smaller type holds every unpacked value."""
        kinds = {FLOATS.get(tensor.kind, "float32") for tensor in self.tensors if len(tensor.shape) > 1}
        return kinds.pop() if len(kinds) == 1 else "float32"


def is_gguf(path: str | Path) -> bool:
    """True if ``path`` names a GGUF file, whether or not the file exists."""
    return str(path).lower().endswith(SUFFIX) and not Path(path).expanduser().is_dir()


def gguf_fingerprint(path: Path, digests: Digests) -> str:
    """The file's bytes and the version of the conversion."""
    return sha256_text(canonical_json({"gguf": digests.of_file(path), "converter": CONVERTER}))[:KEY_LENGTH]


def ensure_prepared(path: Path, cache: Path, digests: Digests) -> Path:
    """The folder in ``cache`` that ``path`` was prepared in; a process of its own prepares it on first use.

    Raises:
        ValueError: the file is damaged, not supported, or cannot be prepared; one line that names it.
    """
    folder = cache / gguf_fingerprint(path, digests)
    if not folder.is_dir():
        prepare_in_process(path, folder)
    return folder


def prepare_in_process(path: Path, folder: Path, dtype: str = "auto") -> None:
    """Run ``prepare`` in a process of its own, so that this one needs no torch."""
    source = check_gguf(path)
    sys.stderr.write(f"preparing {path} ({source.size / 1e6:,.0f} MB) as safetensors in {folder} (once)\n")
    command = [sys.executable, "-m", "eopd.stages.models.gguf", str(path), str(folder), dtype]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    if done.returncode == REFUSED:
        raise InputError(**json.loads(done.stdout.splitlines()[-1]))
    reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1].strip()[:300]
    raise InputError(f"{path}: preparing it failed: {reason}", file=path)


# -- reading a header ------------------------------------------------------------------------------------------------


def read_gguf(path: Path) -> GgufFile:
    """Parse a header; no tensor is read.

    Raises:
        ValueError: this is no GGUF file, or its header is damaged.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < 24:
            raise _damaged(path, "it has fewer bytes than a header")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _parse(path, _Cursor(data))
            except (ValueError, OverflowError) as error:  # the cursor's, and of text that is not UTF-8
                raise _damaged(path, str(error)) from error


def check_gguf(path: Path) -> GgufFile:
    """Read a header and refuse what cannot become a model.

    Raises:
        ValueError: as ``read_gguf``; the ``gguf`` package is not installed; the file is truncated, one of several, or
            no language model.
    """
    if importlib.util.find_spec("gguf") is None:
        problem = "reading GGUF files needs the package gguf, which is not installed"
        raise InputError(problem, file=path, remedy=installing("gguf"))
    file = read_gguf(path)
    kind = file.metadata.get("general.type", "model")
    if kind != "model":
        raise InputError(f"it holds a {kind}, not a language model (general.type)", file=path)
    if int(file.metadata.get("split.count", 1)) > 1:
        problem = f"it is one of {file.metadata['split.count']} files of a split model"
        raise InputError(problem, file=path, remedy="join them first (llama-gguf-split --merge)")
    if not isinstance(file.metadata.get("general.architecture"), str):
        raise _damaged(path, "it names no architecture (general.architecture)")
    if not file.metadata.get("tokenizer.ggml.tokens"):
        raise InputError("it carries no tokenizer (tokenizer.ggml.tokens), so nothing can be scored with it", file=path)
    _check_extent(file)
    return file


def _check_extent(file: GgufFile) -> None:
    import gguf

    for tensor in file.tensors:
        try:
            block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(tensor.kind)]
        except (ValueError, KeyError) as error:
            problem = f"tensor {tensor.name} has type {tensor.kind}, which this version of gguf does not know"
            raise InputError(problem, file=file.path) from error
        end = file.data_start + tensor.offset + prod(tensor.shape) // block * size
        if tensor.shape[-1] % block or end > file.size:
            raise _damaged(file.path, f"tensor {tensor.name} would end at byte {end:,} of {file.size:,}")


class _Cursor:
    """Reads little-endian values one after another, never beyond the end."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self.size = len(data)
        self.position = 0

    def take(self, length: int) -> bytes:
        if length > self.size - self.position:
            raise ValueError("it ends inside its header")
        self.position += length
        return self._data[self.position - length : self.position]

    def numbers(self, letter: str, count: int = 1) -> tuple[Any, ...]:
        if count > self.size:
            raise ValueError("it ends inside its header")
        layout = f"<{count}{letter}"
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def number(self, letter: str) -> int:
        return int(self.numbers(letter)[0])

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.numbers(SCALARS[kind])[0]
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            raise ValueError(f"its metadata hold a value of type {kind}, which the format does not have")
        inner, count = self.number("I"), self.number("Q")
        if inner in SCALARS:
            return list(self.numbers(SCALARS[inner], count))
        if inner != STRING:
            raise ValueError(f"its metadata hold an array of type {inner}")
        return [self.text() for _ in range(count)]  # each takes 8 bytes at least, so the end stops it


def _parse(path: Path, cursor: _Cursor) -> GgufFile:
    if cursor.take(4) != b"GGUF":
        raise ValueError("it does not start with GGUF")
    version = cursor.number("I")
    if version not in (2, 3):
        raise ValueError(f"it has version {version} of the format, or is big-endian; versions 2 and 3 are read")
    tensor_count, metadata_count = cursor.number("Q"), cursor.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(metadata_count):
        name = cursor.text()
        metadata[name] = cursor.value(cursor.number("I"))
    tensors: dict[str, GgufTensor] = {}
    for _ in range(tensor_count):
        name = cursor.text()
        dimensions = cursor.number("I")
        if not 1 <= dimensions <= MOST_DIMENSIONS or name in tensors:
            raise ValueError(f"tensor {name[:80]!r} is listed twice, or has {dimensions} dimensions")
        shape = cursor.numbers("Q", dimensions)[::-1]
        if not 0 < prod(shape) < 2**48:
            raise ValueError(f"tensor {name[:80]!r} has shape {shape}")
        tensors[name] = GgufTensor(name, shape, cursor.number("I"), cursor.number("Q"))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or not tensors:
        raise ValueError(f"its general.alignment is {alignment!r}, and it lists {len(tensors)} tensors")
    data_start = -(-cursor.position // alignment) * alignment
    return GgufFile(path, cursor.size, metadata, tuple(tensors.values()), data_start)


def _damaged(path: Path, reason: str) -> InputError:
    return InputError(f"{path} is no whole GGUF file: {reason}", file=path, remedy="Download or convert it again.")


# -- writing a folder ------------------------------------------------------------------------------------------------


def prepare(path: Path, folder: Path, dtype: str = "auto") -> None:
    """Write the model in ``path`` as a model folder; ``folder`` appears whole or not at all.

    Processes that prepare the same folder wait for each other. The next process removes what a killed one left.

    Args:
        dtype: precision of the stored weights; auto is that of the file, float32 if it is quantised.

    Raises:
        ValueError: as ``check_gguf``; the disk is too small; transformers cannot read the model, or not all of it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial")
    with _locked(folder.with_name(f".{folder.name}.lock")):
        if folder.is_dir() and any(folder.iterdir()):
            return
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            _write(check_gguf(path), partial, dtype)
            fsync_tree(partial)
            partial.rename(folder)  # replaces an empty folder, and no other
            fsync_folder(folder.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    while True:
        file = path.open("a", encoding="utf-8")
        fcntl.flock(file, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()  # the process that held the lock removed the file
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


def _write(file: GgufFile, folder: Path, dtype: str) -> None:
    from eopd.stages.job import ModelRef
    from eopd.stages.models.loading import check_weights

    dtype = file.dtype if dtype == "auto" else dtype
    needed = file.elements * (4 if dtype == "float32" else 2)
    if free_of(folder).bytes < needed:
        problem = f"its weights take {needed:,} bytes in {folder.parent}, more than are free there"
        raise InputError(problem, file=file.path)
    model, tokenizer = _load(file, dtype)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _drop_invented_tokens(folder / "tokenizer.json", len(file.metadata["tokenizer.ggml.tokens"]))
    origin = {"file": file.path.name, "bytes": file.size, "converter": CONVERTER, "dtype": dtype}
    (folder / ORIGIN).write_text(json.dumps(origin, indent=1) + "\n", encoding="utf-8")
    check_weights(ModelRef(str(folder)))
    for weights in folder.glob("*.safetensors"):
        weights.chmod((folder / ORIGIN).stat().st_mode)  # transformers lets only their owner read them


def _load(file: GgufFile, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(file.path.parent), "gguf_file": file.path.name}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            **source, dtype=getattr(torch, dtype), output_loading_info=True, ignore_mismatched_sizes=True
        )
        tokenizer = AutoTokenizer.from_pretrained(**source)
    except (MemoryError, ImportError):
        raise
    except Exception as error:  # libraries raise anything for files that they do not understand
        reason = " ".join(str(error).split())[:300]
        problem = f"transformers cannot read it ({type(error).__name__}: {reason})"
        raise InputError(problem, file=file.path) from error
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.architectures = [type(model).__name__]
    model.config._name_or_path = ""
    _refuse_omissions(file, model, info)
    _set_stops(file, model)
    _set_first_token(file, tokenizer)
    _set_splitting(file, tokenizer)
    _set_templates(file, tokenizer)
    return model, tokenizer


def _refuse_omissions(file: GgufFile, model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """Raises ValueError if the model is not all that the file describes."""
    import torch

    wrong = [f"{name} is missing" for name in sorted(info["missing_keys"])]
    wrong += [
        f"{name} has shape {tuple(stored)}, not {tuple(needed)}" for name, stored, needed in info["mismatched_keys"]
    ]
    architecture = file.metadata["general.architecture"]
    config = model.config.get_text_config().to_dict()
    for name, value in file.metadata.items():
        key = name.removeprefix(f"{architecture}.")
        if key != name and SCALING.search(key) and config.get(key.rpartition(".")[2]) != value:
            wrong.append(f"transformers does not read {name}: {value!r}")
    if file.metadata.get(f"{architecture}.rope.scaling.type", "none") != "none":
        wrong.append(f"transformers does not read {architecture}.rope.scaling.type")
    elements = sum(parameter.numel() for parameter in model.parameters())
    if not wrong and elements != file.elements:
        further = [tensor.name for tensor in file.tensors if not re.match(r"(token_embd|output|blk\.)", tensor.name)]
        wrong.append(f"the file holds {file.elements:,} values, the model {elements:,} ({listed(further)} is not read)")
    damaged = [name for name, value in model.named_parameters() if not torch.isfinite(value).all()]
    wrong += [f"{name} holds values that are not finite" for name in damaged]
    if wrong:
        problem = f"the model in it cannot be prepared: {listed(wrong, '; ')}"
        raise InputError(problem, file=file.path, remedy="Use the original checkpoint.")


def _set_stops(file: GgufFile, model: PreTrainedModel) -> None:
    """Stop tokens of the file: end of text first, then end of turn and of message."""
    kinds = ("eos", "eot", "eom")
    stops = [file.metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in kinds]
    known = list(dict.fromkeys(int(stop) for stop in stops if stop is not None))
    if known and model.generation_config is not None:
        model.generation_config.eos_token_id = known if len(known) > 1 else known[0]


def _set_first_token(file: GgufFile, tokenizer: Any) -> None:
    """Begin a text with the bos token if the file says so, and only then."""
    from tokenizers.processors import TemplateProcessing

    wanted, bos = file.metadata.get("tokenizer.ggml.add_bos_token"), tokenizer.bos_token_id
    if wanted is None or bos is None or wanted == (tokenizer("a")["input_ids"][:1] == [bos]):
        return
    single = f"{tokenizer.bos_token}:0 $A:0" if wanted else "$A:0"
    special = [(tokenizer.bos_token, bos)] if wanted else []
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special)


def _drop_invented_tokens(path: Path, count: int) -> None:
    """Remove special tokens beyond the file's vocabulary: transformers adds GPT-2's own where they are missing."""
    content = json.loads(path.read_text(encoding="utf-8"))
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < count]
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")


def _set_splitting(file: GgufFile, tokenizer: Any) -> None:
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    if file.metadata.get("tokenizer.ggml.pre") in DIGIT_SPLITTERS:
        parts = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(parts)


def _set_templates(file: GgufFile, tokenizer: Any) -> None:
    """The chat template, and those for tools or retrieval beside it."""
    names = file.metadata.get("tokenizer.chat_templates", ())
    further = {name: file.metadata.get(f"tokenizer.chat_template.{name}") for name in names}
    default = file.metadata.get("tokenizer.chat_template")
    tokenizer.chat_template = {"default": default, **further} if default and further else default


if __name__ == "__main__":
    try:
        prepare(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:4])
    except (ValueError, OSError) as refusal:
        sys.stdout.write("\n" + json.dumps(InputError.of(refusal).fields()) + "\n")
        sys.exit(REFUSED)
